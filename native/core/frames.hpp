// The frames of docs/wire-format.md: fixed little-endian structs, and the only code that turns bytes into them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "lines.hpp"
#include "tables.hpp"

namespace sidepool {

constexpr uint32_t kMagic = 0x31465053;  // "SPF1"
constexpr uint8_t kWireVersion = 1;
constexpr size_t kAlign = 64;

constexpr size_t align_up(size_t n) { return (n + kAlign - 1) & ~(kAlign - 1); }

enum class FrameKind : uint8_t { hello = 1, hello_ack = 2, request = 3, response = 4, rdma_end = 5, grant = 6, hello_credits = 7 };

// Bounds that hold before anything is read or allocated. A plan has at most 65,536 features (wire/plan.py); a bag
// index fits 31 bits with room for products; a slot never exceeds 1 GiB.
constexpr uint32_t kMaxFeatures = 65536;
constexpr uint32_t kMaxBatch = 1u << 24;
constexpr uint64_t kMaxSlotBytes = 1ull << 30;
constexpr uint32_t kMaxSlots = 64;  // one bit each in the pending word

constexpr uint16_t kLastPiece = 1;       // response flag: the lookup is complete with this piece
// Entry flags.
constexpr uint16_t kWeightedEntry = 1;  // the weights section covers this feature
constexpr uint16_t kPartialEntry = 2;   // fp32 sums (of mean too: undivided) or maxima, whatever the output format
constexpr uint16_t kRowsEntry = 4;      // fp32 rows of the ids, as pooling `none`, whatever the feature's pooling
constexpr uint16_t kEntryFlags = 7;

struct Hello {
  uint32_t magic = kMagic;
  uint8_t version = kWireVersion;
  FrameKind kind = FrameKind::hello;
  uint16_t flags = 0;
  uint8_t token[16] = {};
  uint64_t window_bytes = 0;  // tcp: credit for responses that the ranker grants from the start; 0: four response slots
  uint64_t clock_id = 0;      // tcp: as HelloAck's
  uint8_t reserved[24] = {};
};

struct HelloAck {
  uint32_t magic = kMagic;
  uint8_t version = kWireVersion;
  FrameKind kind = FrameKind::hello_ack;
  uint16_t flags = 0;
  int32_t status = 0;
  uint32_t slots = 0;
  uint64_t request_bytes = 0;
  uint64_t response_bytes = 0;
  uint64_t clock_id = 0;  // equal on both ends: their monotonic clocks are the same clock
  uint64_t window_bytes = 0;  // tcp: credit for requests, as Hello's for responses
  uint8_t dedicated = 0;      // tcp: 1 where credits travel on a connection of their own
  uint8_t traffic_class = 0, control_traffic_class = 0;  // tcp: of both ends' packets
  uint8_t reserved[13] = {};
};

struct RequestHeader {
  uint32_t magic = kMagic;
  uint8_t version = kWireVersion;
  FrameKind kind = FrameKind::request;
  uint16_t flags = 0;
  uint64_t frame_bytes = 0;
  uint32_t slot = 0;
  int32_t priority = 0;
  uint64_t lookup_id = 0;
  uint64_t epoch = 0;
  uint64_t budget_ns = 0;  // what is left of the caller's budget when the frame is sent
  uint64_t sent_ns = 0;    // sender's monotonic clock
  uint32_t batch = 0;
  uint32_t feature_count = 0;
  uint64_t value_count = 0;
  uint8_t trace[26] = {};
  OutputFormat output_format = OutputFormat::fp32;  // of every block of the response
  uint8_t reserved[29] = {};
};

struct FeatureEntry {
  uint32_t feature = 0;       // position in the plan
  uint16_t flags = 0;
  uint16_t shard = 0;         // among the distinct shards of the feature's table
  int32_t fixed_length = -1;  // ids in every bag, or -1: the lengths section says
  uint32_t bags = 0;          // those that have ids in the shard; 0: the batch, with or without
  uint64_t value_count = 0;

