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

// Who waits on a futex: threads of this process, whom the kernel finds by the address alone, or those of others too.
enum class Waiters : int { here = FUTEX_PRIVATE_FLAG, anywhere = 0 };

// Wait until `word` differs from `expected`, is woken, or the absolute monotonic time has come.
inline void futex_wait_until(const std::atomic<uint32_t>& word, uint32_t expected, uint64_t deadline_ns, Waiters waiters = Waiters::here) {
  timespec t{time_t(deadline_ns / 1'000'000'000ull), long(deadline_ns % 1'000'000'000ull)};
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT_BITSET | int(waiters), expected, &t, nullptr,
          FUTEX_BITSET_MATCH_ANY);
}

inline void futex_wake(const std::atomic<uint32_t>& word, int count, Waiters waiters = Waiters::here) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE | int(waiters), count, nullptr, nullptr, 0);
}

}  // namespace sidepool
