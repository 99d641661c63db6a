// Queue pairs and the completion queue of the engine that owns them.
//
// Threads: a queue is made, connected and destroyed before it is bound, or by its domain's engine thread; everything else is
// the engine thread's. Completions of a queue that nobody has bound yet are kept and delivered when it is.
#pragma once
#include "rdma_device.hpp"

#ifdef SIDEPOOL_VERBS
#include <array>

namespace sidepool {

class RdmaQueue;

// A lane as its domain sees it.
class QueueOwner {
 public:
  virtual ~QueueOwner() = default;
  virtual void on_receive(RdmaQueue& queue, RdmaImmediate immediate, uint32_t bytes) = 0;
  // The queue will never send or receive again. Once per queue.
  virtual void on_failure(RdmaQueue& queue, const char* why) = 0;
  // About every kRdmaTickNs.
  virtual void on_tick(uint64_t now_ns) = 0;
  // Send what could not be sent before. True: nothing is left waiting. Called every round once `VerbsDomain::wait` has.
  virtual bool resume() = 0;
};

class alignas(kCacheLine) VerbsDomain final : public RdmaDomain, FailureListener {
 public:
  explicit VerbsDomain(std::shared_ptr<RdmaDevice> device);
  ~VerbsDomain() override;

  bool thread_domain() const override { return td_ != nullptr; }
  bool poll(uint64_t now_ns) override;
  void flush() override;
  uint64_t post_ns() const override { return post_ns_; }
  bool arm() override;
  int patience_ms() const override;
  int fd() const override { return channel_->fd; }
  void take_event() override;
  const RdmaCounters& counters() const override { return counters_; }

  RdmaDevice& device() const { return *device_; }
  uint64_t now() const { return now_; }  // as of the last poll
  ibv_td* td() const { return td_.get(); }
  ibv_cq* cq() const { return cq_.get(); }
  RdmaCounters& count() { return counters_; }
  // Take in completions until everything retired is acknowledged, for a moment at most. At the engine's end.
  void settle() override;
  // Destroy queues that another engine made for this one and does not need any more. Any thread.
  void discard(std::unique_ptr<RdmaQueue> data, std::unique_ptr<RdmaQueue> control, std::shared_ptr<void> memory);

  // Place in the table of queues, which completions name. Thread-safe. Throws Error(overloaded) when the completion queue
  // could overflow.
  void enlist(RdmaQueue& queue, uint32_t completions);
  void strike(RdmaQueue& queue, uint32_t completions);
  void to_flush(RdmaQueue& queue) { dirty_.push_back(&queue); }

  void join(QueueOwner& owner);
  void leave(QueueOwner& owner);
  void wait(QueueOwner& owner) { waiting_.push_back(&owner); }
  // Destroy the queues once the last, signalled write on `data` is acknowledged, or after a while; `memory` lives as long.
  void retire(std::unique_ptr<RdmaQueue> data, std::unique_ptr<RdmaQueue> control, std::shared_ptr<void> memory);

 private:
  static constexpr uint32_t kQueues = 4096;  // 1,024 lanes of one engine, two queues each, all of them moving
  struct Retired {
    std::shared_ptr<void> memory;
    std::unique_ptr<RdmaQueue> data, control;
    uint64_t until_ns;
  };

  void device_failed(uint32_t qpn) override;
  RdmaQueue* find(uint64_t wr_id) const;
  void take(const ibv_wc& completion);
  void tick(uint64_t now_ns);
  void learn_post(uint64_t ns);
  void take_mail();
  void bury(uint64_t now_ns);

  std::shared_ptr<RdmaDevice> device_;
  Owned<ibv_td> td_;
  Owned<ibv_comp_channel> channel_;
  Owned<ibv_cq> cq_;
  int cqe_ = 0;
  RdmaCounters counters_;