  uint32_t bag_count(uint32_t batch) const { return bags != 0 ? bags : batch; }
  OutputFormat format(OutputFormat wanted) const { return flags & (kPartialEntry | kRowsEntry) ? OutputFormat::fp32 : wanted; }
};

struct ResponseHeader {
  uint32_t magic = kMagic;
  uint8_t version = kWireVersion;
  FrameKind kind = FrameKind::response;
  uint16_t flags = 0;
  uint64_t frame_bytes = 0;
  uint32_t slot = 0;
  int32_t status = 0;
  uint64_t lookup_id = 0;
  uint64_t epoch = 0;
  uint32_t first = 0;  // position within the request of the first feature of this piece
  uint32_t count = 0;
  uint32_t batch = 0;
  int32_t reason = 0;
  int32_t fault_feature = -1;
  uint32_t reserved0 = 0;
  int64_t fault_bag = -1;
  int64_t fault_value = 0;
  uint64_t received_ns = 0;  // sidecar's monotonic clock: frame seen, pooling begun, piece ready
  uint64_t started_ns = 0;
  uint64_t finished_ns = 0;
  uint32_t marks = 0;  // tcp: segments of this lane that the network marked (ECN) or lost so far; they tell of congestion
  uint8_t reserved[20] = {};
};

// Bytes that may have been sent since the lane began; a later grant includes every earlier one, so none can be lost.
struct Grant {
  uint64_t limit = 0;
  uint64_t granted_ns = 0;  // granter's monotonic clock
};

// Where a grant rides in a request or response header: the last 16 bytes, else zero.
constexpr size_t kGrantOffset = sizeof(RequestHeader) - sizeof(Grant);

// A grant by itself, on a tcp lane. As long as a request's header, so that it can come in its place.
struct GrantFrame {
  uint32_t magic = kMagic;
  uint8_t version = kWireVersion;
  FrameKind kind = FrameKind::grant;
  uint16_t flags = 0;
  uint64_t frame_bytes = sizeof(RequestHeader);
  uint8_t reserved[96] = {};
  Grant grant;
};

static_assert(sizeof(GrantFrame) == sizeof(RequestHeader) && offsetof(GrantFrame, grant) == kGrantOffset);
static_assert(sizeof(Hello) == 64 && sizeof(HelloAck) == 64 && sizeof(RequestHeader) == 128);
static_assert(sizeof(FeatureEntry) == 24 && sizeof(ResponseHeader) == sizeof(RequestHeader));
static_assert(std::is_trivially_copyable_v<RequestHeader> && std::is_trivially_copyable_v<ResponseHeader>);
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little-endian structs");

// Where the sections of a request lie, as byte offsets from its header.
struct RequestLayout {
  size_t entries = 0;
  size_t lengths = 0;
  size_t values = 0;
  size_t weights = 0;
  size_t total = 0;
};

RequestLayout request_layout(size_t features, size_t length_count, size_t value_count, size_t weight_count);

// A request that passed every check. Entries are a private copy; lengths, values and weights still point into the
// frame, which a peer may go on writing: pool_feature reads each word once.
struct ParsedRequest {
  RequestHeader header;
  LineVector<FeatureEntry> entries;
  const int32_t* lengths = nullptr;
  const int64_t* values = nullptr;
  const float* weights = nullptr;
};

// Header checks that need no look at the body. Returns Status::ok or Status::frame.
Status check_request_header(const RequestHeader& header, uint64_t slot_bytes, uint32_t slots);

// Parse `bytes` at `frame` (64-byte aligned). Reuses the memory of `out`: no allocation once it has grown.
Status parse_request(const std::byte* frame, size_t bytes, ParsedRequest& out);

// Response header checks on the ranker's side, against what was asked for.
Status check_response_header(const ResponseHeader& header, uint32_t feature_count);

// How the block of an entry is pooled, whose feature asks for `pooling`.
inline Pooling block_pooling(const FeatureEntry& entry, Pooling pooling) {
  if (entry.flags & kRowsEntry) return Pooling::none;
  return (entry.flags & kPartialEntry) && pooling == Pooling::mean ? Pooling::sum : pooling;
}

// Bytes of one entry's block in a response slot: rows of the entry's format, padded to 64.
inline size_t block_bytes(const FeatureEntry& entry, Pooling pooling, int32_t dim, uint32_t batch, OutputFormat output) {
  const uint64_t rows = block_pooling(entry, pooling) == Pooling::none ? entry.value_count : entry.bag_count(batch);
  return align_up(rows * size_t(dim) * value_bytes(entry.format(output)));
}

// Identifies the clock behind now_ns: equal on two processes of one host.
uint64_t clock_id();

}  // namespace sidepool
