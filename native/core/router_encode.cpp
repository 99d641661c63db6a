// Routing: what each subrequest asks for, written into its frame.
#include "router.hpp"

#include <algorithm>

namespace sidepool {

void RoutedLookup::measure(size_t chunk, const std::vector<int32_t>& legs, Asked& asked) {
  segments(chunk);
  const bool jagged = std::any_of(segments_.begin(), segments_.end(), [this](const Segment& g) { return parts_[live_[g.live].part].lengths != nullptr; });
  const uint32_t batch = chunk_batch(chunk);
  asked.legs.clear();
  asked.entries.clear();
  asked.values = 0;
  uint64_t lengths = 0, weights = 0;
  for (const int32_t l : legs) {
    const Band& band = band_of(l);
    const RoutedFeature& feature = routes_->features[size_t(band.feature)];
    const bool rows = routes_->rows_travel && band.partial;
    FeatureEntry entry;
    entry.feature = uint32_t(band.feature);
    entry.shard = routes_->legs[size_t(l)].shard;
    entry.flags = (feature.weighted && !rows ? kWeightedEntry : 0) | (rows ? kRowsEntry : band.partial ? kPartialEntry : 0);
    for (const Segment& g : segments_) entry.value_count += count_leg_values(live_[g.live].part, l, g.begin, g.end);
    if (band.sorted >= 0) {
      if (entry.value_count == 0) continue;
      for (const Segment& g : segments_) entry.bags += uint32_t(count_leg_bags(live_[g.live].part, l, g.begin, g.end));
      if (entry.bags == entry.value_count) entry.fixed_length = 1;
    } else if (!jagged) {
      entry.fixed_length = feature.fixed_width;
    }
    if (entry.fixed_length < 0) lengths += entry.bag_count(batch);
    asked.values += entry.value_count;
    if (entry.flags & kWeightedEntry) weights += entry.value_count;
    asked.legs.push_back(l);
    asked.entries.push_back(entry);
  }
  asked.layout = request_layout(asked.legs.size(), lengths, asked.values, weights);
}

size_t RoutedLookup::answer_bytes(size_t chunk, const Asked& asked, size_t position, OutputFormat output) const {
  const Band& band = band_of(asked.legs[position]);
  const Pooling pooling = routes_->features[size_t(band.feature)].pooling;
  return block_bytes(asked.entries[position], pooling, band.columns, chunk_batch(chunk), output);
}

void RoutedLookup::encode(size_t chunk, const Asked& asked, std::byte* frame) {
  segments(chunk);
  Sections to{reinterpret_cast<int32_t*>(frame + asked.layout.lengths), reinterpret_cast<int64_t*>(frame + asked.layout.values),
              reinterpret_cast<float*>(frame + asked.layout.weights)};
  std::memcpy(frame + asked.layout.entries, asked.entries.data(), asked.entries.size() * sizeof(FeatureEntry));
  if (asked.layout.values == asked.layout.lengths && !routes_->any_weighted && routes_->sorted_bands == 0) {
    transpose_ids(asked, to.values);
    return;
  }
  for (size_t i = 0; i < asked.legs.size(); ++i) {
    const int32_t l = asked.legs[i];
    const bool with_lengths = asked.entries[i].fixed_length < 0, sorted = band_of(l).sorted >= 0;
    for (const Segment& g : segments_) {
      if (sorted) {
        encode_sorted(l, g, with_lengths, to);
      } else {
        encode_bags(l, g, with_lengths, to);
      }
    }
  }
}

// Fixed-width ids without weights: from sample-major to feature-major, in blocks of samples that stay in the L1 cache
// (64 samples of 26 ids are 13 KB) while every feature picks its columns.
void RoutedLookup::transpose_ids(const Asked& asked, int64_t* values) const {
  constexpr int64_t kBlock = 64;
  int64_t done = 0;
  for (const Segment& g : segments_) {
    const Part& part = parts_[live_[g.live].part];
    part.with_values([&](const auto* ids) {
      for (int64_t begin = g.begin; begin < g.end; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, g.end);
        int64_t* of_feature = values;
        for (size_t i = 0; i < asked.legs.size(); ++i) {
          const RoutedFeature& feature = feature_of(asked.legs[i]);
          const auto* from = ids + begin * part.fixed_width + feature.fixed_begin;
          int64_t* to = of_feature + done * feature.fixed_width;
          for (int64_t b = begin; b < end; ++b, from += part.fixed_width)
            for (int32_t k = 0; k < feature.fixed_width; ++k) *to++ = from[k];
          of_feature += asked.entries[i].value_count;
        }
        done += end - begin;
      }
    });
  }
}

// A whole leg's lengths, ids and weights of one segment, appended to the sections.
void RoutedLookup::encode_bags(int32_t l, const Segment& g, bool with_lengths, Sections& to) {
  const int32_t f = band_of(l).feature;
  const RoutedFeature& feature = routes_->features[size_t(f)];
  const size_t p = live_[g.live].part, features = routes_->features.size();
  const Part& part = parts_[p];
  const int64_t samples = g.end - g.begin;
  if (part.lengths != nullptr) {
    to.lengths = std::copy_n(part.lengths + int64_t(f) * batches_[p] + g.begin, samples, to.lengths);
    const int64_t count = int64_t(count_values(p, f, g.begin, g.end));
    const int64_t from = value_begin_[p * (features + 1) + size_t(f)] + values_before(p, l, g.begin);
    to.values = part.with_values([&](const auto* ids) { return std::copy_n(ids + from, count, to.values); });
    if (feature.weighted) to.weights = std::copy_n(part.weights + from, count, to.weights);
    return;
  }
  if (with_lengths) to.lengths = std::fill_n(to.lengths, samples, feature.fixed_width);
  for (int64_t b = g.begin; b < g.end; ++b) {
    const int64_t from = b * part.fixed_width + feature.fixed_begin;
    to.values = part.with_values([&](const auto* ids) { return std::copy_n(ids + from, feature.fixed_width, to.values); });
    if (feature.weighted) to.weights = std::copy_n(part.weights + from, feature.fixed_width, to.weights);
  }
}

// A sorted leg's: bags without ids are left out.
void RoutedLookup::encode_sorted(int32_t l, const Segment& g, bool with_lengths, Sections& to) {
  const size_t p = live_[g.live].part;
  const int32_t sorted = routes_->legs[size_t(l)].sorted;
  const int32_t* lengths = sorted_.lengths(p, sorted);
  if (with_lengths) to.lengths = std::copy_if(lengths + g.begin, lengths + g.end, to.lengths, [](int32_t n) { return n > 0; });
  const int64_t from = values_before(p, l, g.begin), count = int64_t(count_leg_values(p, l, g.begin, g.end));
  to.values = std::copy_n(sorted_.values(p, sorted) + from, count, to.values);
  if (feature_of(l).weighted && !routes_->rows_travel) to.weights = std::copy_n(sorted_.weights(p, sorted) + from, count, to.weights);
}

}  // namespace sidepool
