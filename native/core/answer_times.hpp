// How long sidecars take to answer, by sidecar and size: what a lookup can still expect in its time, and what is network delay.
//
// Shared by all threads that look up: relaxed atomics, since an estimate only steers.
#pragma once
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>

namespace sidepool {

class AnswerTimes {
 public:
  explicit AnswerTimes(size_t sidecars) : cells_(new Cell[sidecars * kSizes]) {}

  // What an answer of so many bytes takes when it comes soon, from the request's leaving to being read; 0: not known.
  uint64_t expected_ns(int32_t sidecar, uint64_t bytes) const {
    const Cell& c = cell(sidecar, bytes);
    return c.answers.load(std::memory_order_relaxed) < kWarm ? 0 : c.usual_ns.load(std::memory_order_relaxed);
  }

  // One came. A quick one says at once what is possible, a slow one little by little: stalls are no rule, and first ones meet
  // cold memory.
  void answered(int32_t sidecar, uint64_t bytes, uint64_t ns) {
    Cell& c = cell(sidecar, bytes);
    const uint32_t answers = c.answers.load(std::memory_order_relaxed);
    const uint64_t before = c.usual_ns.load(std::memory_order_relaxed);
    if (answers < kWarm) c.answers.store(answers + 1, std::memory_order_relaxed);
    if (answers == 0 || ns < before)
      c.usual_ns.store(answers == 0 ? ns : (before + ns) / 2, std::memory_order_relaxed);
    else if (answers >= kWarm)
      c.usual_ns.store(before + (ns < 4 * before ? ns - before : 3 * before) / 8, std::memory_order_relaxed);
  }

  // Something was given up because of the estimate; it sinks, so that a wrong one cannot give up everything for ever.
  void doubt(int32_t sidecar, uint64_t bytes) {
    std::atomic<uint64_t>& usual = cell(sidecar, bytes).usual_ns;
    const uint64_t before = usual.load(std::memory_order_relaxed);
    usual.store(before - before / 32, std::memory_order_relaxed);
  }

  // Takes note of what an answer spent outside the sidecar, and returns the least of its kind in the last kEraNs to twice that.
  uint64_t least_delay_ns(int32_t sidecar, uint64_t bytes, uint64_t delay_ns, uint64_t now_ns) {
    Cell& c = cell(sidecar, bytes);
    const uint64_t era = now_ns / kEraNs + 1;
    uint64_t last = c.era.load(std::memory_order_relaxed);
    if (last != era && c.era.compare_exchange_strong(last, era, std::memory_order_relaxed)) {
      c.before_ns.store(last + 1 == era ? c.least_ns.load(std::memory_order_relaxed) : UINT64_MAX, std::memory_order_relaxed);
      c.least_ns.store(delay_ns, std::memory_order_relaxed);
    }
    uint64_t least = c.least_ns.load(std::memory_order_relaxed);
    if (delay_ns < least) c.least_ns.store(least = delay_ns, std::memory_order_relaxed);
    const uint64_t before = c.before_ns.load(std::memory_order_relaxed);
    return before < least ? before : least;
  }

 private:
  // A path that has become longer is known as such after a minute; congestion seldom lasts so long without a gap.
  static constexpr uint64_t kEraNs = 30'000'000'000;
  static constexpr uint32_t kWarm = 8;
  // Powers of two: an answer's own time on the wire is part of its least delay.
  static constexpr size_t kSizes = 32;

  struct Cell {
    std::atomic<uint32_t> answers{0};  // up to kWarm
    std::atomic<uint64_t> usual_ns{0};
    std::atomic<uint64_t> era{0}, least_ns{UINT64_MAX}, before_ns{UINT64_MAX};
  };
  Cell& cell(int32_t sidecar, uint64_t bytes) const {
    const size_t size = size_t(std::bit_width(bytes));
    return cells_[size_t(sidecar) * kSizes + (size < kSizes ? size : kSizes - 1)];
  }

  std::unique_ptr<Cell[]> cells_;
};

}  // namespace sidepool
