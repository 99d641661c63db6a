#include "client.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <chrono>
#include <utility>

#include "clock.hpp"

namespace sidepool {

namespace {
// Of no two states of any client's lanes: a thread's scratch serves all clients.
uint64_t new_lanes_version() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}
}  // namespace

LookupClient::LookupClient(int64_t epoch, Routes routes, uint32_t spin_us, bool degrade, const ClientOptions& options)
    : epoch_(epoch),
      routes_(std::move(routes)),
      spin_ns_(uint64_t(spin_us) * 1000),
      degrade_(degrade),
      next_id_(1),
      replicas_(size_t(routes_.sidecars), options.hedge_budget),
      times_(size_t(routes_.sidecars)),
      window_(options.window_delay_ns),
      max_ids_(options.max_ids) {
  lanes_.resize(size_t(routes_.sidecars));
  lanes_version_ = new_lanes_version();
  watch_ids_.resize(lanes_.size(), 0);
  epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !wake_) throw Error(Status::internal, std::string("cannot make a client: ") + std::strerror(errno));
  epoll_event event{EPOLLIN, {}};
  event.data.u64 = 0;
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event);
  watcher_ = std::thread([this] { watch(); });
}

LookupClient::~LookupClient() { close(); }

void LookupClient::set_fixed_columns(const int32_t* begins, const int32_t* widths) {
  routes_.max_fixed_column = 0;
  for (size_t f = 0; f < routes_.features.size(); ++f) {
    routes_.features[f].fixed_begin = begins[f];
    routes_.features[f].fixed_width = widths[f];
    routes_.max_fixed_column = std::max(routes_.max_fixed_column, begins[f] + widths[f]);
  }
}

void LookupClient::attach(int32_t sidecar, std::shared_ptr<ClientLane> lane) {
  std::shared_ptr<ClientLane> old;
  {
    std::lock_guard lock(lanes_mutex_);
    if (closed_) {
      lane->kill();
      return;
    }
    old = std::exchange(lanes_[size_t(sidecar)], lane);
    lanes_version_.store(new_lanes_version(), std::memory_order_release);
    watch_ids_[size_t(sidecar)] = next_watch_++ << 16 | uint64_t(sidecar + 1);
    if (lane->fd() >= 0) {
      // One shot: a socket whose end has been handled must not keep the watcher awake.
      epoll_event event{EPOLLRDHUP | EPOLLONESHOT, {}};
      event.data.u64 = watch_ids_[size_t(sidecar)];
      epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, lane->fd(), &event);
    }
  }
  if (old) old->kill();
}

void LookupClient::detach(int32_t sidecar) {
  std::shared_ptr<ClientLane> old;
  {
    std::lock_guard lock(lanes_mutex_);
    old = std::exchange(lanes_[size_t(sidecar)], nullptr);
    lanes_version_.store(new_lanes_version(), std::memory_order_release);
  }
  if (old) old->kill();
  lost_.notify_all();
}

std::shared_ptr<RdmaRanker> LookupClient::rdma(const RdmaOptions& options, int engines) {
  std::lock_guard lock(lanes_mutex_);
  if (closed_) throw Error(Status::transport, "the client is closed");
  if (!rdma_) rdma_ = make_rdma_ranker(options, engines, uint32_t(spin_ns_ / 1000));
  return rdma_;
}

std::shared_ptr<RdmaRanker> LookupClient::rdma() const {
  std::lock_guard lock(lanes_mutex_);
  return rdma_;
}

std::shared_ptr<ClientLane> LookupClient::lane(int32_t sidecar) const {
  std::lock_guard lock(lanes_mutex_);
  return lanes_[size_t(sidecar)];
}

bool LookupClient::alive(int32_t sidecar) const {
  const auto found = lane(sidecar);
  return found && !found->dead();
}

int32_t LookupClient::wait_lane_lost(double timeout_s) {
  std::unique_lock lock(lanes_mutex_);
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(timeout_s));
  for (;;) {
    if (closed_) return -2;
    for (size_t s = 0; s < lanes_.size(); ++s)
      if (!lanes_[s] || lanes_[s]->dead()) return int32_t(s);
    if (lost_.wait_until(lock, until) == std::cv_status::timeout) return -1;
  }
}

void LookupClient::watch() {
  while (!stopping_.load(std::memory_order_acquire)) {
    epoll_event events[16];
    const int n = epoll_wait(epoll_.get(), events, 16, -1);
    for (int i = 0; i < n; ++i) {
      const uint64_t id = events[i].data.u64;
      if (id == 0) continue;
      std::shared_ptr<ClientLane> gone;
      {
        std::lock_guard lock(lanes_mutex_);
        const size_t s = size_t(id & 0xffff) - 1;
        if (watch_ids_[s] == id) gone = lanes_[s];
      }
      if (gone) gone->on_hangup();
    }
    if (n > 0) lost_.notify_all();
  }
}

void LookupClient::close() {
  if (!watcher_.joinable()) return;
  std::vector<std::shared_ptr<ClientLane>> lanes;
  {
    std::lock_guard lock(lanes_mutex_);
    closed_ = true;
    lanes = lanes_;
  }
  for (const auto& lane : lanes)
    if (lane) lane->kill();
  lost_.notify_all();
  stopping_.store(true, std::memory_order_release);
  eventfd_write(wake_.get(), 1);
  watcher_.join();
  std::lock_guard lock(lanes_mutex_);
  for (auto& lane : lanes_) lane.reset();
  lanes_version_.store(new_lanes_version(), std::memory_order_release);
  if (rdma_) rdma_->close();
}

}  // namespace sidepool
