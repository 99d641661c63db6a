// Which rows of a table are asked for most: a sample of the ids, in a space-saving summary.
#pragma once
#include <array>
#include <cstdint>
#include <map>

#include "counters.hpp"

namespace sidepool {

// Written by one thread, read by any. The summary is Metwally, Agrawal and El Abbadi's (ICDT 2005): a row that is not in it
// takes the place of the least counted one and its count, so no row that makes up more than 1/kRows of the sample is
// missing, and no count is too small.
class alignas(kCacheLine) TopRows {
 public:
  // 64 rows find what takes more than 1.6 % of a table's ids; one in 61 ids is looked at (a prime, so that no batch size
  // shows it the same places only), which costs a third of a nanosecond per id.
  static constexpr size_t kRows = 64;
  static constexpr int64_t kEvery = 61;

  // Ids in memory that a peer may write: each is read once.
  void sample(const int64_t* ids, int64_t count, int64_t rows) {
    for (; next_ < count; next_ += kEvery) {
      const int64_t id = __atomic_load_n(ids + next_, __ATOMIC_RELAXED);
      if (id >= 0 && id < rows) add(id);
    }
    next_ -= count;
  }

  // Adds sampled ids per row.
  void read(std::map<int64_t, int64_t>& counts) const {
    for (size_t i = 0; i < kRows; ++i)
      if (const int64_t n = counts_[i].get(); n > 0) counts[rows_[i].get()] += n;
  }

 private:
  void add(int64_t row) {
    size_t least = 0;
    for (size_t i = 0; i < kRows; ++i) {
      if (counts_[i].get() > 0 && rows_[i].get() == row) return counts_[i].add();
      if (counts_[i].get() < counts_[least].get()) least = i;
    }
    rows_[least].set(row);
    counts_[least].add();
  }

  int64_t next_ = 0;
  std::array<Counter, kRows> rows_, counts_;
};

}  // namespace sidepool
