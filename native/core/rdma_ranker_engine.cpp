#include "rdma_ranker_engine.hpp"

#ifdef SIDEPOOL_VERBS
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>

namespace sidepool {

RankerEngine::RankerEngine(std::shared_ptr<RdmaDevice> device, uint32_t spin_us)
    : domain_(std::make_unique<VerbsDomain>(std::move(device))), spin_ns_(uint64_t(spin_us) * 1000) {
  epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  doorbell_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !doorbell_) throw Error(Status::internal, std::string("cannot make an engine: ") + std::strerror(errno));
  for (const int fd : {doorbell_.get(), domain_->fd()}) {
    epoll_event event{EPOLLIN, {}};
    event.data.fd = fd;
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
  }
  thread_ = std::thread([this] { run(); });
}

void RankerEngine::adopt(std::shared_ptr<RdmaClientLane> lane) {
  {
    std::lock_guard lock(mail_mutex_);
    mail_.push_back(std::move(lane));
    any_mail_.store(true, std::memory_order_release);
  }
  eventfd_ring();
}

void RankerEngine::eventfd_ring() { eventfd_write(doorbell_.get(), 1); }

void RankerEngine::stop() {
  if (!thread_.joinable()) return;
  stopping_.store(true, std::memory_order_release);
  eventfd_ring();
  thread_.join();
  for (auto& lane : mail_) {
    lane->adopted();
    lanes_.push_back(std::move(lane));
  }
  mail_.clear();
  for (auto& lane : lanes_) lane->end();
  lanes_.clear();
  domain_->settle();
}

void RankerEngine::run() {
  uint64_t idle_since = now_ns();
  while (!stopping_.load(std::memory_order_acquire)) {
    const uint64_t now = now_ns();
    bool worked = domain_->poll(now);
    for (const auto& lane : lanes_) worked |= lane->work();
    domain_->flush();
    drop_dead();
    if (worked) {
      idle_since = now_ns();
    } else if (now - idle_since >= spin_ns_) {
      sleep();
      idle_since = now_ns();
    } else {
      cpu_pause();
    }
  }
}

void RankerEngine::sleep() {
  if (!domain_->arm()) return;
  sleeping_.store(1, std::memory_order_seq_cst);
  const bool pending = std::any_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->has_work(); });
  epoll_event events[2];
  const int n = epoll_wait(epoll_.get(), events, 2, pending ? 0 : domain_->patience_ms());
  sleeping_.store(0, std::memory_order_relaxed);
  for (int i = 0; i < n; ++i) {
    if (events[i].data.fd != doorbell_.get()) {
      domain_->take_event();
      continue;
    }
    eventfd_t value;
    eventfd_read(doorbell_.get(), &value);
    if (!any_mail_.exchange(false, std::memory_order_acquire)) continue;
    std::vector<std::shared_ptr<RdmaClientLane>> mail;
    {
      std::lock_guard lock(mail_mutex_);
      mail.swap(mail_);
    }
    for (auto& lane : mail) {
      lane->adopted();
      lanes_.push_back(std::move(lane));
    }
  }
}

void RankerEngine::drop_dead() {
  for (size_t i = 0; i < lanes_.size();) {
    if (!lanes_[i]->failed() && !lanes_[i]->dead()) {
      ++i;
      continue;
    }
    lanes_[i]->end();
    lanes_[i] = std::move(lanes_.back());
    lanes_.pop_back();
    reserve(-1);
  }
}

namespace {

class VerbsRanker final : public RdmaRanker {
 public:
  VerbsRanker(const RdmaOptions& options, int engines, uint32_t spin_us) : device_(std::make_shared<RdmaDevice>(options)) {
    for (int i = 0; i < engines; ++i) engines_.push_back(std::make_shared<RankerEngine>(device_, spin_us));
  }
  ~VerbsRanker() override { close(); }

  std::shared_ptr<RdmaOffer> prepare(const LaneLimits& limits) override;

  void close() override {
    std::lock_guard lock(mutex_);
    closed_ = true;
    for (const auto& engine : engines_) engine->stop();
  }

