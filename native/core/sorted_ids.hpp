// The ids of features whose rows are cut: settled, and sorted by the shard that holds them.
#pragma once
#include <cstdint>
#include <vector>

#include "part.hpp"
#include "routes.hpp"

namespace sidepool {

// Of one lookup: every sorted leg of every part becomes a jagged feature of its own. Reused: memory grows to the largest
// lookup and stays. One thread.
class SortedIds {
 public:
  void reset(const Routes& routes, size_t parts);
  // Sorts all sorted bands of a part that passed its checks. `value_begin`: first value of each feature (jagged parts).
  void sort(size_t p, const Part& part, int64_t batch, const int64_t* value_begin);

  // Ids per bag `[batch]` of a sorted leg, and its first id; rows count from the shard's first.
  const int32_t* lengths(size_t p, int32_t leg) const { return &lengths_[lengths_at_[p] + size_t(leg) * size_t(batches_[p])]; }
  const int64_t* values(size_t p, int32_t leg) const { return values_.data() + begin(p, leg); }
  const float* weights(size_t p, int32_t leg) const { return weights_.data() + begin(p, leg); }
  // Where each id was among those of its feature in the part.
  const int64_t* places(size_t p, int32_t leg) const { return places_.data() + begin(p, leg); }
  uint64_t count(size_t p, int32_t leg) const { return begin_[p * (legs_ + 1) + size_t(leg) + 1] - begin(p, leg); }
  // Whether ids of a sorted band stand for no row.
  bool dropped(size_t p, int32_t band) const { return dropped_[p * bands_ + size_t(band)] != 0; }
  // Ids outside their tables, over all parts.
  int64_t out_of_range() const { return out_of_range_; }

 private:
  size_t begin(size_t p, int32_t leg) const { return begin_[p * (legs_ + 1) + size_t(leg)]; }
  template <class Id>
  void sort_band(size_t p, const Band& band, const Part& part, const Id* ids, int64_t first_value);
  // The row that an id stands for, -1 for none.
  int64_t settle(const RoutedFeature& feature, int64_t id);

  const Routes* routes_ = nullptr;
  size_t legs_ = 0, bands_ = 0;
  int64_t out_of_range_ = 0;
  std::vector<int64_t> batches_;
  std::vector<size_t> lengths_at_;
  std::vector<size_t> begin_;  // [part, sorted leg]: its first value, and one more
  std::vector<uint8_t> dropped_;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> values_, places_;
  std::vector<float> weights_;
  std::vector<int64_t> range_begins_;
  std::vector<size_t> next_;    // per range of the band being sorted: where its next id goes
  std::vector<int32_t> range_;  // per id of the band being sorted, -1: none
  std::vector<int64_t> row_;
};

}  // namespace sidepool
