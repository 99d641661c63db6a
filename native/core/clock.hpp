// Time, pausing and futexes.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace sidepool {

inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000ull + uint64_t(t.tv_nsec);
}

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting for a thread that is about to finish: pauses, and after some tens of microseconds lends it the core that it may
// have lost. `waited` counts, from 0.
inline void pause_or_yield(int& waited) {
  if (++waited < 1000) {
    cpu_pause();
  } else {
    sched_yield();
  }
}

// Wait until `word` differs from `expected`, is woken, or the absolute monotonic time has come. The word may lie in
// memory shared with another process.
inline void futex_wait_until(const std::atomic<uint32_t>& word, uint32_t expected, uint64_t deadline_ns) {
  timespec t{time_t(deadline_ns / 1'000'000'000ull), long(deadline_ns % 1'000'000'000ull)};
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT_BITSET, expected, &t, nullptr,
          FUTEX_BITSET_MATCH_ANY);
}

inline void futex_wake(const std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE, count, nullptr, nullptr, 0);
}

}  // namespace sidepool
