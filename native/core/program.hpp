// A program: a small graph of operators that a sidecar runs behind its own lookups, so that its results travel in place of
// the rows that it reads. It stands behind a *computed table*: the rows of that table in the shards are the program's
// weights, a bag of it is a *record* (fixed words: ids of the lookups, then packed numbers), and what the bag gives is the
// program's result for one sample, `[dim]`. So frames, routes, sharing and merging need to know nothing of programs.
// docs/programs.md has the operators; partition/ writes programs, and every bound is checked before the first is run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tables.hpp"

namespace sidepool {

struct PoolTask;

// Bounds that hold before anything is allocated. Attention over a few hundred behaviours takes some twenty steps and a
// hundred thousand floats a sample; the rest is room. kMaxRank: batch aside, with a dimension split by a repetition.
constexpr int32_t kMaxRank = 8;
constexpr size_t kMaxLeaves = 1024;
constexpr size_t kMaxSteps = 4096;
constexpr int64_t kMaxRecordWords = 1 << 16;
constexpr int64_t kMaxProgramFloats = 1 << 22;  // 16 MiB of scratch per thread

// Where an operand lies: scratch, weights and result, then one space per lookup and per input, in that order.
enum Space : int32_t { kScratch = 0, kWeights = 1, kResult = 2, kFirstLeaf = 3 };

enum class StepOp : uint8_t {
  // One element each; the third column of binding names.
  copy, negate, absolute, exp, log, sqrt, reciprocal, sigmoid, tanh, relu, logical_not,
  add, subtract, multiply, divide, maximum, minimum, less, less_equal, equal, not_equal, logical_and, logical_or,
  where,
  // Over the last size.
  sum, largest, smallest, softmax,
  matmul,
};
constexpr int32_t kStepOps = int32_t(StepOp::matmul) + 1;
StepOp parse_step_op(const std::string& name);  // Error(plan) on an unknown name
int32_t operand_count(StepOp op);               // matmul: 2, or 3 with something to add

// Elements `offset + Σ index · stride` of a space. Strides are never negative; 0 repeats.
struct Operand {
  int32_t space = kScratch;
  int64_t offset = 0;
  int64_t strides[kMaxRank] = {};
};

// One operator over `sizes`. Reductions and softmax run over the last of them; for a reduction `out` has no stride there.
// matmul: sizes are [..., rows, columns] and `depth` what is summed over; the first operand's last stride is that of
// `depth`, the second's last but one; the second's last stride and the result's are 1.
struct Step {
  StepOp op = StepOp::copy;
  int32_t rank = 0;
  int32_t operands = 1;
  int64_t sizes[kMaxRank] = {};
  int64_t depth = 0;
  Operand out;
  Operand in[3];
};

struct ProgramLookup {
  int32_t table = -1;
  Pooling pooling = Pooling::sum;
  int64_t padding_index = kNoPadding;
  int32_t begin = 0;  // words of the record: its ids
  int32_t ids = 1;
};

struct ProgramInput {
  bool bytes = false;  // one byte a value (truth values), eight a word; else fp32, two a word
  int32_t begin = 0;
  int32_t count = 0;  // values
};

// Runs many samples elsewhere, in place of steps: torch, where a program has operators that steps lack. leaves: `[samples, floats]`
// each, `count` of them. results: `[samples, dim]`. False where it failed, which it has told someone.
struct ExternalCall {
  float* const* leaves;
  const int64_t* floats;
  size_t count;
  int64_t samples;
  float* results;
  int64_t dim;
};
using External = std::function<bool(const ExternalCall&)>;

struct ProgramSpec {
  int32_t words = 0;   // of a record
  int64_t floats = 0;  // of scratch per sample
  std::vector<ProgramLookup> lookups;
  std::vector<ProgramInput> inputs;
  std::vector<Step> steps;
  External external;  // null: the steps
};

// Immutable once made; any number of threads may run it.
class Program {
 public:
  // Checks everything that running it relies on, against `tables`, of which `own` is the computed one; Error(plan) names
  // what is wrong. The tables must outlive it.
  Program(ProgramSpec spec, const TableSet& tables, int32_t own);

  int32_t words() const { return spec_.words; }
  // Whether it looks up a table that has become a computed one since: for TableSet::seal, no program runs another.
  bool reads_computed() const;

  // Runs the bags of `task`, records of `words` ids each, and fills in how that ended as pool() does. Reads every word
  // once. No allocation once the thread has run one as large, no lock, no system call, but for those of an external one.
  void run(PoolTask& task) const;

 private:
  struct Scratch;
  void check(const Step& step, size_t index, int64_t result, int64_t weights) const;
  int64_t leaf_floats(size_t leaf) const;
  bool look_up(PoolTask& task, Scratch& scratch, int64_t first, int64_t samples, int64_t& bytes_read) const;
  void unpack(const PoolTask& task, Scratch& scratch, int64_t first, int64_t samples) const;
  void store(const PoolTask& task, Scratch& scratch, int64_t first, int64_t samples) const;

  ProgramSpec spec_;
  const Table* own_;
  std::vector<const Table*> tables_;   // of each lookup
  std::vector<int64_t> leaf_begin_;    // floats of a tile before each leaf, per sample
  int64_t leaf_floats_ = 0;            // of all leaves, per sample
  int64_t ids_ = 0;                    // of all lookups, per sample
  std::vector<int64_t> leaf_sizes_;    // floats of each leaf
  int64_t tile_ = 1;                   // samples whose rows are looked up together
};

}  // namespace sidepool
