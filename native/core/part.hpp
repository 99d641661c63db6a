// What a caller hands over for a lookup, and where the results go.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tables.hpp"

namespace sidepool {

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

}  // namespace sidepool
