// The same lookup over and over, with no Python between: what benchmarks of lanes measure.
#pragma once
#include "client.hpp"

namespace sidepool {

// `count` lookups of `part` (one id per feature and sample) from `threads` threads together; each has its own output. Returns
// nanoseconds for all; throws Error with the status of the first that failed.
uint64_t repeat_lookups(LookupClient& client, const Part& part, int64_t out_width, uint64_t count, int threads);

}  // namespace sidepool
