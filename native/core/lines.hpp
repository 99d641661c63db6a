// Memory on cache lines of its own: what an engine writes for every subrequest must not share a line with what is another's.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace sidepool {

constexpr size_t kCacheLine = 64;

template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(whole(n), std::align_val_t(kCacheLine))); }
  void deallocate(T* memory, size_t n) noexcept { ::operator delete(memory, whole(n), std::align_val_t(kCacheLine)); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }

 private:
  static size_t whole(size_t n) { return (n * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine; }
};

template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

}  // namespace sidepool
