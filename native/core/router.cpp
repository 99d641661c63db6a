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
  cursor_.assign(count * features, 0);
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

bool RoutedLookup::fits(int32_t s, int64_t batch, uint64_t values, uint64_t sequence_values, OutputFormat output,
                        const SlotBudget& budget) const {
  const std::vector<int32_t>& mine = routes_->of_sidecar[size_t(s)];
  uint64_t dims = 0;
  for (const int32_t f : mine) dims += routes_->features[size_t(f)].pooling == Pooling::none ? 0 : uint64_t(routes_->features[size_t(f)].dim);
  const uint64_t request = sizeof(RequestHeader) + mine.size() * (sizeof(FeatureEntry) + uint64_t(batch) * sizeof(int32_t)) +
                           values * (sizeof(int64_t) + (routes_->any_weighted ? sizeof(float) : 0)) + kSectionSlack;
  const uint64_t response = (uint64_t(batch) * dims + sequence_values) * value_bytes(output) + mine.size() * kAlign;
  return request <= budget.request_bytes && response <= budget.payload_bytes && batch <= int64_t(kMaxBatch);
}

void RoutedLookup::plan(const std::vector<SlotBudget>& budgets, OutputFormat output, std::vector<Fault>& faults) {
  const size_t sidecars = routes_->of_sidecar.size();
  const size_t features = routes_->features.size();
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
    cost_values_.assign(sidecars, 0);
    cost_sequence_.assign(sidecars, 0);
    for (size_t l = 0; l < live_.size() && !again; ++l) {
      const size_t p = live_[l].part;
      // Whole parts first; halves of what does not fit, down to one sample.
      int64_t step = batches_[p];
      for (int64_t a = 0; a < batches_[p];) {
        const int64_t b = std::min(a + step, batches_[p]);
        block_values_.assign(sidecars, 0);
        block_sequence_.assign(sidecars, 0);
        for (size_t f = 0; f < features; ++f) {
          const RoutedFeature& feature = routes_->features[f];
          const uint64_t n = count_values(p, int32_t(f), a, b);
          block_values_[size_t(feature.sidecar)] += n;
          if (feature.pooling == Pooling::none) block_sequence_[size_t(feature.sidecar)] += n * uint64_t(feature.dim);
        }
        bool fit = true;
        for (size_t s = 0; s < sidecars && fit; ++s)
          fit = routes_->of_sidecar[s].empty() || fits(int32_t(s), chunk.end - chunk.begin + b - a, cost_values_[s] + block_values_[s],
                                                       cost_sequence_[s] + block_sequence_[s], output, budgets[s]);
        if (fit) {
          chunk.end += b - a;
          for (size_t s = 0; s < sidecars; ++s) {
            cost_values_[s] += block_values_[s];
            cost_sequence_[s] += block_sequence_[s];
          }
          a = b;
        } else if (chunk.end > chunk.begin && (step == 1 || (chunk.end - chunk.begin) * 2 >= step)) {
          chunks_.push_back(chunk);
          chunk = {chunk.end, chunk.end};
          cost_values_.assign(sidecars, 0);
          cost_sequence_.assign(sidecars, 0);
        } else if (step > 1) {
          step = (b - a + 1) / 2;
        } else {
          faults[p] = {Status::rejected, Reason::too_large, -1, a, int64_t(*std::max_element(block_values_.begin(), block_values_.end()) * 8)};
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

RoutedLookup::Size RoutedLookup::measure(size_t chunk, int32_t s, std::vector<uint64_t>& counts) {
  segments(chunk);
  const std::vector<int32_t>& mine = routes_->of_sidecar[size_t(s)];
  const bool jagged = std::any_of(segments_.begin(), segments_.end(), [this](const Segment& g) { return parts_[live_[g.live].part].lengths != nullptr; });
  Size size;
  counts.assign(mine.size(), 0);
  uint64_t weights = 0;
  for (size_t i = 0; i < mine.size(); ++i) {
    for (const Segment& g : segments_) counts[i] += count_values(live_[g.live].part, mine[i], g.begin, g.end);
    size.values += counts[i];
    if (routes_->features[size_t(mine[i])].weighted) weights += counts[i];
  }
  size.layout = request_layout(mine.size(), jagged ? mine.size() * chunk_batch(chunk) : 0, size.values, weights);
  return size;
}

void RoutedLookup::encode(size_t chunk, int32_t s, const std::vector<uint64_t>& counts, const Size& size, std::byte* frame) {
  segments(chunk);
  const std::vector<int32_t>& mine = routes_->of_sidecar[size_t(s)];
  Sections to{reinterpret_cast<int32_t*>(frame + size.layout.lengths), reinterpret_cast<int64_t*>(frame + size.layout.values),
              reinterpret_cast<float*>(frame + size.layout.weights)};
  const bool jagged = size.layout.values != size.layout.lengths;
  for (size_t i = 0; i < mine.size(); ++i) {
    const RoutedFeature& feature = routes_->features[size_t(mine[i])];
    FeatureEntry entry;
    entry.feature = uint32_t(mine[i]);
    entry.flags = feature.weighted ? kWeightedEntry : 0;
    entry.fixed_length = jagged ? -1 : feature.fixed_width;
    entry.value_count = counts[i];
    std::memcpy(frame + size.layout.entries + i * sizeof entry, &entry, sizeof entry);
  }
  if (!jagged && !routes_->any_weighted) {
    transpose_ids(mine, counts, to.values);
    return;
  }
  for (const int32_t f : mine)
    for (const Segment& g : segments_) encode_bags(f, g, jagged, to);
}

// Fixed-width ids without weights: from sample-major to feature-major, in blocks of samples that stay in the L1 cache
// (64 samples of 26 ids are 13 KB) while every feature picks its columns.
void RoutedLookup::transpose_ids(const std::vector<int32_t>& mine, const std::vector<uint64_t>& counts, int64_t* values) const {
  constexpr int64_t kBlock = 64;
  int64_t done = 0;
  for (const Segment& g : segments_) {
    const Part& part = parts_[live_[g.live].part];
    part.with_values([&](const auto* ids) {
      for (int64_t begin = g.begin; begin < g.end; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, g.end);
        int64_t* of_feature = values;
        for (size_t i = 0; i < mine.size(); ++i) {
          const RoutedFeature& feature = routes_->features[size_t(mine[i])];
          const auto* from = ids + begin * part.fixed_width + feature.fixed_begin;
          int64_t* to = of_feature + done * feature.fixed_width;
          for (int64_t b = begin; b < end; ++b, from += part.fixed_width)
            for (int32_t k = 0; k < feature.fixed_width; ++k) *to++ = from[k];
          of_feature += counts[i];
        }
        done += end - begin;
      }
    });
  }
}

// One feature's lengths, ids and weights of one segment, appended to the sections.
void RoutedLookup::encode_bags(int32_t f, const Segment& g, bool with_lengths, Sections& to) {
  const RoutedFeature& feature = routes_->features[size_t(f)];
  const size_t p = live_[g.live].part, features = routes_->features.size();
  const Part& part = parts_[p];
  const int64_t samples = g.end - g.begin;
  int64_t from, count;
  if (part.lengths != nullptr) {
    std::memcpy(to.lengths, part.lengths + int64_t(f) * batches_[p] + g.begin, size_t(samples) * sizeof(int32_t));
    to.lengths += samples;
    count = int64_t(count_values(p, f, g.begin, g.end));
    int64_t& cursor = cursor_[p * features + size_t(f)];
    from = value_begin_[p * (features + 1) + size_t(f)] + cursor;
    cursor += count;
    to.values = part.with_values([&](const auto* ids) { return std::copy_n(ids + from, count, to.values); });
    if (feature.weighted) {
      std::memcpy(to.weights, part.weights + from, size_t(count) * sizeof(float));
      to.weights += count;
    }
    return;
  }
  if (with_lengths) to.lengths = std::fill_n(to.lengths, samples, feature.fixed_width);
  for (int64_t b = g.begin; b < g.end; ++b) {
    from = b * part.fixed_width + feature.fixed_begin;
    to.values = part.with_values([&](const auto* ids) { return std::copy_n(ids + from, feature.fixed_width, to.values); });
    if (feature.weighted) to.weights = std::copy_n(part.weights + from, feature.fixed_width, to.weights);
  }
}

std::byte* RoutedLookup::pooled_rows(const Segment& g, const RoutedFeature& feature, const LookupOutput& out) const {
  const int64_t value = (live_[g.live].out_row + g.begin) * out.stride + feature.out_column;
  return out.pooled + value * int64_t(value_bytes(out.format));
}

std::byte* RoutedLookup::sequence_rows(const Segment& g, int32_t f, const LookupOutput& out) const {
  const RoutedFeature& feature = routes_->features[size_t(f)];
  const size_t p = live_[g.live].part;
  const int64_t row = sequence_begin_[p * routes_->features.size() + size_t(f)] + int64_t(count_values(p, f, 0, g.begin));
  return out.sequences[feature.sequence] + row * feature.dim * int64_t(value_bytes(out.format));
}

void RoutedLookup::merge(size_t chunk, int32_t f, const std::byte* block, const LookupOutput& out) {
  segments(chunk);
  const RoutedFeature& feature = routes_->features[size_t(f)];
  const size_t row = size_t(feature.dim) * value_bytes(out.format);
  if (feature.pooling == Pooling::none) {
    for (const Segment& g : segments_) {
      const uint64_t n = count_values(live_[g.live].part, f, g.begin, g.end);
      std::memcpy(sequence_rows(g, f, out), block, n * row);
      block += n * row;
    }
    return;
  }
  const size_t stride = size_t(out.stride) * value_bytes(out.format);
  for (const Segment& g : segments_) {
    std::byte* to = pooled_rows(g, feature, out);
    for (int64_t b = g.begin; b < g.end; ++b, to += stride, block += row) std::memcpy(to, block, row);
  }
}

void RoutedLookup::zero(size_t chunk, int32_t f, const LookupOutput& out) {
  segments(chunk);
  const RoutedFeature& feature = routes_->features[size_t(f)];
  const size_t row = size_t(feature.dim) * value_bytes(out.format), stride = size_t(out.stride) * value_bytes(out.format);
  for (const Segment& g : segments_) {
    if (feature.pooling == Pooling::none) {
      const uint64_t n = count_values(live_[g.live].part, f, g.begin, g.end);
      std::memset(sequence_rows(g, f, out), 0, n * row);  // bits of zero, whatever the format
      continue;
    }
    std::byte* to = pooled_rows(g, feature, out);
    for (int64_t b = g.begin; b < g.end; ++b, to += stride) std::memset(to, 0, row);
  }
}

void RoutedLookup::zero_refused(const std::vector<Fault>& faults, const LookupOutput& out) {
  const size_t bytes = value_bytes(out.format), stride = size_t(out.stride) * bytes;
  size_t row = 0;
  for (const RoutedFeature& feature : routes_->features)
    if (feature.pooling != Pooling::none) row += size_t(feature.dim) * bytes;
  for (size_t p = 0; p < part_count_; ++p) {
    if (faults[p].status == Status::ok) continue;
    for (int64_t b = 0; b < batches_[p]; ++b) std::memset(out.pooled + size_t(out_rows_[p] + b) * stride, 0, row);
  }
}

}  // namespace sidepool
