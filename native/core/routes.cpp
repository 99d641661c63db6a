#include "routes.hpp"

#include <algorithm>

namespace sidepool {

void Routes::add_feature(RoutedFeature feature) {
  if (feature.pooling == Pooling::none) {
    feature.sequence = sequences++;
  } else {
    feature.out_column = out_columns;
    out_columns += feature.dim;
  }
  feature.fixed_begin = int32_t(features.size());
  any_weighted |= feature.weighted;
  features.push_back(feature);
  max_fixed_column = int32_t(features.size());
}

void Routes::add_leg(int32_t column, int32_t columns, int64_t row_begin, uint16_t shard, const std::vector<int32_t>& holders, bool sort) {
  const int32_t feature = int32_t(features.size()) - 1;
  const bool sorted = sort || (rows_travel && features.back().pooling != Pooling::none);
  if (bands.empty() || bands.back().feature != feature || bands.back().column != column) {
    Band band{feature, column, columns, int32_t(legs.size()), int32_t(legs.size())};
    if (sorted) band.sorted = sorted_bands++;
    band.partial = sorted && features.back().pooling != Pooling::none;
    band.wide = partial_columns;
    if (band.partial) partial_columns += columns;
    bands.push_back(band);
  }
  const auto same = std::find(holder_sets.begin(), holder_sets.end(), holders);
  const int32_t set = int32_t(same - holder_sets.begin());
  if (same == holder_sets.end()) holder_sets.push_back(holders);
  replicated |= holders.size() > 1;
  legs.push_back({int32_t(bands.size()) - 1, shard, row_begin, set, sorted ? sorted_legs++ : -1});
  bands.back().end = int32_t(legs.size());
}

int64_t Routes::sequence_rows(const Part& part, size_t feature) const {
  if (part.lengths == nullptr) return part.fixed_batch * features[feature].fixed_width;
  const int64_t batch = part.length_count / int64_t(features.size());
  int64_t sum = 0;
  for (int64_t b = 0; b < batch; ++b) sum += std::max<int64_t>(0, part.lengths[int64_t(feature) * batch + b]);
  return std::min(sum, part.value_count);
}

void Routes::add_whole(const RoutedFeature& feature, int32_t sidecar) {
  sidecars = std::max(sidecars, sidecar + 1);
  add_feature(feature);
  add_leg(0, feature.dim, 0, 0, {sidecar}, false);
}

}  // namespace sidepool
