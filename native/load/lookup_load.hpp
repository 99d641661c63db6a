// Lookups of an embedded client in an open loop, with fp32 results: over sidecars, or in this process.
#pragma once
#include <memory>
#include <vector>

#include "client.hpp"
#include "load.hpp"

namespace sidepool {

struct LookupTarget {
  std::shared_ptr<LookupClient> client;
  // To which the schedule refers by place; what they point to is the caller's and stays.
  std::vector<Part> requests;
  // Lookups block, so that each one under way has a thread. A request due while all are busy starts late, which its latency shows.
  int callers = 1;
  uint64_t spin_ns = 0;
  // Of each lookup, from the time that it was due. What is late by more than this ends with Status::deadline.
  uint64_t budget_ns = 0;
  int32_t priority = 0;
};

// Its statuses are `Status`.
std::unique_ptr<Load> make_lookup_load(LookupTarget target);

}  // namespace sidepool
