// The plan as a ranker uses it: which rows and columns of which feature lie where. Immutable once built.
#pragma once
#include <cstdint>
#include <vector>

#include "part.hpp"

namespace sidepool {

// A feature as the ranker needs to know it.
struct RoutedFeature {
  int64_t rows = 0;  // of the whole table
  int32_t dim = 0;
  Pooling pooling = Pooling::sum;
  bool weighted = false;
  OutOfRange policy = OutOfRange::error;
  int64_t default_row = 0;
  int64_t padding_index = kNoPadding;
  int64_t out_column = 0;   // first value of this feature in an output row; unused for none
  int32_t sequence = -1;    // index among the `none` features
  int32_t fixed_begin = 0;  // columns of a fixed-width id matrix
  int32_t fixed_width = 1;
};

// A shard, for one feature: rows from `row_begin` on, to the next leg's of the same band.
struct Leg {
  int32_t band = 0;
  uint16_t shard = 0;  // as frames name it
  int64_t row_begin = 0;
  int32_t holders = 0;  // Routes::holder_sets
  int32_t sorted = -1;  // position among the legs of sorted bands
};

// The columns of one feature that are cut into rows in the same way: its legs are the range table, sorted by row.
struct Band {
  int32_t feature = 0;
  int32_t column = 0, columns = 0;
  int32_t first = 0, end = 0;  // legs
  int32_t sorted = -1;         // position among the sorted bands: ids are settled and sorted here; -1: sent as they came
  bool partial = false;        // the ranker pools what comes back
  int32_t wide = 0;            // its columns among those of all partial bands
};

struct Routes {
  std::vector<RoutedFeature> features;
  std::vector<Band> bands;  // by feature
  std::vector<Leg> legs;    // by band, then row
  std::vector<std::vector<int32_t>> holder_sets;  // sidecars that hold the same shards
  int32_t sidecars = 0;
  int64_t out_columns = 0;  // of the pooled features
  int32_t sequences = 0;    // `none` features
  int32_t sorted_bands = 0, sorted_legs = 0, partial_columns = 0;
  bool any_weighted = false;
  bool replicated = false;
  bool rows_travel = false;  // the ranker pools: sidecars answer with rows
  int32_t max_fixed_column = 0;  // columns a fixed-width matrix must have

  // Appends a feature; its columns in the output follow those before it.
  void add_feature(RoutedFeature feature);
  // Appends a shard of the last feature, in the order of columns, then rows; `sort` where the rows of its table are cut.
  void add_leg(int32_t column, int32_t columns, int64_t row_begin, uint16_t shard, const std::vector<int32_t>& holders, bool sort);
  // Rows of an unpooled feature that a part asks for.
  int64_t sequence_rows(const Part& part, size_t feature) const;
  // A feature whose table lies whole on one sidecar.
  void add_whole(const RoutedFeature& feature, int32_t sidecar);
};

}  // namespace sidepool
