// Hooks that GCC and Clang call before each access of code compiled with -fsanitize=thread, defined here so that they count. This
// file is compiled without it; the sanitizer's own library is there, but never asked about a race.
#include "accesses.hpp"

#include <atomic>
#include <bit>
#include <cstddef>

namespace accesses {
namespace {

constexpr uintptr_t kLine = 64;
constexpr size_t kLines = 1 << 20;

struct Line {
  std::atomic<uintptr_t> address{0};
  std::atomic<uint32_t> wrote{0}, read{0};
  std::atomic<void*> writer{nullptr};
};
Line lines[kLines];
std::atomic<bool> recording{false};
std::atomic<uint32_t> threads{0}, callers{0};

uint32_t my_bit() {
  static thread_local uint32_t bit = 0;
  if (bit == 0) bit = 1u << (threads.fetch_add(1, std::memory_order_relaxed) % 32);
  return bit;
}

void record(uintptr_t line, void* writer) {
  const uint32_t bit = my_bit();
  for (size_t i = (line / kLine) * 0x9e3779b97f4a7c15ull >> 44;; i = (i + 1) % kLines) {
    uintptr_t there = lines[i].address.load(std::memory_order_relaxed);
    if (there == 0 && lines[i].address.compare_exchange_strong(there, line, std::memory_order_relaxed)) there = line;
    if (there != line) continue;
    std::atomic<uint32_t>& bits = writer ? lines[i].wrote : lines[i].read;
    if (writer != nullptr) lines[i].writer.store(writer, std::memory_order_relaxed);
    if ((bits.load(std::memory_order_relaxed) & bit) == 0) bits.fetch_or(bit, std::memory_order_relaxed);
    return;
  }
}

// `write`: false, or nothing for the code's own address.
inline __attribute__((always_inline)) void touch(const volatile void* address, size_t bytes, bool write) {
  if (!recording.load(std::memory_order_relaxed)) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t line = first & ~(kLine - 1); line < first + bytes; line += kLine) record(line, write ? __builtin_return_address(0) : nullptr);
}

template <class Visit>
void visit(Visit seen) {
  const uint32_t engines = ~callers.load();
  for (const Line& line : lines) {
    const uint32_t wrote = line.wrote.load() & engines, read = line.read.load() & engines;
    if (wrote | read) seen(Shared{line.address.load(), wrote, read, line.writer.load()});
  }
}

}  // namespace

void this_thread_calls() { callers.fetch_or(my_bit()); }

void start() {
  for (Line& line : lines) {
    line.address.store(0);
    line.wrote.store(0);
    line.read.store(0);
  }
  recording.store(true);
}

void stop() { recording.store(false); }

std::vector<Shared> shared_by_engines() {
  std::vector<Shared> found;
  visit([&found](const Shared& line) {
    if (line.wrote != 0 && std::popcount(line.wrote | line.read) > 1) found.push_back(line);
  });
  return found;
}

int64_t touched_by_engines() {
  int64_t count = 0;
  visit([&count](const Shared&) { ++count; });
  return count;
}

}  // namespace accesses

// The compiler knows these names with types of its own, hence the labels.
#define HOOK(name, result, ...) extern "C" __attribute__((visibility("default"))) result hook_##name(__VA_ARGS__) __asm__("__tsan_" #name); \
  result hook_##name(__VA_ARGS__)

HOOK(func_entry, void, void*) {}
HOOK(func_exit, void, void) {}
HOOK(vptr_update, void, void** at, void*) { accesses::touch(at, sizeof *at, true); }
HOOK(vptr_read, void, void** at) { accesses::touch(at, sizeof *at, false); }
HOOK(read_range, void, void* at, size_t bytes) { accesses::touch(at, bytes, false); }
HOOK(write_range, void, void* at, size_t bytes) { accesses::touch(at, bytes, true); }

#define PLAIN(bytes)                                                               \
  HOOK(read##bytes, void, void* at) { accesses::touch(at, bytes, false); }          \
  HOOK(write##bytes, void, void* at) { accesses::touch(at, bytes, true); }          \
  HOOK(unaligned_read##bytes, void, void* at) { accesses::touch(at, bytes, false); } \
  HOOK(unaligned_write##bytes, void, void* at) { accesses::touch(at, bytes, true); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)

// Whatever order is asked for, the strictest will do.
#define CHANGE(bits, name, operation)                                      \
  HOOK(atomic##bits##_##name, uint##bits##_t, volatile uint##bits##_t* at, uint##bits##_t value, int) { \
    accesses::touch(at, bits / 8, true);                                    \
    return operation(at, value, __ATOMIC_SEQ_CST);                          \
  }
#define COMPARE(bits, name)                                                                                              \
  HOOK(atomic##bits##_##name, bool, volatile uint##bits##_t* at, uint##bits##_t* expected, uint##bits##_t value, int, int) { \
    accesses::touch(at, bits / 8, true);                                                                                  \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                    \
  }
#define ATOMIC(bits)                                                              \
  HOOK(atomic##bits##_load, uint##bits##_t, const volatile uint##bits##_t* at, int) { \
    accesses::touch(at, bits / 8, false);                                          \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                  \
  }                                                                               \
  HOOK(atomic##bits##_store, void, volatile uint##bits##_t* at, uint##bits##_t value, int) { \
    accesses::touch(at, bits / 8, true);                                           \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                 \
  }                                                                               \
  CHANGE(bits, exchange, __atomic_exchange_n)                                     \
  CHANGE(bits, fetch_add, __atomic_fetch_add)                                     \
  CHANGE(bits, fetch_sub, __atomic_fetch_sub)                                     \
  CHANGE(bits, fetch_and, __atomic_fetch_and)                                     \
  CHANGE(bits, fetch_or, __atomic_fetch_or)                                       \
  CHANGE(bits, fetch_xor, __atomic_fetch_xor)                                     \
  COMPARE(bits, compare_exchange_strong)                                          \
  COMPARE(bits, compare_exchange_weak)
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)

HOOK(atomic_thread_fence, void, int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
HOOK(atomic_signal_fence, void, int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// The library sees none of the above, and would take everything else for a race.
extern "C" const char* __tsan_default_options() { return "report_bugs=0"; }
