#include "lookahead.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>

#include "clock.hpp"
#include "kernels.hpp"
#include "pooling.hpp"
#include "table_memory.hpp"

namespace sidepool {
namespace {

constexpr int64_t kMinRowsAhead = 4;
constexpr int64_t kMaxRowsAhead = 128;
// Past this many lines the hardware's own prefetcher has caught on to a row.
constexpr int64_t kMaxLinesPerRow = 16;

// Around the constant: half of it, and up to what fills the L1 caches of present servers (32 and 48 KiB).
constexpr int64_t kCandidates[] = {kLookaheadBytes, 6 << 10, 20 << 10, 32 << 10};
// Beyond the level-2 cache and most of a virtual machine's share of the last-level one, yet usually touched within 20 ms. A
// virtual machine whose host has yet to find the memory takes far longer: half of the time is spent on it at most, and too
// little of it measures only caches.
constexpr size_t kScratchBytes = size_t(64) << 20;
constexpr size_t kLeastScratchBytes = size_t(16) << 20;
// Rows of one timing: a few tens of microseconds, so that interruptions hit few of them and medians pass them over.
constexpr int64_t kTimedBytes = 512 << 10;
constexpr int64_t kBagIds = 20;
constexpr int kMaxRounds = 25;
constexpr int kMinRounds = 5;
// What a candidate must save. Medians of equal candidates differ by up to 3 % on a quiet virtual machine.
constexpr double kGain = 0.95;

struct Scratch {
  size_t bytes = kScratchBytes;
  std::byte* memory;
  size_t touched = 0;
  explicit Scratch(uint64_t until_ns) {
    int unused = 0;
    memory = map_rows(bytes, {}, unused);
    // Pages that were only read would all be the one page of zeros.
    for (; touched < bytes && now_ns() < until_ns; touched += 4096) memory[touched] = std::byte(1);
  }
  ~Scratch() { munmap(memory, bytes); }
};

// Times one kind of rows with each candidate in turn.
class Race {
 public:
  Race(const RowKind& kind, const Scratch& scratch) : row_bytes_(int64_t(row_bytes(kind.format, kind.dim))) {
    table_.base.store(scratch.memory);
    table_.rows = int64_t(scratch.touched) / row_bytes_;
    table_.dim = kind.dim;
    table_.format = kind.format;
    bags_ = std::clamp(kTimedBytes / row_bytes_ / kBagIds, int64_t(4), int64_t(128));
    ids_.resize(size_t(bags_ * kBagIds));
    out_.resize(size_t(bags_ * kind.dim));
    for (const int64_t bytes : kCandidates) {
      const int32_t rows = rows_ahead(row_lines(scratch.memory, row_bytes_), bytes);
      const auto same = [rows](const Lane& lane) { return lane.rows == rows; };
      if (std::none_of(lanes_.begin(), lanes_.end(), same)) lanes_.push_back({rows, {}});
    }
  }

  // The winner, the first candidate unless another is faster beyond noise.
  int32_t run(uint64_t until_ns) {
    time(lanes_[0].rows);  // the first one warms up
    for (int round = 0; round < kMaxRounds && (round < kMinRounds || now_ns() < until_ns); ++round) {
      for (size_t i = 0; i < lanes_.size(); ++i) {
        Lane& lane = lanes_[(i + size_t(round)) % lanes_.size()];
        lane.times.push_back(time(lane.rows));
      }
    }
    const Lane* best = &lanes_[0];
    for (Lane& lane : lanes_) {
      if (median(lane) < median(*best)) best = &lane;
    }
    return double(median(*best)) < kGain * double(median(lanes_[0])) ? best->rows : lanes_[0].rows;
  }

 private:
  struct Lane {
    int32_t rows;
    std::vector<uint64_t> times;
  };

  static uint64_t median(const Lane& lane) {
    std::vector<uint64_t> sorted = lane.times;
    std::nth_element(sorted.begin(), sorted.begin() + ptrdiff_t(sorted.size() / 2), sorted.end());
    return sorted[sorted.size() / 2];
  }

  uint64_t time(int32_t rows) {
    for (int64_t& id : ids_) id = int64_t(random_() % uint64_t(table_.rows));
    table_.rows_ahead.store(rows, std::memory_order_relaxed);
    BagInput input;
    input.values = ids_.data();
    input.value_count = int64_t(ids_.size());
    input.fixed_length = int32_t(kBagIds);
    input.batch = int32_t(bags_);
    PoolCounts counts;
    const uint64_t start = now_ns();
    pool_feature(table_, Pooling::sum, input, out_.data(), table_.dim, counts);
    return now_ns() - start;
  }

  const int64_t row_bytes_;
  Table table_;
  int64_t bags_;
  std::vector<int64_t> ids_;
  std::vector<float> out_;
  std::vector<Lane> lanes_;
  std::mt19937_64 random_{1};
};

}  // namespace

// Rows begin `step` bytes apart within a line: the largest power of two that divides both.
int32_t row_lines(const std::byte* base, int64_t row_bytes) {
  const int64_t step = (row_bytes | kernels::kLineBytes) & -(row_bytes | kernels::kLineBytes);
  const int64_t last_begin = kernels::kLineBytes - step + int64_t(reinterpret_cast<uintptr_t>(base) & uintptr_t(step - 1));
  const int64_t lines = (last_begin + row_bytes + kernels::kLineBytes - 1) / kernels::kLineBytes;
  return int32_t(std::clamp(lines, int64_t(1), kMaxLinesPerRow));
}

int32_t rows_ahead(int64_t row_lines, int64_t bytes) {
  return int32_t(std::clamp(bytes / (row_lines * kernels::kLineBytes), kMinRowsAhead, kMaxRowsAhead));
}

void measure_lookahead(std::vector<RowKind>& kinds, uint64_t budget_ns) {
  const uint64_t start = now_ns(), end = start + budget_ns;
  for (RowKind& kind : kinds) kind.rows_ahead = rows_ahead(row_lines(nullptr, int64_t(row_bytes(kind.format, kind.dim))));
  const Scratch scratch(start + budget_ns / 2);
  if (scratch.touched < kLeastScratchBytes) return;
  for (size_t i = 0; i < kinds.size(); ++i) {
    const uint64_t now = now_ns();
    if (now >= end) return;
    kinds[i].rows_ahead = Race(kinds[i], scratch).run(now + (end - now) / (kinds.size() - i));
  }
}

}  // namespace sidepool
