// Which kernel pools a feature, and what an id outside its table stands for.
#include "pooling.hpp"

#include <algorithm>
#include <atomic>
#include <fstream>

#include "kernels.hpp"
#include "lookahead.hpp"
#include "program_kernels.hpp"

// Builds that look for races need no more than one level.
#if defined(__x86_64__) && !defined(SIDEPOOL_SCALAR)
#define SIDEPOOL_AVX
#include <cpuid.h>
#endif

namespace sidepool {
namespace {

struct Level {
  const char* name;
  bool (*runs_here)();
  kernels::PoolKernel pool;
  kernels::StepKernel step;
};

#ifdef SIDEPOOL_AVX
// Not every compiler that we support knows "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Best first.
constexpr Level kLevels[] = {
#ifdef SIDEPOOL_AVX
    {"avx512", has_avx512, kernels::pool_avx512, kernels::step_avx512},
    {"avx2", has_avx2, kernels::pool_avx2, kernels::step_avx2},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, kernels::pool_neon, kernels::step_scalar},
#endif
    {"scalar", [] { return true; }, kernels::pool_scalar, kernels::step_scalar},
};

std::atomic<const Level*> level_in_use{nullptr};

// Threads that meet here for the first time detect the same level: no lock is needed.
const Level& current_level() {
  const Level* level = level_in_use.load(std::memory_order_acquire);
  if (level != nullptr) [[likely]]
    return *level;
  const Level* best = kLevels;
  while (!best->runs_here()) ++best;
  level_in_use.compare_exchange_strong(level, best, std::memory_order_acq_rel);
  return *level_in_use.load(std::memory_order_acquire);
}

}  // namespace

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014), then the remainder. Rows are what models were trained with:
// never change it.
int64_t hashed_row(int64_t id, int64_t rows) {
  uint64_t h = uint64_t(id) + 0x9e3779b97f4a7c15;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
  h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
  h ^= h >> 31;
  return int64_t(h % uint64_t(rows));
}

const std::byte* kernels::stand_in_row(PoolTask& task, int64_t id) {
  // Padding: a row of the table, or the number of rows; kNoPadding is an id out of range like any other.
  if (id == task.padding_index && id != kNoPadding) return nullptr;
  ++task.out_of_range;
  switch (task.policy) {
    case OutOfRange::error:
      task.reason = Reason::id_out_of_range;
      task.value = id;
      return nullptr;
    case OutOfRange::zero:
      return nullptr;
    case OutOfRange::default_row:
      return task.base + task.default_row * task.row_bytes;
    case OutOfRange::hash:
      return task.base + hashed_row(id, task.rows) * task.row_bytes;
  }
  return nullptr;
}

PoolTask pool_task(const Table& table, Pooling pooling, const BagInput& input, void* out, int64_t out_stride,
                   OutputFormat output, int64_t padding_index) {
  PoolTask task{};
  task.program = table.program;
  // A lookahead passes over what has no rows.
  task.base = table.program != nullptr ? nullptr : table.base.load(std::memory_order_acquire);
  task.rows = table.rows;
  task.row_bytes = int64_t(row_bytes(table.format, table.dim));
  task.dim = table.dim;
  task.default_row = table.default_row;
  task.padding_index = pooling == Pooling::none ? kNoPadding : padding_index;
  task.values = input.values;
  task.value_count = input.value_count;
  task.lengths = input.lengths;
  task.weights = input.weights;
  task.out = static_cast<std::byte*>(out);
  task.out_stride_bytes = out_stride * int64_t(value_bytes(output));
  task.fixed_length = input.fixed_length;
  task.batch = input.batch;
  task.row_lines = row_lines(task.base, task.row_bytes);
  const int32_t chosen = table.rows_ahead.load(std::memory_order_relaxed);
  task.rows_ahead = chosen > 0 ? chosen : rows_ahead(task.row_lines);
  task.format = table.format;
  task.policy = table.policy;
  task.pooling = pooling;
  task.output = output;
  return task;
}

Fault pool(PoolTask& task, Lookahead& ahead, PoolCounts& counts) {
  if (task.program != nullptr) {
    task.program->run(task);
  } else if (task.base != nullptr) {
    current_level().pool(task, ahead);
  }
#if defined(__x86_64__)
  // Streamed stores are weakly ordered: whoever is told that the task is done must see them.
  if (task.streamed) __builtin_ia32_sfence();
#endif
  counts.rows_read += task.rows_read;
  counts.out_of_range += task.out_of_range;
  return fault_of(task);
}

Fault fault_of(const PoolTask& task) {
  Fault fault;
  if (task.base == nullptr && task.program == nullptr) fault.status = Status::internal;
  if (task.reason != Reason::none) {
    fault.status = task.reason == Reason::program_failed ? Status::internal : Status::rejected;
    fault.reason = task.reason;
    fault.bag = task.bag;
    fault.value = task.value;
  }
  return fault;
}

size_t last_level_cache_bytes() {
  size_t largest = 0;
  for (int index = 0;; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    size_t kib = 0;
    if (!(file >> kib)) break;  // "32768K"
    largest = std::max(largest, kib << 10);
  }
  return largest > 0 ? largest : size_t(32) << 20;
}

void stream_results(PoolTask* tasks, size_t count, size_t bytes, size_t cache_bytes) {
  if (bytes <= cache_bytes) return;
  for (PoolTask* task = tasks; task < tasks + count; ++task) {
    const bool whole_lines = reinterpret_cast<uintptr_t>(task->out) % kernels::kLineBytes == 0 &&
                             task->out_stride_bytes % kernels::kLineBytes == 0 && task->dim * 4 % kernels::kLineBytes == 0;
    task->streamed = whole_lines && task->output == OutputFormat::fp32;
  }
}

Fault pool_feature(const Table& table, Pooling pooling, const BagInput& input, void* out, int64_t out_stride,
                   PoolCounts& counts, OutputFormat output, int64_t padding_index) {
  PoolTask task = pool_task(table, pooling, input, out, out_stride, output, padding_index);
  Lookahead ahead(&task, 1);
  return pool(task, ahead, counts);
}

kernels::StepKernel kernels::step_kernel() { return current_level().step; }

std::string simd_level() { return current_level().name; }

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.runs_here()) names.emplace_back(level.name);
  }
  return names;
}

void force_simd_level(const std::string& name) {
  std::string allowed;
  for (const Level& level : kLevels) {
    if (!level.runs_here()) continue;
    if (name == level.name) return level_in_use.store(&level, std::memory_order_release);
    allowed += (allowed.empty() ? "" : ", ") + std::string(level.name);
  }
  throw Error(Status::plan, "SIMD level: found '" + name + "'; allowed on this machine: " + allowed);
}

}  // namespace sidepool
