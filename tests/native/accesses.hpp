// Which thread touches which cache line, of code compiled for the thread sanitizer: its hooks are answered by accesses.cpp instead.
#pragma once
#include <cstdint>
#include <vector>

namespace accesses {

// Threads that say so are callers; all others are engines.
void this_thread_calls();
void start();
void stop();

struct Shared {
  uintptr_t line = 0;         // its address
  uint32_t wrote = 0, read = 0;  // a bit per thread
  void* writer = nullptr;        // code that wrote it last
};
// Lines that one engine wrote, and another touched, between start and stop.
std::vector<Shared> shared_by_engines();
// Lines that an engine touched at all: none, and nothing was recorded.
int64_t touched_by_engines();

}  // namespace accesses
