// A ranker's engine: one thread that posts and polls for its rdma lanes. Callers hand a request over by setting its slot's
// bit and wait on the slot's word, as with shm.
#pragma once
#include "rdma_link.hpp"

#ifdef SIDEPOOL_VERBS
namespace sidepool {

class RankerEngine;

// The ranker's end of an rdma lane. ClientLane's methods are anybody's, RdmaPeer's the engine's.
class RdmaClientLane final : public ClientLane, public RdmaPeer {
 public:
  RdmaClientLane(RankerEngine& engine, const LaneLimits& limits, std::shared_ptr<RdmaMemory> memory, RdmaLink link, const RdmaEnd& peer,
                 uint64_t window_bytes, Fd watched, Fd held);

  const char* kind() const override { return "rdma"; }
  bool windowed() const override { return true; }
  int fd() const override { return watched_.get(); }
  const char* why_lost() const override { return why(); }
  std::byte* request(uint32_t slot) override { return memory_->staging.data() + slot * limits_.request_bytes; }
  std::byte* response(uint32_t slot) override { return memory_->landing.data() + slot * (limits_.response_bytes + kTrailerBytes); }

  // The engine thread's.
  void adopted();
  bool work();
  bool has_work() const { return posted_.load(std::memory_order_seq_cst) != 0 || owes_grant(); }
  void end();
  void on_receive(RdmaQueue& queue, RdmaImmediate immediate, uint32_t bytes) override;
  void on_failure(RdmaQueue& queue, const char* why) override;
  void on_tick(uint64_t now_ns) override;
  bool resume() override;

 protected:
  SlotControl& control(uint32_t slot) override { return controls_[slot]; }
  Status send(uint32_t slot, size_t bytes, uint64_t deadline_ns) override;
  void released(uint32_t slot) override;

 private:
  // Enough has been consumed to be worth a grant.
  bool owes_grant() const {
    const uint64_t seen = granted_for_.load(std::memory_order_acquire);  // first: consumed_ is never behind it
    return consumed_.load(std::memory_order_seq_cst) - seen >= window_.window() / 4;
  }
  bool send_posted();
  void take_piece(RdmaImmediate immediate, uint32_t bytes);
  void take_last(RdmaImmediate immediate, uint32_t bytes);
  void accept_move();
  void change_queues();
  void drop_old();

  RankerEngine& engine_;
  Fd watched_, held_;  // a pipe whose end tells the client that the lane is lost
  std::unique_ptr<SlotControl[]> controls_;
  size_t frame_bytes_[kMaxSlots] = {};     // written by the caller before it sets the slot's bit
  uint64_t response_bytes_[kMaxSlots] = {};  // arrived so far; the engine's until the slot is done
  alignas(64) std::atomic<uint64_t> posted_{0};
  alignas(64) std::atomic<uint64_t> consumed_{0};
  std::atomic<uint64_t> granted_for_{0};  // what of consumed_ the engine has seen
  uint64_t backlog_ = 0, outstanding_ = 0;
  bool offered_ = false;  // a move that waits for the end of the one before
  RdmaLink twin_, old_;   // while the sidecar moves its end: not used yet; used no more, but responses may still come on it
};

// Sends: every slot's request, and what is not reaped yet.
inline RdmaQueue::Depths ranker_depths(uint32_t slots) { return {slots + 32, receives_for(slots, true)}; }

class alignas(kCacheLine) RankerEngine {
 public:
  RankerEngine(std::shared_ptr<RdmaDevice> device, uint32_t spin_us);
  ~RankerEngine() { stop(); }

  // Thread-safe.
  void adopt(std::shared_ptr<RdmaClientLane> lane);
  void ring_if_asleep() {
    // Pairs with sleep(): either the engine sees what the caller stored before, or the caller sees it asleep. One of many rings.
    if (sleeping_.load(std::memory_order_seq_cst) != 0 && sleeping_.exchange(0, std::memory_order_seq_cst) != 0) eventfd_ring();
  }
  void stop();
  int64_t load() const { return load_.load(std::memory_order_relaxed); }
  void reserve(int64_t n) { load_.fetch_add(n, std::memory_order_relaxed); }
  VerbsDomain& domain() { return *domain_; }

 private:
  void run();
  void sleep();
  void drop_dead();
  void eventfd_ring();

  std::unique_ptr<VerbsDomain> domain_;
  const uint64_t spin_ns_;
  Fd epoll_, doorbell_;
  alignas(64) std::atomic<uint32_t> sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> load_{0};  // lanes adopted or about to be
  std::atomic<bool> any_mail_{false};  // callers ring too: the mutex is taken only for mail
  std::mutex mail_mutex_;
  std::vector<std::shared_ptr<RdmaClientLane>> mail_;
  std::vector<std::shared_ptr<RdmaClientLane>> lanes_;
  std::thread thread_;
};

}  // namespace sidepool
#endif
