// The ranker's end of a lane: slots are acquired, filled in place, posted, waited for, and released.
//
// Any thread may use a lane; a slot belongs to the thread that acquired it until it releases or abandons it. An
// abandoned slot (its deadline passed) stays out of use until the sidecar has answered it: the sidecar may still write.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "clock.hpp"
#include "server_lane.hpp"

namespace sidepool {

class alignas(kCacheLine) ClientLane {
 public:
  explicit ClientLane(const LaneLimits& limits);
  virtual ~ClientLane() = default;

  virtual const char* kind() const = 0;
  const LaneLimits& limits() const { return limits_; }
  size_t payload_capacity() const { return limits_.response_bytes - sizeof(ResponseHeader); }
  bool same_clock() const { return same_clock_; }
  // Whether its responses cross a network that others' may congest: they are under the ranker's receive window.
  virtual bool windowed() const { return false; }
  // Whether the `marks` of responses have grown since this was last said.
  bool newly_marked() {
    const uint32_t marks = marks_.load(std::memory_order_relaxed);
    return marks != marks_told_.load(std::memory_order_relaxed) && marks_told_.exchange(marks, std::memory_order_relaxed) != marks;
  }

  // A free slot, waiting for one until the deadline. -1: none became free; -2: the lane is dead.
  int acquire(uint64_t deadline_ns);
  int try_acquire();
  bool has_free() const { return free_.load(std::memory_order_acquire) != 0; }

  virtual std::byte* request(uint32_t slot) = 0;
  virtual std::byte* response(uint32_t slot) = 0;  // header, then payload

  // Send the frame in the slot. `expected` describes the blocks of the answer (offsets of features in the payload,
  // one more than there are features), valid until the slot is released or abandoned.
  Status post(uint32_t slot, size_t bytes, uint64_t lookup_id, const std::vector<size_t>& offsets, uint64_t deadline_ns);

  // Wait until more than `seen` features are complete, the response is final, or the deadline. Returns the slot's word:
  // features complete, with kSlotDone on top when final. Status through `status`: ok, deadline or transport.
  uint32_t wait(uint32_t slot, uint32_t seen, uint64_t deadline_ns, uint64_t spin_ns, Status& status);

  void release(uint32_t slot);
  void abandon(uint32_t slot);

  // Why it is dead, where the lane knows more than that its peer is gone.
  virtual const char* why_lost() const { return ""; }
  bool dead() const { return dead_.load(std::memory_order_acquire); }
  // Nothing more will arrive: every waiter returns transport. Thread-safe, idempotent.
  void kill();

  // Socket to watch for the peer's end, or -1; on_hangup is called when it has come.
  virtual int fd() const { return -1; }
  virtual void on_hangup() { kill(); }

  // Take in what has arrived, without waiting: answers to abandoned slots have no waiter who would.
  virtual void collect() {}

  struct Counters {
    std::atomic<int64_t> sent{0}, received{0}, request_bytes{0}, response_bytes{0}, credit_waits{0};
  };
  const Counters& counters() const { return counters_; }

 protected:
  struct alignas(kCacheLine) SlotState {
    std::atomic<uint64_t> lookup_id{0};
    std::vector<size_t> offsets;  // capacity grows to the widest lookup, then stays
    uint32_t vain = 0;            // waits in a row that spinning did not cover; of whoever owns the slot
  };

  // The slot's response has been used and is about to be free; called by the thread that frees it.
  virtual void released(uint32_t) {}
  virtual SlotControl& control(uint32_t slot) = 0;
  virtual Status send(uint32_t slot, size_t bytes, uint64_t deadline_ns) = 0;
  // Whether responses appear without anybody's help, so that spinning on the slot's word makes sense.
  virtual bool arrives_by_itself() const { return true; }
  // Receive, or sleep until the word may differ from `word`. Returns early at will.
  virtual void receive_or_sleep(uint32_t slot, uint32_t word, uint64_t until_ns, uint64_t spin_ns);
  void mark_done(uint32_t slot, uint32_t done);
  void reclaim();

  LaneLimits limits_;
  bool same_clock_ = true;
  Waiters waiters_ = Waiters::here;  // of the slots' words
  std::atomic<bool> dead_{false};
  std::atomic<uint64_t> free_;
  std::atomic<uint64_t> abandoned_{0};
  std::atomic<uint32_t> released_{0};  // bumped with every slot that becomes free; waited on by acquire
  std::atomic<uint32_t> acquirers_{0};
  std::atomic<uint32_t> marks_{0};  // of the newest response, also of one that nobody waited for; written by who receives
  std::atomic<uint32_t> marks_told_{0};
  std::unique_ptr<SlotState[]> slots_;
  Counters counters_;
};

// Connect and shake hands within the timeout; throws Error(transport | overloaded | frame).
std::shared_ptr<ClientLane> connect_shm(const std::string& path, const std::string& token, double timeout_s);
// `window_bytes`: of responses that the sidecar may have under way, as `window_for` reads it.
std::shared_ptr<ClientLane> connect_tcp(const std::string& host, int port, const std::string& token, double timeout_s,
                                        uint64_t window_bytes = 0);
std::shared_ptr<ClientLane> make_local_lane(std::shared_ptr<const TableSet> tables);

// A lane whose frames somebody else carries (grpc): take a request, deliver its response.
class ExternalLane : public ClientLane {
 public:
  using ClientLane::ClientLane;
  struct Request {
    uint64_t ticket = 0;
    std::string frame;
    uint64_t budget_ns = 0;
  };
  // False after the timeout, or once the lane is dead.
  virtual bool take(Request& out, double timeout_s) = 0;
  virtual void deliver(uint64_t ticket, const std::byte* frames, size_t bytes, Status status) = 0;
};
std::shared_ptr<ExternalLane> make_external_lane(const LaneLimits& limits);

}  // namespace sidepool
