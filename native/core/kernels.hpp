// The seam between pooling.cpp and the kernels compiled once per SIMD level. Internal to the core.
//
// Plain data and internal linkage only: these files are compiled with wider instruction sets than the rest, so an
// inline function with external linkage could leave its AVX-512 copy for the whole program to call.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tables.hpp"

namespace sidepool::kernels {

// One call of pool_feature: what to pool (set by the caller) and how it ended (set by the kernel).
struct Task {
  const std::byte* base;
  int64_t rows;
  int64_t row_bytes;
  int64_t dim;
  int64_t default_row;
  const int64_t* values;
  int64_t value_count;
  const int32_t* lengths;
  const float* weights;
  float* out;
  int64_t out_stride;
  int32_t fixed_length;
  int32_t batch;
  RowFormat format;
  OutOfRange policy;
  Pooling pooling;

  Reason reason;  // none: the whole feature was pooled
  int64_t bag;
  int64_t value;
  int64_t first_bad_id;  // valid where out_of_range > 0 under policy `error`
  int64_t rows_read;
  int64_t out_of_range;
};

using PoolKernel = void (*)(Task&);

void pool_scalar(Task& task);
#if defined(__x86_64__)
void pool_avx2(Task& task);
void pool_avx512(Task& task);
#elif defined(__aarch64__)
void pool_neon(Task& task);
#endif

// The address of the row that stands for an id outside the table, or null where none does; counts it.
const std::byte* stand_in_row(Task& task, int64_t id);

// How many rows lie between the start of a row's fetch and its use: enough to cover the memory's latency, and no more
// bytes than leave room for the output in a 32 KiB L1 cache. Random ids over 26 tables of 200,000 rows of 256 bytes,
// 128 bags of 20: 16 rows 679 µs, 32 rows 551 µs, 64 rows 565 µs, 128 rows 604 µs (Zen 5, one thread, memory-bound).
constexpr int64_t kMaxRowsAhead = 32;
constexpr int64_t kMinRowsAhead = 4;
constexpr int64_t kBytesAhead = 16 << 10;
// Past this many lines the hardware's own prefetcher has caught on to a row.
constexpr int64_t kMaxLinesPerRow = 16;
constexpr int64_t kLineBytes = 64;

static inline int64_t rows_ahead(int64_t row_bytes) {
  int64_t rows = kMaxRowsAhead;
  while (rows > kMinRowsAhead && rows * row_bytes > kBytesAhead) rows /= 2;
  return rows;
}

// Cache lines to fetch per row; a row that does not start on a line may touch one more.
static inline int64_t lines_per_row(const std::byte* base, int64_t row_bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % kLineBytes == 0 && row_bytes % kLineBytes == 0;
  const int64_t lines = (row_bytes + kLineBytes - 1) / kLineBytes + (aligned ? 0 : 1);
  return lines < kMaxLinesPerRow ? lines : kMaxLinesPerRow;
}

static inline void prefetch_row(const std::byte* row, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + uintptr_t(i * kLineBytes)));
  }
}

}  // namespace sidepool::kernels
