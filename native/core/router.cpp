#include "router.hpp"

#include <algorithm>

namespace sidepool {
namespace {

// Room for the padding between sections and blocks.
constexpr size_t kSectionSlack = 4 * kAlign;

// True if any id lies outside [0, rows). Sign bits only, so that it vectorises on any machine.
template <class Id>
bool any_outside(const Id* ids, int64_t count, int64_t rows) {
  const uint64_t last = uint64_t(rows) - 1;
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) signs |= uint64_t(ids[i]) | (last - uint64_t(ids[i]));
  return signs >> 63;
}

bool outside(int64_t id, int64_t rows) { return id < 0 || id >= rows; }

bool any_not_finite(const float* weights, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, weights + i, sizeof bits);
    found |= uint32_t((bits & 0x7f800000u) == 0x7f800000u);
  }
  return found != 0;
}

}  // namespace

void RoutedLookup::admit(const Routes& routes, const Part* parts, size_t count, std::vector<Fault>& faults) {
  routes_ = &routes;
  parts_ = parts;
  part_count_ = count;
  const size_t features = routes.features.size();
  batches_.assign(count, 0);
  out_rows_.assign(count, 0);
  value_begin_.assign(count * (features + 1), 0);
  cursor_.assign(count * routes.legs.size(), {});
  sequence_begin_.assign(count * features, 0);
  faults.assign(count, Fault{});
  total_samples_ = 0;
  for (size_t p = 0; p < count; ++p) {
    const Part& part = parts[p];
    // A malformed lengths tensor still has a number of rows in the output: whole batches of it.
    batches_[p] = part.lengths == nullptr ? part.fixed_batch : part.length_count / int64_t(features);
    out_rows_[p] = total_samples_;
    total_samples_ += batches_[p];
    faults[p] = check(p);
  }
  sorted_.reset(routes, count);
  if (routes.sorted_bands == 0) return;
  for (size_t p = 0; p < count; ++p)
    if (faults[p].status == Status::ok) sorted_.sort(p, parts[p], batches_[p], &value_begin_[p * (features + 1)]);
}

void RoutedLookup::assign(const std::vector<int32_t>& sidecar_of_set) {
  sidecar_of_set_.assign(sidecar_of_set.begin(), sidecar_of_set.end());
  legs_of_.resize(size_t(routes_->sidecars));
  for (std::vector<int32_t>& legs : legs_of_) legs.clear();
  for (size_t l = 0; l < routes_->legs.size(); ++l)
    legs_of_[size_t(sidecar_of_set[size_t(routes_->legs[l].holders)])].push_back(int32_t(l));
}

// Refused parts have no sequence rows: the rows of the others follow one another.
void RoutedLookup::place_sequences(const std::vector<Fault>& faults) {
  const size_t features = routes_->features.size();
  for (size_t f = 0; f < features; ++f) {
    if (routes_->features[f].pooling != Pooling::none) continue;
    int64_t at = 0;
    for (size_t p = 0; p < part_count_; ++p) {
      sequence_begin_[p * features + f] = at;
      if (faults[p].status == Status::ok) at += int64_t(count_values(p, int32_t(f), 0, batches_[p]));
    }
  }
}

Fault RoutedLookup::check(size_t p) {
  const Part& part = parts_[p];
  if (batches_[p] > int64_t(kMaxBatch)) return {Status::rejected, Reason::too_large, -1, -1, batches_[p]};
  const Fault fault = part.lengths != nullptr ? check_jagged(p) : check_fixed(p);
  if (fault.status != Status::ok) return fault;
  if (routes_->any_weighted && part.weights == nullptr) return {Status::rejected, Reason::weights_missing, -1, -1, 0};
  if (part.weights == nullptr) return {};
  if (!routes_->any_weighted) return {Status::rejected, Reason::weights_unexpected, -1, -1, 0};
  if (part.weight_count != part.value_count) return {Status::rejected, Reason::weights_count, -1, -1, part.weight_count};
  if (any_not_finite(part.weights, part.weight_count)) {
    const auto bad = std::find_if(part.weights, part.weights + part.weight_count, [](float w) { return !__builtin_isfinite(w); });
    return {Status::rejected, Reason::weight_not_finite, -1, -1, bad - part.weights};
  }
  return {};
}