  std::vector<EngineStats> engines() const override {
    std::lock_guard lock(mutex_);
    std::vector<EngineStats> stats;
    if (!closed_)
      for (const auto& engine : engines_) stats.push_back({engine->domain().thread_domain(), engine->load(), &engine->domain().counters()});
    return stats;
  }

 private:
  std::shared_ptr<RdmaDevice> device_;
  mutable std::mutex mutex_;  // set-up and end only
  bool closed_ = false;
  std::vector<std::shared_ptr<RankerEngine>> engines_;
};

class VerbsOffer final : public RdmaOffer {
 public:
  VerbsOffer(std::shared_ptr<RdmaDevice> device, std::shared_ptr<RankerEngine> engine, const LaneLimits& limits)
      : device_(std::move(device)),
        engine_(std::move(engine)),
        limits_(limits),
        memory_(std::make_shared<RdmaMemory>(device_, limits.slots * (limits.response_bytes + kTrailerBytes), limits.slots * limits.request_bytes)),
        link_(engine_->domain(), *memory_, ranker_depths(limits.slots), true) {
    end_ = device_->end();
    const RdmaMove numbers = link_.numbers();
    end_.data_qpn = numbers.data_qpn;
    end_.data_psn = numbers.data_psn;
    end_.control_qpn = numbers.control_qpn;
    end_.control_psn = numbers.control_psn;
    end_.receives = receives_for(limits.slots, true);
    end_.slots = limits.slots;
    end_.slots_address = uint64_t(reinterpret_cast<uintptr_t>(memory_->landing.data()));
    end_.slots_rkey = memory_->landing_mr->rkey;
    end_.slot_stride = limits.response_bytes + kTrailerBytes;
    end_.control_address = uint64_t(reinterpret_cast<uintptr_t>(memory_->page.data()));
    end_.control_rkey = memory_->page_mr->rkey;
    end_.window_bytes = window_for(device_->options().window_bytes, end_.slot_stride);
    engine_->reserve(1);
  }

  ~VerbsOffer() override {
    if (!connected_) engine_->reserve(-1);
  }

  std::string end() const override { return std::string(reinterpret_cast<const char*>(&end_), sizeof end_); }

  std::shared_ptr<ClientLane> connect(const std::string& bytes) override {
    if (connected_) throw Error(Status::internal, "rdma: this end is connected already");
    const RdmaEnd peer = parse_end(*device_, bytes, limits_, limits_.request_bytes);
    if (peer.control_qpn == 0) link_.control.reset();  // the sidecar wants credits in frames
    link_.connect(peer, {peer.data_qpn, peer.data_psn, peer.control_qpn, peer.control_psn});
    int pipe[2];
    if (pipe2(pipe, O_CLOEXEC | O_NONBLOCK) != 0) throw Error(Status::internal, std::string("rdma: pipe: ") + std::strerror(errno));
    Fd watched(pipe[0]), held(pipe[1]);
    auto lane = std::make_shared<RdmaClientLane>(*engine_, limits_, std::move(memory_), std::move(link_), peer, end_.window_bytes,
                                                 std::move(watched), std::move(held));
    connected_ = true;
    engine_->adopt(lane);
    return lane;
  }

 private:
  std::shared_ptr<RdmaDevice> device_;
  std::shared_ptr<RankerEngine> engine_;
  LaneLimits limits_;
  std::shared_ptr<RdmaMemory> memory_;
  RdmaLink link_;
  RdmaEnd end_;
  bool connected_ = false;
};

std::shared_ptr<RdmaOffer> VerbsRanker::prepare(const LaneLimits& limits) {
  std::lock_guard lock(mutex_);
  if (closed_) throw Error(Status::transport, "rdma: the client is closed");
  const auto least = *std::min_element(engines_.begin(), engines_.end(), [](const auto& a, const auto& b) { return a->load() < b->load(); });
  return std::make_shared<VerbsOffer>(device_, least, limits);
}

}  // namespace

std::shared_ptr<RdmaRanker> make_rdma_ranker(const RdmaOptions& options, int engines, uint32_t spin_us) {
  return std::make_shared<VerbsRanker>(options, engines, spin_us);
}

}  // namespace sidepool
#endif
