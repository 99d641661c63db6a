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

// The address of the row that stands for an id outside the table, or null where none does; counts it.
const std::byte* stand_in_row(PoolTask& task, int64_t id);

constexpr int64_t kLineBytes = 64;

// Fetches cache lines upwards, four instructions a turn: one instruction that walks a row line by line teaches the
// hardware's stride prefetcher to run on past the row (Zen 5, rows of 4 lines: 817 µs for what takes 520). Inlined by
// force: GCC takes a function that only prefetches for one without effect and drops its calls.
[[gnu::always_inline]] static inline void prefetch_row(const std::byte* row, int64_t lines) {
  const auto fetch = [row](int64_t line) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + uintptr_t(line * kLineBytes)));
  };
  int64_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    fetch(i);
    fetch(i + 1);
    fetch(i + 2);
    fetch(i + 3);
  }
  if (lines & 2) {
    fetch(i);
    fetch(i + 1);
    i += 2;
  }
  if (lines & 1) fetch(i);
}

}  // namespace sidepool::kernels
