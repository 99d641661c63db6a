// What the two ends of an rdma lane tell each other besides frames; docs/wire-format.md is the specification.
#pragma once
#include <atomic>

#include "frames.hpp"

namespace sidepool {

// One end of a lane: exchanged once, over the control plane. Little-endian, 128 bytes.
struct RdmaEnd {
  uint32_t magic = kMagic;
  uint8_t version = kWireVersion;
  FrameKind kind = FrameKind::rdma_end;
  uint8_t link_layer = 0;   // 1 InfiniBand, 2 Ethernet
  uint8_t mtu = 0;          // 1 to 5: 256 to 4096 bytes
  uint8_t gid[16] = {};
  uint32_t data_qpn = 0, data_psn = 0;
  uint32_t control_qpn = 0, control_psn = 0;  // 0: credits travel in frames and on the data queue pair
  uint16_t lid = 0;
  uint16_t reserved0 = 0;
  uint32_t receives = 0;          // receives this end keeps posted on its data queue pair
  uint64_t slots_address = 0;     // where the peer writes: requests at the sidecar, responses at the ranker
  uint64_t control_address = 0;   // a RdmaControl that the peer writes
  uint32_t slots_rkey = 0, control_rkey = 0;
  uint64_t slot_stride = 0;       // bytes from one slot to the next
  uint64_t window_bytes = 0;      // credit this end grants from the start
  uint64_t clock_id = 0;
  uint32_t slots = 0;
  uint8_t reserved[28] = {};
};

// The twin queue pairs of a lane that moves to another engine.
struct RdmaMove {
  uint32_t data_qpn = 0, data_psn = 0;
  uint32_t control_qpn = 0, control_psn = 0;
};

// What a peer writes into this end's memory besides frames.
struct RdmaControl {
  alignas(64) Grant grant;
  alignas(64) RdmaMove move;
};

static_assert(sizeof(RdmaEnd) == 128 && sizeof(RdmaMove) == 16 && sizeof(Grant) == 16 && sizeof(RdmaControl) == 128);

// The immediate: kind in bits 28 to 31, features complete in bits 6 to 27, slot in bits 0 to 5.
enum class RdmaKind : uint32_t {
  request = 1,   // the frame lies in the slot
  piece = 2,     // more of the response's payload lies in the slot
  last = 3,      // the rest of the payload, and behind it the response's header
  bye = 4,       // this end closes
  offer = 5,     // sidecar → ranker: a RdmaMove lies in the control page; connect twins to it
  accept = 6,    // ranker → sidecar: the ranker's twins lie in the control page
  change = 7,    // sidecar → ranker: the twins work; use them from now on
  changed = 8,   // ranker → sidecar: the last message on the old queue pair
  closed = 9,    // sidecar → ranker: the same
};

struct RdmaImmediate {
  RdmaKind kind;
  uint32_t slot = 0;
  uint32_t done = 0;

  uint32_t encode() const { return uint32_t(kind) << 28 | done << 6 | slot; }
  static RdmaImmediate decode(uint32_t word) { return {RdmaKind(word >> 28), word & 63, word >> 6 & 0x3fffff}; }
};

// A pooled response ends with its header, so that payload and header are one write: a slot at the ranker is this much
// longer than what the lane's limits say.
constexpr size_t kTrailerBytes = sizeof(ResponseHeader);

}  // namespace sidepool
