#include "partials.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "pooling.hpp"

namespace sidepool {
namespace {

void add(float* __restrict to, const float* __restrict row, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) to[c] += row[c];
}

void add_weighted(float* __restrict to, const float* __restrict row, int64_t columns, float weight) {
  for (int64_t c = 0; c < columns; ++c) to[c] += weight * row[c];
}

void scale(float* __restrict to, const float* __restrict row, int64_t columns, float weight) {
  for (int64_t c = 0; c < columns; ++c) to[c] = weight * row[c];
}

void keep_greater(float* __restrict to, const float* __restrict row, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) to[c] = row[c] > to[c] ? row[c] : to[c];
}

void combine(float* to, const float* row, int64_t columns, Pooling pooling, bool first) {
  if (first) {
    std::memcpy(to, row, size_t(columns) * sizeof(float));
  } else if (pooling == Pooling::max) {
    keep_greater(to, row, columns);
  } else {
    add(to, row, columns);
  }
}

}  // namespace

void Partials::begin(const Routes& routes, int64_t batch, OutputFormat format) {
  routes_ = &routes;
  batch_ = batch;
  format_ = format;
  merged_.assign(size_t(routes.sorted_bands * batch), 0);
  if (format == OutputFormat::fp32) return;
  if (wide_.size() < size_t(routes.partial_columns * batch)) wide_.resize(size_t(routes.partial_columns * batch));
  if (const size_t had = ordinals_.size(); had < size_t(batch)) {
    ordinals_.resize(size_t(batch));
    std::iota(ordinals_.begin() + ptrdiff_t(had), ordinals_.end(), int64_t(had));
  }
}

float* Partials::sum(const Band& band, int64_t sample, const OutputRows& to, int64_t i) {
  // Rows of any stride begin where floats may: NumPy's strides are multiples of the item.
  if (format_ == OutputFormat::fp32) return reinterpret_cast<float*>(to.first + i * to.stride_bytes);
  return &wide_[size_t(int64_t(band.wide) * batch_ + (sample + i) * band.columns)];
}

const float* Partials::merge(const Band& band, int64_t sample, const OutputRows& to, const int32_t* lengths, const float* block, bool rows,
                             const float* weights) {
  const Pooling pooling = routes_->features[size_t(band.feature)].pooling;
  int32_t* done = merged(band, sample);
  for (int64_t i = 0; i < to.samples; ++i) {
    if (lengths[i] == 0) continue;
    float* into = sum(band, sample, to, i);
    const int32_t many = rows ? lengths[i] : 1;
    for (int32_t r = 0; r < many; ++r, block += band.columns) {
      const bool first = done[i] == 0 && r == 0;
      if (weights == nullptr) {
        combine(into, block, band.columns, pooling, first);
      } else if (first) {
        scale(into, block, band.columns, *weights++);
      } else {
        add_weighted(into, block, band.columns, *weights++);
      }
    }
    done[i] += lengths[i];
  }
  return block;
}

void Partials::finish(const Band& band, int64_t sample, const OutputRows& to) {
  const bool mean = routes_->features[size_t(band.feature)].pooling == Pooling::mean;
  const int32_t* done = merged(band, sample);
  for (int64_t i = 0; i < to.samples; ++i) {
    float* into = sum(band, sample, to, i);
    if (done[i] == 0) std::fill_n(into, band.columns, 0.f);
    if (!mean || done[i] < 2) continue;
    const float count = float(done[i]);
    for (int64_t c = 0; c < band.columns; ++c) into[c] /= count;
  }
  if (format_ == OutputFormat::fp32 || to.samples == 0) return;
  // Rounding is what storing a bag of one row does: the sums are the table, and every bag is its own row.
  Table sums;
  sums.base.store(reinterpret_cast<const std::byte*>(sum(band, sample, to, 0)), std::memory_order_relaxed);
  sums.rows = to.samples;
  sums.dim = band.columns;
  BagInput each;
  each.values = ordinals_.data();
  each.value_count = to.samples;
  each.batch = int32_t(to.samples);
  PoolCounts counts;
  pool_feature(sums, Pooling::sum, each, to.first, to.stride_bytes / int64_t(value_bytes(format_)), counts, format_);
}

}  // namespace sidepool
