// Programs: cut into pieces they give the same bits, wrong records are refused, and no program that is accepted leaves its memory.
#include "program.hpp"

#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pieces.hpp"
#include "pooling.hpp"

using namespace sidepool;

namespace {

constexpr int64_t kRows = 40;
constexpr int32_t kDim = 6, kIds = 5, kNumbers = 3, kWords = kIds + 2, kResults = 4;
constexpr int64_t kBatch = 150;  // more than two tiles

std::mt19937_64 rng(11);
int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

Operand operand(int32_t space, int64_t offset, std::initializer_list<int64_t> strides) {
  Operand found;
  found.space = space;
  found.offset = offset;
  std::copy(strides.begin(), strides.end(), found.strides);
  return found;
}

Step step(StepOp op, std::initializer_list<int64_t> sizes, std::initializer_list<Operand> operands, int64_t depth = 0) {
  Step found;
  found.op = op;
  found.rank = int32_t(sizes.size());
  found.operands = int32_t(operands.size()) - 1;
  found.depth = depth;
  std::copy(sizes.begin(), sizes.end(), found.sizes);
  found.out = *operands.begin();
  std::copy(operands.begin() + 1, operands.end(), found.in);
  return found;
}

// A layer over the rows, a softmax over them, what it weighs, and a number of the record.
ProgramSpec attention() {
  constexpr int64_t kHidden = kIds * kResults;
  ProgramSpec spec;
  spec.words = kWords;
  spec.floats = 2 * kHidden + kResults;
  spec.lookups = {{0, Pooling::none, kNoPadding, 0, kIds}};
  spec.inputs = {{false, kIds, kNumbers}};
  spec.steps = {
      step(StepOp::matmul, {kIds, kResults},
           {operand(kScratch, 0, {kResults, 1}), operand(kFirstLeaf, 0, {kDim, 1}), operand(kWeights, 0, {kResults, 1})}, kDim),
      step(StepOp::softmax, {kResults, kIds}, {operand(kScratch, kHidden, {1, kResults}), operand(kScratch, 0, {1, kResults})}),
      step(StepOp::sum, {kResults, kIds}, {operand(kScratch, 2 * kHidden, {1, 0}), operand(kScratch, kHidden, {1, kResults})}),
      step(StepOp::add, {kResults},
           {operand(kResult, 0, {1}), operand(kScratch, 2 * kHidden, {1}), operand(kFirstLeaf + 1, 1, {0})}),
  };
  return spec;
}

std::shared_ptr<TableSet> make_tables(ProgramSpec spec) {
  auto tables = std::make_shared<TableSet>(1, 2, 1);
  std::vector<float> rows(size_t(kRows * kDim)), weights(size_t(kDim * kResults));
  for (float& x : rows) x = float(random_int(-1000, 1000)) / 991.0f;
  for (float& x : weights) x = float(random_int(-1000, 1000)) / 991.0f;
  tables->add_copy(0, rows.data(), kRows, kDim, RowFormat::fp32, OutOfRange::error, 0);
  tables->add_copy(1, weights.data(), kDim, kResults, RowFormat::fp32, OutOfRange::error, 0);
  tables->add_program(1, std::move(spec));
  tables->add_feature(0, 1, Pooling::sum, false);
  tables->seal();
  return tables;
}

std::vector<int64_t> records() {
  std::vector<int64_t> words(size_t(kBatch * kWords));
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int32_t k = 0; k < kIds; ++k) words[size_t(b * kWords + k)] = random_int(0, kRows - 1);
    const float numbers[4] = {1, float(b), -1, 0};
    std::memcpy(&words[size_t(b * kWords + kIds)], numbers, sizeof numbers);
  }
  return words;
}

PoolTask task_of(const TableSet& tables, const std::vector<int64_t>& words, float* out) {
  BagInput input;
  input.values = words.data();
  input.value_count = int64_t(words.size());
  input.fixed_length = kWords;
  input.batch = int32_t(kBatch);
  return pool_task(tables.table(1), Pooling::sum, input, out, kResults);
}

Fault run(PoolTask& task) {
  Lookahead ahead(&task, 1);
  PoolCounts counts;
  return pool(task, ahead, counts);
}

