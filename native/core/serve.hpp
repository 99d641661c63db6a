// Answering one subrequest: the same code behind every lane.
#pragma once
#include <cstdint>

#include "board.hpp"
#include "counters.hpp"
#include "frames.hpp"

namespace sidepool {

// Where the pooled blocks go, and who is told as they become ready.
class ResponseSink {
 public:
  virtual ~ResponseSink() = default;
  // `done` features (in request order) lie complete in the payload, which is `bytes` long so far.
  virtual void progress(uint32_t done, size_t bytes) = 0;
};

struct ServeInput {
  const ParsedRequest* request = nullptr;
  uint64_t received_ns = 0;
  std::byte* payload = nullptr;  // 64-byte aligned, behind the response header
  size_t payload_capacity = 0;
};

// How a large subrequest is shared with other engines.
struct Sharing {
  Board* board;
  size_t engine;         // whose offer it is
  size_t wake;           // sleeping engines to wake at most
  int64_t piece_values;  // ids per piece, about
  // Written: the calling thread's part of the work.
  int64_t own_values = 0;
  uint64_t own_ns = 0;
};

// Pool every feature of the request into the payload, telling the sink after each. The returned header describes the
// outcome (status, fault, times); its first/count/frame_bytes/flags are for the lane to fill. `tables` may be null
// (nothing published yet). Runs on the caller's thread; allocates nothing once warm. With `sharing`, other engines may pool
// pieces of it meanwhile: outcome, counters and bits of the result are the same, and nobody touches anything of the
// subrequest after the call. Without `sharing` the calling thread is alone.
ResponseHeader serve(const TableSet* tables, const ServeInput& input, ResponseSink& sink, TableCounters* counters,
                     Sharing* sharing = nullptr);

}  // namespace sidepool
