// Routing: from the blocks of the answers back to the caller's output.
#include "router.hpp"

#include <cstring>

namespace sidepool {

OutputRows RoutedLookup::pooled_rows(const Segment& g, const Band& band, const LookupOutput& out) const {
  const int64_t value = (live_[g.live].out_row + g.begin) * out.stride + routes_->features[size_t(band.feature)].out_column + band.column;
  const int64_t bytes = int64_t(value_bytes(out.format));
  return {out.pooled + value * bytes, out.stride * bytes, g.end - g.begin};
}

// The band's first column of a row of its feature's sequence, counted from the part's first.
std::byte* RoutedLookup::sequence_rows(size_t p, const Band& band, int64_t row, const LookupOutput& out) const {
  const RoutedFeature& feature = routes_->features[size_t(band.feature)];
  const int64_t at = sequence_begin_[p * routes_->features.size() + size_t(band.feature)] + row;
  return out.sequences[feature.sequence] + (at * feature.dim + band.column) * int64_t(value_bytes(out.format));
}

void RoutedLookup::begin_merge(size_t chunk, const LookupOutput& out) {
  if (routes_->sorted_bands == 0) return;
  segments(chunk);
  partials_.begin(*routes_, int64_t(chunk_batch(chunk)), out.format);
  for (const Band& band : routes_->bands) {
    if (band.sorted < 0 || band.partial) continue;
    const size_t row = size_t(routes_->features[size_t(band.feature)].dim) * value_bytes(out.format);
    for (const Segment& g : segments_) {
      const size_t p = live_[g.live].part;
      if (!sorted_.dropped(p, band.sorted)) continue;  // every row will be written
      const int64_t from = int64_t(count_values(p, band.feature, 0, g.begin));
      const uint64_t rows = count_values(p, band.feature, g.begin, g.end);
      std::byte* to = sequence_rows(p, band, from, out);
      for (uint64_t r = 0; r < rows; ++r) std::memset(to + r * row, 0, size_t(band.columns) * value_bytes(out.format));
    }
  }
}

void RoutedLookup::merge(size_t chunk, int32_t l, const std::byte* block, const LookupOutput& out) {
  segments(chunk);
  const Band& band = band_of(l);
  if (band.sorted < 0) return merge_whole(l, block, out);
  if (!band.partial) return merge_sequence(l, block, out);
  const int32_t sorted = routes_->legs[size_t(l)].sorted;
  const bool rows = routes_->rows_travel, weighted = rows && routes_->features[size_t(band.feature)].weighted;
  const float* from = reinterpret_cast<const float*>(block);
  int64_t sample = 0;
  for (const Segment& g : segments_) {
    const size_t p = live_[g.live].part;
    const OutputRows to = pooled_rows(g, band, out);
    const float* weights = weighted ? sorted_.weights(p, sorted) + values_before(p, l, g.begin) : nullptr;
    from = partials_.merge(band, sample, to, sorted_.lengths(p, sorted) + g.begin, from, rows, weights);
    sample += to.samples;
  }
}

void RoutedLookup::merge_whole(int32_t l, const std::byte* block, const LookupOutput& out) {
  const Band& band = band_of(l);
  const RoutedFeature& feature = routes_->features[size_t(band.feature)];
  const size_t row = size_t(band.columns) * value_bytes(out.format);
  for (const Segment& g : segments_) {
    if (feature.pooling != Pooling::none) {
      const OutputRows to = pooled_rows(g, band, out);
      for (int64_t i = 0; i < to.samples; ++i, block += row) std::memcpy(to.first + i * to.stride_bytes, block, row);
      continue;
    }
    const size_t p = live_[g.live].part;
    const uint64_t n = count_values(p, band.feature, g.begin, g.end);
    std::byte* to = sequence_rows(p, band, int64_t(count_values(p, band.feature, 0, g.begin)), out);
    const size_t stride = size_t(feature.dim) * value_bytes(out.format);
    if (stride == row) {
      std::memcpy(to, block, n * row);
    } else {
      for (uint64_t i = 0; i < n; ++i) std::memcpy(to + i * stride, block + i * row, row);
    }
    block += n * row;
  }
}

// Rows go back to the places of their ids; a null block: zeros do.
void RoutedLookup::merge_sequence(int32_t l, const std::byte* block, const LookupOutput& out) {
  const Band& band = band_of(l);
  const int32_t sorted = routes_->legs[size_t(l)].sorted;
  const size_t row = size_t(band.columns) * value_bytes(out.format);
  for (const Segment& g : segments_) {
    const size_t p = live_[g.live].part;
    const int64_t* places = sorted_.places(p, sorted) + values_before(p, l, g.begin);
    const uint64_t n = count_leg_values(p, l, g.begin, g.end);
    for (uint64_t i = 0; i < n; ++i) {
      std::byte* to = sequence_rows(p, band, places[i], out);
      if (block == nullptr) {
        std::memset(to, 0, row);
        continue;
      }
      std::memcpy(to, block, row);
      block += row;
    }
  }
}

void RoutedLookup::lose(size_t chunk, int32_t l, const LookupOutput& out) {
  segments(chunk);
  const Band& band = band_of(l);
  if (band.partial) return;  // finish_merge fills what nothing was merged into
  if (band.sorted >= 0) return merge_sequence(l, nullptr, out);
  const RoutedFeature& feature = routes_->features[size_t(band.feature)];
  const size_t row = size_t(band.columns) * value_bytes(out.format);  // bits of zero, whatever the format
  for (const Segment& g : segments_) {
    OutputRows to = pooled_rows(g, band, out);
    if (feature.pooling == Pooling::none) {
      const size_t p = live_[g.live].part;
      to.first = sequence_rows(p, band, int64_t(count_values(p, band.feature, 0, g.begin)), out);
      to.stride_bytes = feature.dim * int64_t(value_bytes(out.format));
      to.samples = int64_t(count_values(p, band.feature, g.begin, g.end));
    }
    for (int64_t i = 0; i < to.samples; ++i) std::memset(to.first + i * to.stride_bytes, 0, row);
  }
}

void RoutedLookup::finish_merge(size_t chunk, const LookupOutput& out) {
  if (routes_->partial_columns == 0) return;
  segments(chunk);
  for (const Band& band : routes_->bands) {
    if (!band.partial) continue;
    int64_t sample = 0;
    for (const Segment& g : segments_) {
      const OutputRows to = pooled_rows(g, band, out);
      partials_.finish(band, sample, to);
      sample += to.samples;
    }
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
