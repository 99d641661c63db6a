// What a program may be, and how its bags are run: rows of some samples looked up together, then step by step per sample.
#include "program.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

#include "pooling.hpp"
#include "program_kernels.hpp"

namespace sidepool {
namespace {

const char* const kNames[] = {
    "copy", "negate", "absolute", "exp", "log", "sqrt", "reciprocal", "sigmoid", "tanh", "relu", "logical_not",
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "less", "less_equal", "equal", "not_equal", "logical_and",
    "logical_or", "where", "sum", "largest", "smallest", "softmax", "matmul",
};
static_assert(std::size(kNames) == size_t(kStepOps));

// Rows and inputs of a tile: half of a level-2 cache, beside the weights and a sample's scratch. More samples than 64 give the
// lookahead nothing more.
constexpr int64_t kTileFloats = 64 << 10;
constexpr int64_t kMaxTile = 64;
// torch's dispatch costs microseconds an operator: spread over many samples, at most 16 MiB of them.
constexpr int64_t kExternalTileFloats = 4 << 20;
constexpr int64_t kMaxExternalTile = 1024;

[[noreturn]] void refuse(const std::string& what) { throw Error(Status::plan, "program: " + what); }

bool reduces(StepOp op) { return op >= StepOp::sum && op <= StepOp::smallest; }

std::string at_step(size_t index, const std::string& what) { return "steps." + std::to_string(index) + ": " + what; }

// Sizes of 1, and neighbours that every operand walks as one, cost a step in the walk over indices for nothing.
void merge_sizes(Step& step) {
  if (step.op > StepOp::where) return;
  const auto each = [&step](auto use) {
    use(step.out);
    for (int32_t i = 0; i < step.operands; ++i) use(step.in[i]);
  };
  int32_t kept = 0;
  for (int32_t d = 0; d < step.rank; ++d) {
    if (step.sizes[d] == 1) continue;
    bool merges = kept > 0;
    each([&](const Operand& o) { merges = merges && o.strides[kept - 1] == o.strides[d] * step.sizes[d]; });
    if (!merges) ++kept;
    step.sizes[kept - 1] = (merges ? step.sizes[kept - 1] : 1) * step.sizes[d];
    each([&](Operand& o) { o.strides[kept - 1] = o.strides[d]; });
  }
  if (kept == 0) {  // a single element
    kept = 1;
    step.sizes[0] = 1;
    each([](Operand& o) { o.strides[0] = 1; });
  }
  step.rank = kept;
}

}  // namespace

StepOp parse_step_op(const std::string& name) {
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) refuse("op: found '" + name + "'; allowed: an operator of docs/programs.md");
  return StepOp(found - std::begin(kNames));
}

int32_t operand_count(StepOp op) {
  if (op == StepOp::where) return 3;
  return op == StepOp::matmul || (op >= StepOp::add && op <= StepOp::logical_or) ? 2 : 1;
}

// Memory of a thread: grows to the largest program that it ran and stays.
struct Program::Scratch {
  std::vector<float> leaves;   // of a tile, leaf after leaf: [tile, floats of the leaf]
  std::vector<float> values;   // of a sample
  std::vector<float> results;  // [tile, dim]
  std::vector<int64_t> ids;    // of a tile, lookup after lookup; then 0, 1, …
  std::vector<PoolTask> tasks;
  std::vector<float*> spaces;
};

