// Counters that one thread writes and any thread may read.
#pragma once
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "lines.hpp"

namespace sidepool {

// A count with a single writer: a plain load and store, no locked instruction.
class Counter {
 public:
  void add(int64_t n = 1) { value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed); }
  void set(int64_t n) { value_.store(n, std::memory_order_relaxed); }
  int64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

class TopRows;
using TableSums = std::array<int64_t, 5>;

struct alignas(kCacheLine) TableCounters {
  Counter lookups, rows, bytes, out_of_range, bags;
  std::shared_ptr<TopRows> top;  // null: not sampled
  void add(const TableCounters& other) {
    lookups.add(other.lookups.get());
    rows.add(other.rows.get());
    bytes.add(other.bytes.get());
    out_of_range.add(other.out_of_range.get());
    bags.add(other.bags.get());
  }
  void add_to(TableSums& sums) const {
    sums[0] += lookups.get();
    sums[1] += rows.get();
    sums[2] += bytes.get();
    sums[3] += out_of_range.get();
    sums[4] += bags.get();
  }
};

// Powers of two in microseconds: bucket i counts durations below 2^i µs, the last one everything above.
class Histogram {
 public:
  static constexpr size_t kBuckets = 24;  // the last bound is 4.2 s, beyond any sensible deadline
  void record_ns(uint64_t ns) {
    const uint64_t us = ns / 1000;
    const size_t bucket = size_t(std::bit_width(us));
    counts_[bucket < kBuckets ? bucket : kBuckets - 1].add();
    sum_us_.add(int64_t(us));
  }
  int64_t count(size_t bucket) const { return counts_[bucket].get(); }
  int64_t sum_us() const { return sum_us_.get(); }

 private:
  std::array<Counter, kBuckets> counts_;
  Counter sum_us_;
};

}  // namespace sidepool
