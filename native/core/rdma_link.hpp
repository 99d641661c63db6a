// What the two ends of an rdma lane have in common: registered memory, the pair of queues, the credits.
#pragma once
#include "rdma_domain.hpp"

#ifdef SIDEPOOL_VERBS
#include "clock.hpp"
#include "credit.hpp"

namespace sidepool {

// A lane's own protection domain and regions: no other lane's queue pair can reach them. Registered once, at connect; shared
// by the lane and the queue pairs it moves to.
struct RdmaMemory {
  // Peers may write `landing_bytes` (frames) and the control page; `staging_bytes` are only sent from.
  RdmaMemory(std::shared_ptr<RdmaDevice> device, size_t landing_bytes, size_t staging_bytes);

  std::shared_ptr<RdmaDevice> device;
  Mapping landing, staging, page;
  Owned<ibv_pd> pd;
  Owned<ibv_mr> landing_mr, staging_mr, page_mr;

  // What the peer writes here; written by its adapter, so read as memory that changes by itself.
  RdmaControl& control() const { return *reinterpret_cast<RdmaControl*>(page.data()); }
  // What is sent to the peer's page from here.
  RdmaControl& outgoing() const { return *reinterpret_cast<RdmaControl*>(page.data() + 2048); }
};

struct RdmaLink {
  std::unique_ptr<RdmaQueue> data, control;  // no control: credits travel on the data queue

  RdmaLink() = default;
  RdmaLink(VerbsDomain& domain, const RdmaMemory& memory, const RdmaQueue::Depths& depths, bool dedicated);
  void connect(const RdmaEnd& peer, const RdmaMove& queues);
  RdmaMove numbers() const;
  void bind(QueueOwner* owner);
  explicit operator bool() const { return data != nullptr; }
  bool owns(const RdmaQueue& queue) const { return &queue == data.get() || &queue == control.get(); }
};

// How many bytes a peer's window lets be under way, in pieces that do not outnumber its receives.
uint64_t piece_bytes_for(const RdmaOptions& options, const RdmaEnd& peer, uint32_t slots);
// Receives that an end keeps for a lane: one per slot, the lane's own messages, and pieces of a window.
uint32_t receives_for(uint32_t slots, bool ranker);
// Checks that hold for both ends. Throws Error(transport).
RdmaEnd parse_end(const RdmaDevice& device, const std::string& bytes, const LaneLimits& limits, uint64_t stride);

// The half of a lane that both ends share. Everything is the owning engine thread's.
class RdmaPeer : public QueueOwner {
 public:
  RdmaPeer(std::shared_ptr<RdmaMemory> memory, RdmaLink link, const RdmaEnd& peer, uint64_t window_bytes);

  bool failed() const { return why_.load(std::memory_order_relaxed) != nullptr; }
  // Any thread.
  const char* why() const {
    const char* why = why_.load(std::memory_order_acquire);
    return why != nullptr ? why : "";
  }
  const RdmaMemory& memory() const { return *memory_; }
  RdmaQueue& data() { return *link_.data; }
  VerbsDomain& domain() { return link_.data->domain(); }

  void on_failure(RdmaQueue& queue, const char* why) override;
  void on_tick(uint64_t now_ns) override;

 protected:
  bool piggybacks() const { return piggybacks_; }
  void fail(const char* why);
  // Room for `bytes` of a frame in the peer's memory and on the queue.
  bool may_send(uint64_t bytes) { return data().room() && credit_.covers(bytes); }
  void send(const std::byte* from, uint32_t lkey, size_t bytes, uint64_t to, RdmaImmediate immediate);
  // A message about the lane itself; `move` goes into the peer's control page first.
  void tell(RdmaKind kind, const RdmaMove* move = nullptr, bool signalled = false);
  // Look for grants in the control page. True: more may be sent than before.
  bool take_grant();
  void take_grant(const Grant& grant);
  // Tell the peer how much it may send, where enough has been consumed or `always`.
  void give_grant(bool always = false, bool signalled = false);
  // In frames, where credits are piggybacked.
  void put_grant(std::byte* header);
  void wait_for_credit();
  // The end of the lane at this end: say so to a peer that listens, and leave the queues to their domain.
  void part();

  std::shared_ptr<RdmaMemory> memory_;
  RdmaLink link_;
  const bool piggybacks_;
  const RdmaEnd peer_;
  SendCredit credit_;
  ReceiveCredit window_;
  bool waiting_ = false;
  std::atomic<const char*> why_{nullptr};
  uint64_t due_since_ns_ = 0;
};

}  // namespace sidepool
#endif
