// Where partials of one chunk are merged: in the caller's output, or in fp32 beside it where the output is narrower.
#pragma once
#include <cstdint>
#include <vector>

#include "part.hpp"
#include "routes.hpp"

namespace sidepool {

// Samples of a chunk that lie one below the other in the output.
struct OutputRows {
  std::byte* first = nullptr;  // the band's first column
  int64_t stride_bytes = 0;
  int64_t samples = 0;
};

// One chunk at a time. Reused: memory grows to the largest chunk and stays. One thread.
class Partials {
 public:
  void begin(const Routes& routes, int64_t batch, OutputFormat format);

  // Merges a block into samples `sample`, sample + 1, … of the chunk: one row for each bag with ids, or, with `rows`, one
  // for each id (`weights`: theirs, null for none). `lengths`: ids per bag. Returns the rest of the block.
  const float* merge(const Band& band, int64_t sample, const OutputRows& to, const int32_t* lengths, const float* block, bool rows,
                     const float* weights);
  // Nothing more will come for these samples: divides means, fills bags without ids with zeros, rounds.
  void finish(const Band& band, int64_t sample, const OutputRows& to);

 private:
  float* sum(const Band& band, int64_t sample, const OutputRows& to, int64_t i);
  int32_t* merged(const Band& band, int64_t sample) { return &merged_[size_t(int64_t(band.sorted) * batch_ + sample)]; }

  const Routes* routes_ = nullptr;
  int64_t batch_ = 0;
  OutputFormat format_ = OutputFormat::fp32;
  std::vector<int32_t> merged_;  // [sorted band, sample]: ids merged so far
  std::vector<float> wide_;      // [partial band][sample, column], for outputs narrower than fp32
  std::vector<int64_t> ordinals_;
};

}  // namespace sidepool
