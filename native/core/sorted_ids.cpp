#include "sorted_ids.hpp"

#include <algorithm>
#include <utility>

#include "pooling.hpp"

namespace sidepool {

void SortedIds::reset(const Routes& routes, size_t parts) {
  routes_ = &routes;
  legs_ = size_t(routes.sorted_legs);
  bands_ = size_t(routes.sorted_bands);
  out_of_range_ = 0;
  batches_.assign(parts, 0);
  lengths_at_.assign(parts, 0);
  begin_.assign(parts * (legs_ + 1), 0);
  dropped_.assign(parts * bands_, 0);
  lengths_.clear();
  values_.clear();
  weights_.clear();
  places_.clear();
}

void SortedIds::sort(size_t p, const Part& part, int64_t batch, const int64_t* value_begin) {
  batches_[p] = batch;
  lengths_at_[p] = lengths_.size();
  lengths_.resize(lengths_.size() + legs_ * size_t(batch), 0);
  for (const Band& band : routes_->bands) {
    if (band.sorted < 0) continue;
    const RoutedFeature& feature = routes_->features[size_t(band.feature)];
    const int64_t first = part.lengths != nullptr ? value_begin[band.feature] : feature.fixed_begin;
    part.with_values([&](const auto* ids) { sort_band(p, band, part, ids + first, first); });
  }
}

int64_t SortedIds::settle(const RoutedFeature& feature, int64_t id) {
  if (id == feature.padding_index && id != kNoPadding && feature.pooling != Pooling::none) return -1;
  if (uint64_t(id) < uint64_t(feature.rows)) return id;
  ++out_of_range_;
  switch (feature.policy) {
    case OutOfRange::default_row:
      return feature.default_row;
    case OutOfRange::hash:
      return hashed_row(id, feature.rows);
    case OutOfRange::zero:
    case OutOfRange::error:  // refused before
      return -1;
  }
  return -1;
}

// Two passes: settle every id and count per range, then put each where its range begins.
template <class Id>
void SortedIds::sort_band(size_t p, const Band& band, const Part& part, const Id* ids, int64_t first_value) {
  const RoutedFeature& feature = routes_->features[size_t(band.feature)];
  const size_t ranges = size_t(band.end - band.first);
  const int32_t first_leg = routes_->legs[size_t(band.first)].sorted;
  range_begins_.clear();
  for (int32_t l = band.first; l < band.end; ++l) range_begins_.push_back(routes_->legs[size_t(l)].row_begin);
  const int64_t batch = batches_[p];
  const int32_t* given = part.lengths != nullptr ? part.lengths + int64_t(band.feature) * batch : nullptr;
  int32_t* lengths = &lengths_[lengths_at_[p] + size_t(first_leg) * size_t(batch)];

  range_.clear();
  row_.clear();
  next_.assign(ranges, 0);
  bool dropped = false;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = given != nullptr ? given[b] : feature.fixed_width;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = settle(feature, int64_t(ids[k]));
      dropped |= row < 0;
      const auto after = std::upper_bound(range_begins_.begin(), range_begins_.end(), row);
      const int32_t range = int32_t(after - range_begins_.begin()) - 1;  // -1 for a row of -1: ranges begin at 0
      range_.push_back(range);
      row_.push_back(range < 0 ? 0 : row - range_begins_[size_t(range)]);
      if (range < 0) continue;
      ++next_[size_t(range)];
      ++lengths[int64_t(range) * batch + b];
    }
    ids += given != nullptr ? n : part.fixed_width;
  }
  dropped_[p * bands_ + size_t(band.sorted)] = dropped;

  size_t at = values_.size();
  size_t* begin = &begin_[p * (legs_ + 1) + size_t(first_leg)];
  for (size_t r = 0; r < ranges; ++r) {
    begin[r] = at;
    at += std::exchange(next_[r], at);
  }
  begin[ranges] = at;
  values_.resize(at);
  if (routes_->any_weighted) weights_.resize(at);
  if (routes_->sequences > 0) places_.resize(at);
  const bool weighted = feature.weighted, sequence = feature.pooling == Pooling::none;
  for (size_t i = 0; i < range_.size(); ++i) {
    if (range_[i] < 0) continue;
    const size_t to = next_[size_t(range_[i])]++;
    values_[to] = row_[i];
    if (sequence) places_[to] = int64_t(i);
    if (!weighted) continue;
    const int64_t width = feature.fixed_width;
    const int64_t from = given != nullptr ? int64_t(i) : int64_t(i) / width * part.fixed_width + int64_t(i) % width;
    weights_[to] = part.weights[first_value + from];
  }
}

}  // namespace sidepool