Fault RoutedLookup::check_jagged(size_t p) {
  const Part& part = parts_[p];
  const size_t features = routes_->features.size();
  if (part.length_count % int64_t(features) != 0) return {Status::rejected, Reason::lengths_not_batches, -1, -1, part.length_count};
  const int64_t batch = batches_[p];
  int64_t* begin = &value_begin_[p * (features + 1)];
  int64_t at = 0;
  for (size_t f = 0; f < features; ++f) {
    const int32_t* lengths = part.lengths + int64_t(f) * batch;
    int64_t sum = 0;
    int32_t signs = 0;
    for (int64_t b = 0; b < batch; ++b) {
      sum += lengths[b];
      signs |= lengths[b];
    }
    if (signs < 0) {
      const int64_t b = std::find_if(lengths, lengths + batch, [](int32_t n) { return n < 0; }) - lengths;
      return {Status::rejected, Reason::negative_length, int32_t(f), b, lengths[b]};
    }
    begin[f] = at;
    at += sum;
    if (at > part.value_count) return {Status::rejected, Reason::lengths_exceed_values, int32_t(f), -1, part.value_count};
  }
  begin[features] = at;
  if (at != part.value_count) return {Status::rejected, Reason::values_left_over, -1, -1, part.value_count - at};

  return part.with_values([&](const auto* values) -> Fault {
    for (size_t f = 0; f < features; ++f) {
      const RoutedFeature& feature = routes_->features[f];
      const auto* ids = values + begin[f];
      const int64_t count = begin[f + 1] - begin[f];
      if (feature.policy != OutOfRange::error || !any_outside(ids, count, feature.rows)) continue;
      int64_t at_bag = 0, bag = 0;
      for (int64_t i = 0; i < count; ++i) {
        while (i >= at_bag + part.lengths[int64_t(f) * batch + bag]) at_bag += part.lengths[int64_t(f) * batch + bag++];
        if (outside(ids[i], feature.rows)) return {Status::rejected, Reason::id_out_of_range, int32_t(f), bag, ids[i]};
      }
    }
    return {};
  });
}

Fault RoutedLookup::check_fixed(size_t p) {
  const Part& part = parts_[p];
  if (part.fixed_width < routes_->max_fixed_column) return {Status::rejected, Reason::too_few_columns, -1, -1, part.fixed_width};
  // Row by row, as the matrix lies in memory; column_last_ holds the last valid id of each column.
  const size_t width = size_t(routes_->max_fixed_column);
  column_last_.assign(width, INT64_MAX);
  column_signs_.assign(width, 0);
  for (const RoutedFeature& feature : routes_->features) {
    if (feature.policy != OutOfRange::error) continue;
    for (int32_t k = 0; k < feature.fixed_width; ++k) {
      uint64_t& last = column_last_[size_t(feature.fixed_begin + k)];
      last = std::min(last, uint64_t(feature.rows) - 1);
    }
  }
  return part.with_values([&](const auto* values) -> Fault {
    for (int64_t b = 0; b < part.fixed_batch; ++b) {
      const auto* ids = values + b * part.fixed_width;
      for (size_t c = 0; c < width; ++c) column_signs_[c] |= uint64_t(ids[c]) | (column_last_[c] - uint64_t(ids[c]));
    }
    for (size_t f = 0; f < routes_->features.size(); ++f) {
      const RoutedFeature& feature = routes_->features[f];
      if (feature.policy != OutOfRange::error) continue;
      for (int32_t k = 0; k < feature.fixed_width; ++k) {
        if (column_signs_[size_t(feature.fixed_begin + k)] >> 63 == 0) continue;
        const auto* ids = values + feature.fixed_begin + k;
        for (int64_t b = 0; b < part.fixed_batch; ++b)
          if (outside(ids[b * part.fixed_width], feature.rows))
            return {Status::rejected, Reason::id_out_of_range, int32_t(f), b, ids[b * part.fixed_width]};
      }
    }
    return {};
  });
}

uint64_t RoutedLookup::count_values(size_t p, int32_t f, int64_t begin, int64_t end) const {
  const Part& part = parts_[p];
  if (part.lengths == nullptr) return uint64_t(end - begin) * uint64_t(routes_->features[size_t(f)].fixed_width);
  const size_t features = routes_->features.size();
  if (begin == 0 && end == batches_[p]) {
    const int64_t* at = &value_begin_[p * (features + 1) + size_t(f)];
    return uint64_t(at[1] - at[0]);
  }
  const int32_t* lengths = part.lengths + int64_t(f) * batches_[p];
  uint64_t sum = 0;
  for (int64_t b = begin; b < end; ++b) sum += uint64_t(lengths[b]);
  return sum;
}

uint64_t RoutedLookup::count_leg_values(size_t p, int32_t l, int64_t begin, int64_t end) const {
  const int32_t sorted = routes_->legs[size_t(l)].sorted;
  if (sorted < 0) return count_values(p, band_of(l).feature, begin, end);
  if (begin == 0 && end == batches_[p]) return sorted_.count(p, sorted);
  const int32_t* lengths = sorted_.lengths(p, sorted);
  uint64_t sum = 0;
  for (int64_t b = begin; b < end; ++b) sum += uint64_t(lengths[b]);
  return sum;
}

uint64_t RoutedLookup::count_leg_bags(size_t p, int32_t l, int64_t begin, int64_t end) const {
  const int32_t sorted = routes_->legs[size_t(l)].sorted;
  if (sorted < 0) return uint64_t(end - begin);
  const int32_t* lengths = sorted_.lengths(p, sorted);
  return uint64_t(end - begin) - uint64_t(std::count(lengths + begin, lengths + end, 0));
}

