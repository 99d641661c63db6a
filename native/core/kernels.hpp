// The seam between pooling.cpp and the kernels compiled once per SIMD level. Internal to the core.
//
// Plain data and internal linkage only: these files are compiled with wider instruction sets than the rest, so an
// inline function with external linkage could leave its AVX-512 copy for the whole program to call.
#pragma once
#include <cstddef>
#include <cstdint>

#include "pooling.hpp"

namespace sidepool::kernels {

using PoolKernel = void (*)(PoolTask&, Lookahead&);

void pool_scalar(PoolTask& task, Lookahead& ahead);
#if defined(__x86_64__)
void pool_avx2(PoolTask& task, Lookahead& ahead);
void pool_avx512(PoolTask& task, Lookahead& ahead);
#elif defined(__aarch64__)
void pool_neon(PoolTask& task, Lookahead& ahead);
#endif

// For an id that is padding or outside the table: the address of the row that stands for it, or null where none does,
// with task.reason set where the id is refused. Counts ids outside the table.
const std::byte* stand_in_row(PoolTask& task, int64_t id);

constexpr int64_t kLineBytes = 64;

// Fetches 1 to kMaxLinesPerRow cache lines upwards, every line of a row by an instruction of its own: one that steps
// through a row teaches the hardware's stride prefetcher to run on past it (Zen 5, rows of 4 lines: 817 µs for what
// takes 520; of 8 lines: 740 for 490). Inlined by force: GCC takes a function that only prefetches for one without
// effect and drops its calls.
[[gnu::always_inline]] static inline void prefetch_row(const std::byte* row, int64_t lines) {
  uintptr_t line = reinterpret_cast<uintptr_t>(row);
  const auto fetch = [&line](int64_t i) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const void*>(line + uintptr_t(i * kLineBytes)));
  };
  const auto fetch_two = [&](int64_t i) __attribute__((always_inline)) {
    fetch(i);
    fetch(i + 1);
  };
  const auto fetch_four = [&](int64_t i) __attribute__((always_inline)) {
    fetch_two(i);
    fetch_two(i + 2);
  };
  if (lines & 16) {
    fetch_four(0);
    fetch_four(4);
    fetch_four(8);
    fetch_four(12);
    line += 16 * kLineBytes;
  }
  if (lines & 8) {
    fetch_four(0);
    fetch_four(4);
    line += 8 * kLineBytes;
  }
  if (lines & 4) {
    fetch_four(0);
    line += 4 * kLineBytes;
  }
  if (lines & 2) {
    fetch_two(0);
    line += 2 * kLineBytes;
  }
  if (lines & 1) fetch(0);
}

}  // namespace sidepool::kernels
