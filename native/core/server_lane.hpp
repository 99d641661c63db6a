// The sidecar's end of a lane. Every method is called by the engine thread that owns the lane, and by no other.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "frames.hpp"
#include "lines.hpp"
#include "memory.hpp"
#include "serve.hpp"

namespace sidepool {

struct LaneLimits {
  uint32_t slots = 0;
  uint64_t request_bytes = 0;
  uint64_t response_bytes = 0;
};

struct LaneCounters {
  Counter received, sent, request_bytes, response_bytes, credit_waits, busy_ns;
  Counter grants, grant_us;  // tcp, peers of this host: grants that came, and the time from being due to being seen
  Counter queued, queued_bytes;  // requests waiting at this moment
  Counter in_flight;             // and those that are not answered in full: waiting, being served, or
  Counter leaving_bytes;         // with so many bytes of responses that wait for credit or room
  Counter late_bytes;            // of responses that stayed here: their deadlines passed while they waited to leave
  void add(const LaneCounters& other) {
    received.add(other.received.get());
    sent.add(other.sent.get());
    request_bytes.add(other.request_bytes.get());
    response_bytes.add(other.response_bytes.get());
    credit_waits.add(other.credit_waits.get());
    busy_ns.add(other.busy_ns.get());
    grants.add(other.grants.get());
    grant_us.add(other.grant_us.get());
    late_bytes.add(other.late_bytes.get());
  }
};

class RdmaDomain;

class alignas(kCacheLine) ServerLane : public ResponseSink {
 public:
  ServerLane(const LaneLimits& limits, Fd socket) : limits_(limits), socket_(std::move(socket)) {}

  virtual const char* kind() const = 0;
  // The calling engine thread owns the lane from now on.
  virtual void adopted() {}

  // Moving to another engine, in this order. What the lane needs at an engine with this domain; any thread. Throws
  // Error(rejected) where such a lane cannot move.
  struct Twin {
    virtual ~Twin() = default;
  };
  virtual std::unique_ptr<Twin> make_twin(RdmaDomain* target) const = 0;
  virtual void begin_move(std::unique_ptr<Twin>) {}
  // Whether everything that must leave from the old engine has left.
  virtual bool ready_to_move() const { return !wants_write(); }
  // The last call of the old engine; the next is the new one's `adopted`.
  virtual void leave() {}

  // A number that stays with the lane, for people and statistics.
  uint64_t id() const { return id_; }
  void set_id(uint64_t id) { id_ = id; }

  // Requests that have arrived since the last call: their slots are appended. False: the peer is gone or broke the
  // protocol, and the lane must be dropped. `readable` says that the socket has something to read.
  virtual bool collect(LineVector<uint32_t>& slots, bool readable) = 0;
  // Whether collect without a readable socket can find anything (memory the engine must poll).
  virtual bool polled() const = 0;
  virtual bool has_pending() const { return false; }

  // The request of a slot that collect named: the frame and its length (already checked against the slot).
  virtual std::pair<const std::byte*, size_t> request(uint32_t slot) const = 0;
  virtual std::pair<std::byte*, size_t> payload(uint32_t slot) = 0;
  // From now on progress() speaks of this slot. Nobody waits for what leaves after `deadline_ns`.
  virtual void begin(uint32_t slot, const ParsedRequest& request, uint64_t deadline_ns) = 0;
  // The subrequest is over: publish what has not been published and the header. False: drop the lane.
  virtual bool finish(ResponseHeader header) = 0;
  // The socket can take more bytes.
  virtual bool writable() { return true; }
  virtual bool wants_write() const { return false; }
  // Of what waits to leave, whether it waits for the socket rather than for credit.
  virtual bool wants_room() const { return wants_write(); }
  // A second socket, on which grants come; -1: none. False of take_grants: drop the lane.
  virtual int grants_fd() const { return -1; }
  virtual bool take_grants() { return true; }

  int fd() const { return socket_.get(); }
  const LaneLimits& limits() const { return limits_; }
  LaneCounters& counters() { return counters_; }

 protected:
  LaneLimits limits_;
  Fd socket_;
  LaneCounters counters_;
  uint64_t id_ = 0;
};

// What the two ends of an shm lane map. One control line per slot keeps slots from sharing a cache line.
struct alignas(64) SlotControl {
  // Features complete so far; kSlotDone on top once the header is final.
  std::atomic<uint32_t> word{0};
  std::atomic<uint32_t> waiting{0};
};
constexpr uint32_t kSlotDone = 1u << 31;
// Set by the ranker alone: the lane is dead; the right to read the socket is passed on (flips). Both only make the
// word differ from what a sleeping thread waits on.
constexpr uint32_t kSlotDead = 1u << 30;
constexpr uint32_t kSlotPass = 1u << 29;
constexpr uint32_t kSlotProgress = (1u << 24) - 1;

struct ShmHeader {
  alignas(64) std::atomic<uint64_t> pending{0};  // ranker → sidecar: one bit per slot with a new request
  SlotControl control[kMaxSlots];
};
constexpr size_t kShmHeaderBytes = 8192;
static_assert(sizeof(ShmHeader) <= kShmHeaderBytes);

// One per engine, mapped read-only by its rankers.
struct EnginePage {
  std::atomic<uint32_t> sleeping{0};
};

inline size_t shm_bytes(const LaneLimits& limits) {
  return kShmHeaderBytes + limits.slots * (limits.request_bytes + limits.response_bytes);
}
inline size_t shm_request_offset(const LaneLimits& limits, uint32_t slot) { return kShmHeaderBytes + slot * limits.request_bytes; }
inline size_t shm_response_offset(const LaneLimits& limits, uint32_t slot) {
  return kShmHeaderBytes + limits.slots * limits.request_bytes + slot * limits.response_bytes;
}

// Makes the sealed memfd of a lane; the socket's peer gets it with the acknowledgement.
struct ShmRegion {
  Fd memfd;
  Mapping mapping;
};
ShmRegion make_shm_region(const LaneLimits& limits);

std::unique_ptr<ServerLane> make_shm_server_lane(const LaneLimits& limits, Fd socket, ShmRegion region);
struct TcpOptions {
  bool dedicated = false;     // credits travel on a connection of their own
  uint64_t window_bytes = 0;  // of requests that a ranker may have under way, as `window_for` reads it
  uint8_t traffic_class = 0, control_traffic_class = 0;
};
// Without a socket for `grants`, credits travel in frames.
std::unique_ptr<ServerLane> make_tcp_server_lane(const LaneLimits& limits, Fd socket, Fd grants, const Hello& peer, uint64_t window_bytes);

}  // namespace sidepool