void pieces_give_the_same_bits() {
  const auto tables = make_tables(attention());
  const auto words = records();
  std::vector<float> whole(size_t(kBatch * kResults)), cut_up(whole.size());
  PoolTask task = task_of(*tables, words, whole.data());
  CHECK(run(task).status == Status::ok);
  CHECK(task.rows_read == kBatch * kIds);
  for (int64_t b = 0; b < kBatch; ++b) {
    float sum = 0;  // shares of each column sum to one; the second number of the record was added to each sum
    for (int32_t k = 0; k < kResults; ++k) sum += whole[size_t(b * kResults + k)];
    CHECK(sum > kResults * (1 + float(b)) * 0.9999f && sum < kResults * (1 + float(b)) * 1.0001f);
  }
  LineVector<PoolTask> tasks;
  LineVector<TaskPart> parts;
  cut(task_of(*tables, words, cut_up.data()), 0, 10 * kWords, tasks, parts);
  CHECK(tasks.size() > 10);
  std::vector<std::thread> threads;
  for (size_t first = 0; first < 3; ++first) {
    threads.emplace_back([&tasks, first] {
      for (size_t i = first; i < tasks.size(); i += 3) CHECK(run(tasks[i]).status == Status::ok);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(std::memcmp(whole.data(), cut_up.data(), whole.size() * sizeof(float)) == 0);
}

void wrong_records_are_refused() {
  const auto tables = make_tables(attention());
  auto words = records();
  std::vector<float> out(size_t(kBatch * kResults));
  PoolTask task = task_of(*tables, words, out.data());
  task.fixed_length = kWords - 1;
  Fault fault = run(task);
  CHECK(fault.status == Status::rejected && fault.reason == Reason::record_length && fault.bag == 0 && fault.value == kWords - 1);

  std::vector<int32_t> lengths(size_t(kBatch), kWords);
  task = task_of(*tables, words, out.data());
  task.lengths = lengths.data();
  task.fixed_length = -1;
  CHECK(run(task).status == Status::ok);
  lengths[3] = kWords + 1;
  fault = run(task);
  CHECK(fault.reason == Reason::record_length && fault.bag == 3 && fault.value == kWords + 1);

  task = task_of(*tables, words, out.data());
  task.value_count -= kWords;
  CHECK(run(task).reason == Reason::lengths_exceed_values);

  words[size_t(130 * kWords + 2)] = kRows;
  task = task_of(*tables, words, out.data());
  fault = run(task);
  CHECK(fault.status == Status::rejected && fault.reason == Reason::id_out_of_range && fault.bag == 130 && fault.value == kRows);
}

// Bounds are checked once, when a program is made: whatever passes then must stay within its memory, which a sanitizer watches.
void accepted_programs_stay_within_their_memory() {
  int accepted = 0, refused = 0;
  const auto words = records();
  for (int round = 0; round < 6'000; ++round) {
    ProgramSpec spec = attention();
    for (int64_t changes = random_int(1, 3); changes > 0; --changes) {
      Step& changed = spec.steps[size_t(random_int(0, int64_t(spec.steps.size()) - 1))];
      Operand& of = random_int(0, 3) == 0 ? changed.out : changed.in[random_int(0, 2)];
      switch (random_int(0, 6)) {
        case 0: of.offset = random_int(-2, 50); break;
        case 1: of.space = int32_t(random_int(-1, 6)); break;
        case 2: of.strides[random_int(0, 1)] = random_int(-1, 7); break;
        case 3: changed.sizes[random_int(0, 1)] = random_int(0, 9); break;
        case 4: changed.op = StepOp(random_int(0, kStepOps - 1)); changed.operands = operand_count(changed.op); break;
        case 5: changed.depth = random_int(0, 9); break;
        default: spec.floats = random_int(0, 60); break;
      }
    }
    std::shared_ptr<TableSet> tables;
    try {
      tables = make_tables(spec);
    } catch (const Error&) {
      ++refused;
      continue;
    }
    if (++accepted % 8 != 0) continue;
    // A thread of its own, whose memory is of exactly the size that this program needs.
    std::thread([&] {
      std::vector<float> out(size_t(kBatch * kResults));
      PoolTask task = task_of(*tables, words, out.data());
      run(task);
    }).join();
  }
  CHECK(accepted > 200 && refused > 200);
}

void what_a_program_reads_must_be_there() {
  const auto refuses = [](auto change) {
    ProgramSpec spec = attention();
    change(spec);
    try {
      make_tables(std::move(spec));
    } catch (const Error& e) {
      return e.status == Status::plan;
    }
    return false;
  };
  CHECK(!refuses([](ProgramSpec&) {}));
  CHECK(refuses([](ProgramSpec& s) { s.lookups[0].table = 1; }));
  CHECK(refuses([](ProgramSpec& s) { s.lookups[0].table = 2; }));
  CHECK(refuses([](ProgramSpec& s) { s.lookups[0].begin = kWords - kIds + 1; }));
  CHECK(refuses([](ProgramSpec& s) { s.lookups[0].ids = 0; }));
  CHECK(refuses([](ProgramSpec& s) { s.lookups[0].padding_index = kRows + 1; }));
  CHECK(refuses([](ProgramSpec& s) { s.inputs[0].count = 5; }));
  CHECK(refuses([](ProgramSpec& s) { s.inputs[0].begin = kWords; }));
  CHECK(refuses([](ProgramSpec& s) { s.words = 0; }));
  CHECK(refuses([](ProgramSpec& s) { s.floats = kMaxProgramFloats + 1; }));
}

void no_program_runs_another() {
  TableSet tables(1, 3, 0);
  const std::vector<float> rows(64);
  for (int32_t t = 0; t < 3; ++t) tables.add_copy(t, rows.data(), kDim, t == 0 ? kDim : kResults, RowFormat::fp32, OutOfRange::error, 0);
  tables.add_program(1, attention());
  tables.add_program(0, [] {
    ProgramSpec spec;
    spec.words = 1;
    spec.lookups = {{2, Pooling::sum, kNoPadding, 0, 1}};
    spec.steps = {step(StepOp::copy, {kResults}, {operand(kResult, 0, {1}), operand(kFirstLeaf, 0, {1})})};
    return spec;
  }());
  bool refused = false;
  try {
    tables.seal();
  } catch (const Error& e) {
    refused = e.status == Status::plan;
  }
  CHECK(refused);
}

}  // namespace

int main() {
  return run_tests({
      {"a program cut into pieces gives the same bits", pieces_give_the_same_bits},
      {"records of another length, and ids outside their tables, are refused", wrong_records_are_refused},
      {"programs that are accepted stay within their memory", accepted_programs_stay_within_their_memory},
      {"what a program reads must be there", what_a_program_reads_must_be_there},
      {"no program runs another", no_program_runs_another},
  });
}
