// From a caller's jagged tensors to one request frame per sidecar, and from partials back to the caller's output.
#pragma once
#include <cstdint>
#include <vector>

#include "frames.hpp"

namespace sidepool {

// A feature as the ranker needs to know it.
struct RoutedFeature {
  int64_t rows = 0;
  int32_t dim = 0;
  Pooling pooling = Pooling::sum;
  bool weighted = false;
  OutOfRange policy = OutOfRange::error;
  int32_t sidecar = 0;
  int64_t out_column = 0;   // first value of this feature in an output row; unused for none
  int32_t sequence = -1;    // index among the `none` features
  int32_t fixed_begin = 0;  // columns of a fixed-width id matrix
  int32_t fixed_width = 1;
};

// One request's ids, int64 or int32; frames carry int64. Jagged: lengths is [features × batch], feature-major.
// Fixed-width: lengths is null and values is [batch, width].
struct Part {
  const void* values = nullptr;
  bool int32_values = false;
  int64_t value_count = 0;
  const int32_t* lengths = nullptr;
  int64_t length_count = 0;
  const float* weights = nullptr;
  int64_t weight_count = 0;
  int64_t fixed_batch = 0;
  int64_t fixed_width = 0;

  // Calls `use` with the ids as what they are: a loop over them is compiled for each.
  template <class Use>
  auto with_values(Use use) const {
    return int32_values ? use(static_cast<const int32_t*>(values)) : use(static_cast<const int64_t*>(values));
  }
};

struct LookupOutput {
  std::byte* pooled = nullptr;
  int64_t stride = 0;  // values from one row to the next
  std::byte* const* sequences = nullptr;
  OutputFormat format = OutputFormat::fp32;
};

// The plan as a ranker uses it; immutable once built.
struct Routes {
  std::vector<RoutedFeature> features;
  std::vector<std::vector<int32_t>> of_sidecar;  // features of each sidecar, in plan order
  bool any_weighted = false;
  int32_t max_fixed_column = 0;  // columns a fixed-width matrix must have
};

struct SlotBudget {
  size_t request_bytes = 0;
  size_t payload_bytes = 0;
};

// One lookup being routed. Reused from lookup to lookup by its thread: memory grows to the largest and stays.
class RoutedLookup {
 public:
  // Check every part and say what is wrong in `faults` (one per part). Parts with a fault take no part in what follows.
  void admit(const Routes& routes, const Part* parts, size_t count, std::vector<Fault>& faults);

  // Cut the samples into chunks that fit every sidecar's slots. A part with a sample too large for any slot is faulted.
  void plan(const std::vector<SlotBudget>& budgets, OutputFormat output, std::vector<Fault>& faults);
  size_t chunk_count() const { return chunks_.size(); }

  // Samples of the whole call and of the chunk.
  int64_t samples() const { return total_samples_; }
  uint32_t chunk_batch(size_t chunk) const { return uint32_t(chunks_[chunk].end - chunks_[chunk].begin); }

  // What one subrequest needs; `counts` gets the number of values per feature of the sidecar. Chunks must be measured
  // and encoded in order, each sidecar once per chunk.
  struct Size {
    RequestLayout layout;
    uint64_t values = 0;
  };
  Size measure(size_t chunk, int32_t sidecar, std::vector<uint64_t>& counts);
  // Write entries, lengths, values and weights behind the header at `frame`; consumes the chunk's values.
  void encode(size_t chunk, int32_t sidecar, const std::vector<uint64_t>& counts, const Size& size, std::byte* frame);

  // Copy one feature's block into the output. `position` is its place among the sidecar's features.
  void merge(size_t chunk, int32_t feature, const std::byte* block, const LookupOutput& out);
  void zero(size_t chunk, int32_t feature, const LookupOutput& out);
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
  void segments(size_t chunk);
  void transpose_ids(const std::vector<int32_t>& mine, const std::vector<uint64_t>& counts, int64_t* values) const;
  void encode_bags(int32_t feature, const Segment& segment, bool with_lengths, Sections& to);
  std::byte* pooled_rows(const Segment& segment, const RoutedFeature& feature, const LookupOutput& out) const;
  std::byte* sequence_rows(const Segment& segment, int32_t feature, const LookupOutput& out) const;
  void place_sequences(const std::vector<Fault>& faults);
  bool fits(int32_t sidecar, int64_t batch, uint64_t values, uint64_t sequence_values, OutputFormat output,
            const SlotBudget& budget) const;

  const Routes* routes_ = nullptr;
  const Part* parts_ = nullptr;
  size_t part_count_ = 0;
  int64_t total_samples_ = 0;
  std::vector<int64_t> batches_;
  std::vector<int64_t> out_rows_;
  std::vector<int64_t> value_begin_;     // [part, feature]: first value of the feature in the part (jagged)
  std::vector<int64_t> cursor_;          // [part, feature]: values consumed by encoded chunks (jagged)
  std::vector<int64_t> sequence_begin_;  // [part, feature]: first output row in the feature's sequence
  std::vector<Live> live_;
  std::vector<Chunk> chunks_;
  std::vector<Segment> segments_;
  size_t segments_of_ = SIZE_MAX;
  std::vector<uint64_t> column_last_, column_signs_;
  std::vector<uint64_t> cost_values_, cost_sequence_, block_values_, block_sequence_;
};

}  // namespace sidepool