  std::mutex table_mutex_;  // guards adding to the table; the engine reads it without
  std::array<std::atomic<RdmaQueue*>, kQueues> table_{};
  uint32_t next_id_ = 0;
  int64_t reserved_ = 0;  // completions that may be outstanding, under table_mutex_

  std::mutex mail_mutex_;
  std::vector<uint32_t> failures_;
  std::vector<Retired> discarded_;
  std::atomic<bool> any_mail_{false};

  LineVector<RdmaQueue*> dirty_;
  LineVector<QueueOwner*> owners_, waiting_, resumed_;
  std::vector<Retired> retired_;
  uint64_t next_tick_ns_ = 0, now_ = 0, post_ns_ = 0;
  uint32_t unacknowledged_ = 0;
};

// One queue pair. `receives` have no buffers: they only take immediates.
class alignas(kCacheLine) RdmaQueue {
 public:
  struct Depths {
    uint32_t sends, receives;
  };
  // In a lane's protection domain, ready to receive; throws Error.
  RdmaQueue(VerbsDomain& domain, ibv_pd* pd, const Depths& depths, bool control);
  ~RdmaQueue();
  RdmaQueue(const RdmaQueue&) = delete;

  uint32_t number() const { return qp_->qp_num; }
  uint32_t id() const { return id_; }
  void set_id(uint32_t id) { id_ = id; }
  uint32_t psn() const { return psn_; }
  VerbsDomain& domain() const { return domain_; }
  // To the peer's queue `qpn`, at the address and path of `peer`.
  void connect(const RdmaEnd& peer, uint32_t qpn, uint32_t psn);
  void bind(QueueOwner* owner);

  struct Write {
    const void* from;
    uint32_t lkey;
    size_t bytes;
    uint64_t to;
    uint32_t rkey;
    const RdmaImmediate* immediate = nullptr;
    bool signalled = false;  // else every sixteenth is
  };
  // Places are kept for the lane's own messages, which must always go.
  bool room(uint32_t kept = 8) const { return !failed_ && posted_ + chained_ - completed_ + kept < depths_.sends; }
  // Into the chain that the next flush posts. Only with room. Small writes are copied at flush, from where they are then.
  void write(const Write& write);
  // How many writes it has posted.
  uint32_t flush(bool during_pooling = false);

  bool failed() const { return failed_; }
  // Everything that was sent is acknowledged; true only if the last write was signalled.
  bool idle() const { return completed_ == posted_ && chained_ == 0; }
  // How long sends have waited for an acknowledgement while none came at all.
  uint64_t silent_ns() const { return completed_ == posted_ ? 0 : domain_.now() - progress_ns_; }

  // For the domain.
  void received(const ibv_wc& completion);
  void sent(uint32_t count) {
    completed_ += uint32_t(count - uint32_t(completed_));
    progress_ns_ = domain_.now();
  }
  void fail(const char* why);
  void end_round() {
    doorbells_in_round_ = 0;
    dirty_ = false;
  }
  bool dirty() const { return dirty_; }

 private:
  struct Early {
    uint32_t immediate, bytes;
  };
  void post_receives(uint32_t count);

  VerbsDomain& domain_;
  const Depths depths_;
  const bool control_;
  uint32_t id_ = 0, psn_ = 0, max_inline_ = 0;
  Owned<ibv_pd> parent_;  // joins the engine's thread domain to the lane's protection domain
  Owned<ibv_qp> qp_;
  QueueOwner* owner_ = nullptr;
  bool failed_ = false, dirty_ = false;
  const char* why_ = "";
  LineVector<Early> early_;
  LineVector<ibv_send_wr> sends_;
  LineVector<ibv_sge> pieces_;
  LineVector<ibv_recv_wr> receives_;
  uint64_t posted_ = 0, completed_ = 0, progress_ns_ = 0;
  uint32_t chained_ = 0, consumed_ = 0, doorbells_in_round_ = 0;
};

}  // namespace sidepool
#endif