int64_t RoutedLookup::values_before(size_t p, int32_t l, int64_t bag) {
  Cursor& at = cursor_[p * routes_->legs.size() + size_t(l)];
  if (bag < at.bag) at = {};
  at.values += int64_t(count_leg_values(p, l, at.bag, bag));
  at.bag = bag;
  return at.values;
}

// What samples of a part add to the subrequests of a chunk.
void RoutedLookup::add_cost(size_t p, int64_t begin, int64_t end, OutputFormat output) {
  std::fill(block_cost_.begin(), block_cost_.end(), Cost{});
  for (size_t s = 0; s < legs_of_.size(); ++s) {
    Cost& cost = block_cost_[s];
    for (const int32_t l : legs_of_[s]) {
      const Band& band = band_of(l);
      const RoutedFeature& feature = routes_->features[size_t(band.feature)];
      const uint64_t values = count_leg_values(p, l, begin, end), bags = count_leg_bags(p, l, begin, end);
      const bool rows = feature.pooling == Pooling::none || routes_->rows_travel;
      cost.values += values;
      cost.request += values * (sizeof(int64_t) + (feature.weighted ? sizeof(float) : 0)) + bags * sizeof(int32_t);
      cost.response += (rows ? values : bags) * uint64_t(band.columns) * (band.partial ? sizeof(float) : value_bytes(output));
    }
  }
}

bool RoutedLookup::fits(int32_t s, int64_t batch, const SlotBudget& budget) const {
  const Cost &chunk = chunk_cost_[size_t(s)], &block = block_cost_[size_t(s)];
  const size_t legs = legs_of_[size_t(s)].size();
  const uint64_t request = sizeof(RequestHeader) + legs * sizeof(FeatureEntry) + chunk.request + block.request + kSectionSlack;
  const uint64_t response = chunk.response + block.response + legs * kAlign;
  return request <= budget.request_bytes && response <= budget.payload_bytes && batch <= int64_t(kMaxBatch);
}

void RoutedLookup::plan(const std::vector<SlotBudget>& budgets, OutputFormat output, std::vector<Fault>& faults) {
  const size_t sidecars = legs_of_.size();
  for (bool again = true; again;) {
    again = false;
    live_.clear();
    chunks_.clear();
    segments_of_ = SIZE_MAX;
    int64_t samples = 0;
    for (size_t p = 0; p < part_count_; ++p) {
      if (faults[p].status != Status::ok || batches_[p] == 0) continue;
      live_.push_back({p, samples, samples + batches_[p], out_rows_[p]});
      samples += batches_[p];
    }
    if (samples == 0) return;
    Chunk chunk{0, 0};
    chunk_cost_.assign(sidecars, {});
    block_cost_.assign(sidecars, {});
    for (size_t l = 0; l < live_.size() && !again; ++l) {
      const size_t p = live_[l].part;
      // Whole parts first; halves of what does not fit, down to one sample.
      int64_t step = batches_[p];
      for (int64_t a = 0; a < batches_[p];) {
        const int64_t b = std::min(a + step, batches_[p]);
        add_cost(p, a, b, output);
        bool fit = true;
        for (size_t s = 0; s < sidecars && fit; ++s)
          fit = legs_of_[s].empty() || fits(int32_t(s), chunk.end - chunk.begin + b - a, budgets[s]);
        if (fit) {
          chunk.end += b - a;
          for (size_t s = 0; s < sidecars; ++s) {
            chunk_cost_[s].request += block_cost_[s].request;
            chunk_cost_[s].response += block_cost_[s].response;
          }
          a = b;
        } else if (chunk.end > chunk.begin && (step == 1 || (chunk.end - chunk.begin) * 2 >= step)) {
          chunks_.push_back(chunk);
          chunk = {chunk.end, chunk.end};
          chunk_cost_.assign(sidecars, {});
        } else if (step > 1) {
          step = (b - a + 1) / 2;
        } else {
          uint64_t largest = 0;
          for (const Cost& cost : block_cost_) largest = std::max(largest, cost.values * sizeof(int64_t));
          faults[p] = {Status::rejected, Reason::too_large, -1, a, int64_t(largest)};
          again = true;
          break;
        }
      }
    }
    if (!again && chunk.end > chunk.begin) chunks_.push_back(chunk);
  }
  place_sequences(faults);
}

void RoutedLookup::segments(size_t chunk) {
  if (segments_of_ == chunk) return;
  segments_of_ = chunk;
  segments_.clear();
  const Chunk& c = chunks_[chunk];
  for (size_t l = 0; l < live_.size(); ++l) {
    const int64_t begin = std::max(c.begin, live_[l].begin), end = std::min(c.end, live_[l].end);
    if (begin < end) segments_.push_back({l, begin - live_[l].begin, end - live_[l].begin});
  }
}

}  // namespace sidepool