Program::Program(ProgramSpec spec, const TableSet& tables, int32_t own) : spec_(std::move(spec)), own_(&tables.table(own)) {
  const auto within = [](int64_t found, int64_t least, int64_t most) { return found >= least && found <= most; };
  if (!within(spec_.words, 1, kMaxRecordWords)) refuse("words: allowed: 1 to " + std::to_string(kMaxRecordWords));
  if (!within(spec_.floats, 0, kMaxProgramFloats)) refuse("floats: allowed: 0 to " + std::to_string(kMaxProgramFloats));
  if (own_->format != RowFormat::fp32) refuse("weights: allowed: fp32 rows");
  if (spec_.lookups.size() + spec_.inputs.size() > kMaxLeaves || spec_.steps.size() > kMaxSteps)
    refuse("found more than " + std::to_string(kMaxLeaves) + " lookups and inputs, or " + std::to_string(kMaxSteps) + " steps");
  for (const ProgramLookup& lookup : spec_.lookups) {
    if (!within(lookup.table, 0, tables.table_count() - 1) || lookup.table == own)
      refuse("lookups: found table " + std::to_string(lookup.table) + "; allowed: a table with rows of its own");
    const Table& table = tables.table(lookup.table);
    if (table.base.load(std::memory_order_relaxed) == nullptr)
      refuse("lookups: table " + std::to_string(lookup.table) + " is not held here; allowed: tables whole on the program's sidecar");
    if (!within(lookup.ids, 1, spec_.words) || !within(lookup.begin, 0, spec_.words - lookup.ids))
      refuse("lookups: found ids beyond the record");
    if (!within(lookup.padding_index, kNoPadding, table.rows)) refuse("lookups: padding_index beyond its table");
    tables_.push_back(&table);
    ids_ += lookup.ids;
  }
  for (const ProgramInput& input : spec_.inputs) {
    const int64_t words = (int64_t(input.count) * (input.bytes ? 1 : 4) + 7) / 8;
    if (input.count < 1 || !within(input.begin, 0, spec_.words - words)) refuse("inputs: found values beyond the record");
  }
  for (size_t leaf = 0; leaf < spec_.lookups.size() + spec_.inputs.size(); ++leaf) {
    leaf_begin_.push_back(leaf_floats_);
    leaf_sizes_.push_back(leaf_floats(leaf));
    leaf_floats_ += leaf_sizes_.back();
    if (leaf_floats_ > kMaxProgramFloats) refuse("lookups and inputs: found more than " + std::to_string(kMaxProgramFloats) + " floats");
  }
  const int64_t weights = own_->rows * own_->dim;
  for (size_t i = 0; i < spec_.steps.size(); ++i) {
    check(spec_.steps[i], i, own_->dim, weights);
    merge_sizes(spec_.steps[i]);
  }
  const bool steps = spec_.external == nullptr;
  tile_ = std::clamp((steps ? kTileFloats : kExternalTileFloats) / std::max<int64_t>(1, leaf_floats_), int64_t(1),
                     steps ? kMaxTile : kMaxExternalTile);
}

bool Program::reads_computed() const {
  return std::any_of(tables_.begin(), tables_.end(), [](const Table* table) { return table->program != nullptr; });
}

int64_t Program::leaf_floats(size_t leaf) const {
  if (leaf >= spec_.lookups.size()) return spec_.inputs[leaf - spec_.lookups.size()].count;
  const ProgramLookup& lookup = spec_.lookups[leaf];
  return int64_t(tables_[leaf]->dim) * (lookup.pooling == Pooling::none ? lookup.ids : 1);
}

