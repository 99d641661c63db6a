// From a caller's jagged tensors to one request frame per sidecar, and from partials back to the caller's output.
#pragma once
#include <cstdint>
#include <vector>

#include "frames.hpp"
#include "part.hpp"
#include "partials.hpp"
#include "routes.hpp"
#include "sorted_ids.hpp"

namespace sidepool {

struct SlotBudget {
  size_t request_bytes = 0;
  size_t payload_bytes = 0;
};

// What one subrequest asks for, leg by leg. Legs of cut tables without ids are left out.
struct Asked {
  std::vector<int32_t> legs;
  std::vector<FeatureEntry> entries;  // one per leg
  RequestLayout layout;
  uint64_t values = 0;
};

// One lookup being routed. Reused from lookup to lookup by its thread: memory grows to the largest and stays.
class RoutedLookup {
 public:
  // Check every part and say what is wrong in `faults` (one per part). Parts with a fault take no part in what follows.
  void admit(const Routes& routes, const Part* parts, size_t count, std::vector<Fault>& faults);
  // Settle which sidecar answers for each set of holders.
  void assign(const std::vector<int32_t>& sidecar_of_set);
  // Legs that a sidecar was assigned, in plan order.
  const std::vector<int32_t>& legs_of(int32_t sidecar) const { return legs_of_[size_t(sidecar)]; }

  // Cut the samples into chunks that fit every sidecar's slots. A part with a sample too large for any slot is faulted.
  void plan(const std::vector<SlotBudget>& budgets, OutputFormat output, std::vector<Fault>& faults);
  size_t chunk_count() const { return chunks_.size(); }

  // Samples of the whole call and of the chunk; ids outside their tables that were settled here.
  int64_t samples() const { return total_samples_; }
  int64_t out_of_range() const { return sorted_.out_of_range(); }
  uint32_t chunk_batch(size_t chunk) const { return uint32_t(chunks_[chunk].end - chunks_[chunk].begin); }

  // What a subrequest for these legs needs. Any legs, any number of times.
  void measure(size_t chunk, const std::vector<int32_t>& legs, Asked& asked);
  // Write entries, lengths, values and weights behind the header at `frame`.
  void encode(size_t chunk, const Asked& asked, std::byte* frame);
  // Bytes of the block that answers the entry at `position`.
  size_t answer_bytes(size_t chunk, const Asked& asked, size_t position, OutputFormat output) const;

  // Between begin_merge and finish_merge of a chunk, merge every leg's block, or say that it is lost.
  void begin_merge(size_t chunk, const LookupOutput& out);
  void merge(size_t chunk, int32_t leg, const std::byte* block, const LookupOutput& out);
  // Rows of the leg are as if their ids were absent.
  void lose(size_t chunk, int32_t leg, const LookupOutput& out);
  void finish_merge(size_t chunk, const LookupOutput& out);
  // Output rows of parts that were refused.
  void zero_refused(const std::vector<Fault>& faults, const LookupOutput& out);

 private:
  struct Live {
    size_t part;
    int64_t begin, end;  // in live samples
    int64_t out_row;
  };
  struct Chunk {
    int64_t begin, end;  // live samples
  };
  struct Segment {
    size_t live;
    int64_t begin, end;  // samples of the part
  };

  // The last answer of values_before: chunks ask in order, so that each length is summed once.
  struct Cursor {
    int64_t bag = 0, values = 0;
  };
  // Where the next lengths, ids and weights of a frame go.
  struct Sections {
    int32_t* lengths;
    int64_t* values;
    float* weights;
  };

  Fault check(size_t part);
  Fault check_jagged(size_t part);
  Fault check_fixed(size_t part);
  uint64_t count_values(size_t part, int32_t feature, int64_t begin, int64_t end) const;
  uint64_t count_leg_values(size_t part, int32_t leg, int64_t begin, int64_t end) const;
  uint64_t count_leg_bags(size_t part, int32_t leg, int64_t begin, int64_t end) const;
  // Values of a leg (or of a whole leg's feature) in bags before `bag`.
  int64_t values_before(size_t part, int32_t leg, int64_t bag);
  void segments(size_t chunk);
  const RoutedFeature& feature_of(int32_t leg) const { return routes_->features[size_t(band_of(leg).feature)]; }
  const Band& band_of(int32_t leg) const { return routes_->bands[size_t(routes_->legs[size_t(leg)].band)]; }
  void add_cost(size_t part, int64_t begin, int64_t end, OutputFormat output);
  bool fits(int32_t sidecar, int64_t batch, const SlotBudget& budget) const;
  void transpose_ids(const Asked& asked, int64_t* values) const;
  void encode_bags(int32_t leg, const Segment& segment, bool with_lengths, Sections& to);
  void encode_sorted(int32_t leg, const Segment& segment, bool with_lengths, Sections& to);
  OutputRows pooled_rows(const Segment& segment, const Band& band, const LookupOutput& out) const;
  std::byte* sequence_rows(size_t part, const Band& band, int64_t row, const LookupOutput& out) const;
  void merge_whole(int32_t leg, const std::byte* block, const LookupOutput& out);
  void merge_sequence(int32_t leg, const std::byte* block, const LookupOutput& out);
  void place_sequences(const std::vector<Fault>& faults);

  const Routes* routes_ = nullptr;
  const Part* parts_ = nullptr;
  size_t part_count_ = 0;
  int64_t total_samples_ = 0;
  std::vector<int64_t> batches_;
  std::vector<int64_t> out_rows_;
  std::vector<int64_t> value_begin_;     // [part, feature]: first value of the feature in the part (jagged)
  std::vector<Cursor> cursor_;           // [part, leg]
  std::vector<int64_t> sequence_begin_;  // [part, feature]: first output row in the feature's sequence
  std::vector<Live> live_;
  std::vector<Chunk> chunks_;
  std::vector<Segment> segments_;
  size_t segments_of_ = SIZE_MAX;
  std::vector<uint64_t> column_last_, column_signs_;
  std::vector<int32_t> sidecar_of_set_;
  std::vector<std::vector<int32_t>> legs_of_;
  struct Cost {
    uint64_t request = 0, response = 0, values = 0;  // bytes, bytes, ids
  };
  std::vector<Cost> chunk_cost_, block_cost_;  // per sidecar
  SortedIds sorted_;
  Partials partials_;
};

}  // namespace sidepool