void Program::check(const Step& step, size_t index, int64_t result, int64_t weights) const {
  if (step.rank < 1 || step.rank > kMaxRank) refuse(at_step(index, "sizes: allowed: 1 to " + std::to_string(kMaxRank)));
  const bool product = step.op == StepOp::matmul;
  const int32_t least = operand_count(step.op);
  if (step.operands != least && !(product && step.operands == 3)) refuse(at_step(index, "found the wrong number of operands"));
  for (int32_t d = 0; d < step.rank; ++d) {
    if (step.sizes[d] < 1 || step.sizes[d] > kMaxProgramFloats) refuse(at_step(index, "sizes: found one beyond what is allowed"));
  }
  const int32_t last = step.rank - 1;
  if (product && (step.rank < 2 || step.depth < 1 || step.depth > kMaxProgramFloats || step.out.strides[last] != 1 ||
                  step.in[1].strides[last] != 1))
    refuse(at_step(index, "found a product of other than rows side by side"));
  for (int32_t i = 0; i <= step.operands; ++i) {
    const Operand& operand = i == 0 ? step.out : step.in[i - 1];
    const size_t leaf = size_t(operand.space - kFirstLeaf);
    if (operand.space < 0 || (operand.space >= kFirstLeaf && leaf >= leaf_begin_.size())) refuse(at_step(index, "found an unknown space"));
    if (i == 0 && operand.space != kScratch && operand.space != kResult) refuse(at_step(index, "found a result where only reading is allowed"));
    const int64_t floats = operand.space == kScratch   ? spec_.floats
                           : operand.space == kWeights ? weights
                           : operand.space == kResult  ? result
                                                       : leaf_floats(leaf);
    int64_t end = operand.offset;
    for (int32_t d = 0; d < step.rank; ++d) {
      if (i == 0 && d == last && reduces(step.op)) continue;
      int64_t size = step.sizes[d];
      if (product && ((i == 1 && d == last) || (i == 2 && d == last - 1))) size = step.depth;
      // Compared before they are multiplied: both fit 22 bits, so nothing overflows.
      if (operand.strides[d] < 0 || operand.strides[d] > kMaxProgramFloats) refuse(at_step(index, "found a stride beyond what is allowed"));
      end += (size - 1) * operand.strides[d];
    }
    if (operand.offset < 0 || operand.offset >= floats || end >= floats) refuse(at_step(index, "found an operand beyond its space"));
  }
}

bool Program::look_up(PoolTask& task, Scratch& scratch, int64_t first, int64_t samples, int64_t& bytes_read) const {
  const size_t count = spec_.lookups.size();
  const int64_t* record = task.values + first * spec_.words;
  int64_t* ids = scratch.ids.data();
  for (size_t i = 0; i < count; ++i) {
    const ProgramLookup& lookup = spec_.lookups[i];
    int64_t* to = ids;
    for (int64_t b = 0; b < samples; ++b)
      for (int32_t k = 0; k < lookup.ids; ++k) *to++ = __atomic_load_n(record + b * spec_.words + lookup.begin + k, __ATOMIC_RELAXED);
    BagInput input;
    input.values = ids;
    input.value_count = samples * lookup.ids;
    input.fixed_length = lookup.ids;
    input.batch = int32_t(samples);
    ids = to;
    float* rows = scratch.leaves.data() + leaf_begin_[i] * tile_;
    scratch.tasks[i] = pool_task(*tables_[i], lookup.pooling, input, rows, tables_[i]->dim, OutputFormat::fp32, lookup.padding_index);
  }
  Lookahead ahead(scratch.tasks.data(), count);
  PoolCounts counts;
  for (size_t i = 0; i < count; ++i) {
    PoolTask& own = scratch.tasks[i];
    const Fault fault = pool(own, ahead, counts);
    bytes_read += own.rows_read * own.row_bytes;
    if (fault.status == Status::ok) continue;
    task.reason = fault.reason;
    task.bag = first + fault.bag;
    task.value = fault.value;
    return false;
  }
  task.rows_read += counts.rows_read;
  task.out_of_range += counts.out_of_range;
  return true;
}

void Program::unpack(const PoolTask& task, Scratch& scratch, int64_t first, int64_t samples) const {
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    const ProgramInput& input = spec_.inputs[i];
    float* to = scratch.leaves.data() + leaf_begin_[spec_.lookups.size() + i] * tile_;
    for (int64_t b = 0; b < samples; ++b, to += input.count) {
      const int64_t* words = task.values + (first + b) * spec_.words + input.begin;
      if (!input.bytes) {
        std::memcpy(to, words, size_t(input.count) * sizeof(float));
        continue;
      }
      const auto* bytes = reinterpret_cast<const uint8_t*>(words);
      for (int32_t k = 0; k < input.count; ++k) to[k] = float(bytes[k]);
    }
  }
}

// Results are rows like any others: pooling them one by one gives every output format.
void Program::store(const PoolTask& task, Scratch& scratch, int64_t first, int64_t samples) const {
  std::byte* out = task.out + first * task.out_stride_bytes;
  const size_t row = size_t(own_->dim) * sizeof(float);
  if (task.output == OutputFormat::fp32) {
    for (int64_t b = 0; b < samples; ++b) std::memcpy(out + b * task.out_stride_bytes, scratch.results.data() + b * own_->dim, row);
    return;
  }
  std::iota(scratch.ids.begin(), scratch.ids.begin() + samples, int64_t(0));
  PoolTask rounding = task;
  rounding.program = nullptr;
  rounding.base = reinterpret_cast<const std::byte*>(scratch.results.data());
  rounding.rows = samples;
  rounding.row_bytes = int64_t(row);
  rounding.format = RowFormat::fp32;
  rounding.values = scratch.ids.data();
  rounding.value_count = samples;
  rounding.lengths = nullptr;
  rounding.fixed_length = 1;
  rounding.batch = int32_t(samples);
  rounding.out = out;
  Lookahead ahead(&rounding, 1);
  PoolCounts counts;
  pool(rounding, ahead, counts);
}

void Program::run(PoolTask& task) const {
  if (task.pooling != Pooling::sum) {  // rows were asked for, of which there are none
    task.reason = Reason::record_length;
    return;
  }
  for (int64_t b = 0; b < task.batch; ++b) {
    const int32_t length = task.lengths != nullptr ? __atomic_load_n(task.lengths + b, __ATOMIC_RELAXED) : task.fixed_length;
    if (length == spec_.words) continue;
    task.reason = Reason::record_length;
    task.bag = b;
    task.value = length;
    return;
  }
  if (task.value_count != int64_t(task.batch) * spec_.words) {
    task.reason = Reason::lengths_exceed_values;
    task.value = task.value_count;
    return;
  }
  thread_local Scratch scratch;
  const size_t leaves = leaf_begin_.size();
  const auto grow = [](auto& memory, size_t count) {
    if (memory.size() < count) memory.resize(count);
  };
  grow(scratch.leaves, size_t(leaf_floats_ * tile_));
  grow(scratch.values, size_t(spec_.floats));
  grow(scratch.results, size_t(own_->dim * tile_));
  grow(scratch.ids, size_t(std::max(ids_, int64_t(1)) * tile_));
  grow(scratch.tasks, spec_.lookups.size());
  grow(scratch.spaces, leaves + kFirstLeaf);
  float** spaces = scratch.spaces.data();
  spaces[kScratch] = scratch.values.data();
  // Operands in weights are only read: check() sees to it.
  spaces[kWeights] = reinterpret_cast<float*>(const_cast<std::byte*>(own_->base.load(std::memory_order_acquire)));
  const kernels::StepKernel kernel = kernels::step_kernel();
  int64_t bytes_read = 0;
  for (int64_t first = 0; first < task.batch; first += tile_) {
    const int64_t samples = std::min(tile_, task.batch - first);
    if (!look_up(task, scratch, first, samples, bytes_read)) return;
    unpack(task, scratch, first, samples);
    for (size_t leaf = 0; leaf < leaves; ++leaf) spaces[kFirstLeaf + leaf] = scratch.leaves.data() + leaf_begin_[leaf] * tile_;
    if (spec_.external != nullptr) {
      if (!spec_.external({spaces + kFirstLeaf, leaf_sizes_.data(), leaves, samples, scratch.results.data(), own_->dim})) {
        task.reason = Reason::program_failed;
        task.bag = first;
        return;
      }
      store(task, scratch, first, samples);
      continue;
    }
    for (int64_t b = 0; b < samples; ++b) {
      spaces[kResult] = scratch.results.data() + b * own_->dim;
      for (const Step& step : spec_.steps) kernel(step, spaces);
      for (size_t leaf = 0; leaf < leaves; ++leaf) spaces[kFirstLeaf + leaf] += leaf_sizes_[leaf];
    }
    store(task, scratch, first, samples);
  }
  // What counters multiply: the mean over the tables that it read.
  if (task.rows_read > 0) task.row_bytes = bytes_read / task.rows_read;
}

}  // namespace sidepool
