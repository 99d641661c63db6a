#include "client.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <chrono>

#include "clock.hpp"

namespace sidepool {
namespace {

// Chunks of one lookup that may be under way at once: enough to keep a sidecar pooling while the ranker merges, few
// enough that one large lookup leaves most credits of a lane (16 by default) to the others.
constexpr size_t kWindow = 4;

bool may_degrade(Status status) {
  return status == Status::transport || status == Status::deadline || status == Status::overloaded || status == Status::draining;
}

bool credits_free(const std::vector<std::shared_ptr<ClientLane>>& lanes) {
  return std::all_of(lanes.begin(), lanes.end(), [](const auto& lane) { return !lane || lane->has_free(); });
}

}  // namespace

struct LookupClient::Subrequest {
  ClientLane* lane = nullptr;
  int slot = -1;
  bool empty = false;  // nothing to ask: every bag is empty
  bool settled = false;
  uint64_t sent_ns = 0;
  uint32_t merged = 0;
  std::vector<uint64_t> counts;   // values per feature of this sidecar
  std::vector<size_t> offsets;    // payload offset per feature, one more at the end
};

struct LookupClient::InFlight {
  size_t chunk = 0;
  std::vector<Subrequest> subrequests;  // one per sidecar
};

// Everything a lookup needs, kept by the thread that does lookups: nothing is allocated once it has grown.
struct LookupClient::Scratch {
  RoutedLookup routed;
  std::vector<Fault> faults;
  std::vector<SidecarTimes> times;
  std::vector<SlotBudget> budgets;
  std::vector<std::shared_ptr<ClientLane>> lanes;  // during a lookup
  // The lanes of `lanes_version`, from lookup to lookup: weak, so that a thread without lookups keeps no lane.
  std::vector<std::weak_ptr<ClientLane>> known;
  uint64_t lanes_version = 0;
  std::array<InFlight, kWindow> window;
};

namespace {
// Of no two states of any client's lanes: a thread's scratch serves all clients.
uint64_t new_lanes_version() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}
}  // namespace

LookupClient::LookupClient(int64_t epoch, Routes routes, uint32_t spin_us, bool degrade)
    : epoch_(epoch), routes_(std::move(routes)), spin_ns_(uint64_t(spin_us) * 1000), degrade_(degrade), next_id_(1) {
  lanes_.resize(routes_.of_sidecar.size());
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

// Takes the lock only where lanes have come or gone since this thread's last lookup.
void LookupClient::hold_lanes(Scratch& scratch) {
  if (scratch.lanes_version != lanes_version_.load(std::memory_order_acquire)) {
    std::lock_guard lock(lanes_mutex_);
    scratch.known.assign(lanes_.begin(), lanes_.end());
    scratch.lanes_version = lanes_version_.load(std::memory_order_relaxed);
  }
  scratch.lanes.resize(scratch.known.size());
  for (size_t s = 0; s < scratch.known.size(); ++s) scratch.lanes[s] = scratch.known[s].lock();
}

LookupResult LookupClient::lookup(const LookupCall& call) {
  static thread_local Scratch scratch;
  const size_t sidecars = sidecar_count();
  const uint64_t start = now_ns();
  // A budget beyond a day is no budget; the bound keeps the sum within 64 bits.
  const uint64_t deadline = start + std::min<uint64_t>(call.budget_ns, 86'400'000'000'000ull);
  LookupResult result;
  result.sidecars = &scratch.times;
  result.faults = &scratch.faults;
  scratch.times.assign(sidecars, SidecarTimes{});
  scratch.routed.admit(routes_, call.parts, call.part_count, scratch.faults);
  scratch.budgets.assign(sidecars, SlotBudget{SIZE_MAX, SIZE_MAX});
  hold_lanes(scratch);
  for (size_t s = 0; s < sidecars; ++s)
    if (scratch.lanes[s]) scratch.budgets[s] = {scratch.lanes[s]->limits().request_bytes, scratch.lanes[s]->payload_capacity()};
  scratch.routed.plan(scratch.budgets, call.out.format, scratch.faults);
  scratch.routed.zero_refused(scratch.faults, call.out);
  result.times.chunks = int64_t(scratch.routed.chunk_count());
  result.times.route = int64_t(now_ns() - start);

  size_t sent = 0, received = 0;
  const size_t chunks = scratch.routed.chunk_count();
  while (received < chunks && result.status == Status::ok) {
    while (sent < chunks && sent - received < kWindow && result.status == Status::ok) {
      InFlight& next = scratch.window[sent % kWindow];
      next.chunk = sent;
      const uint64_t begin = now_ns();
      // The first may wait for credits; the others only use what is free, or two large lookups could starve each other.
      if (sent > received && !credits_free(scratch.lanes)) break;
      next.subrequests.resize(sidecars);
      for (size_t s = 0; s < sidecars; ++s) {
        Subrequest& sub = next.subrequests[s];
        sub.lane = scratch.lanes[s].get();
        sub.slot = -1;
        sub.empty = sub.settled = false;
        sub.merged = 0;
      }
      for (size_t s = 0; s < sidecars; ++s) {
        if (routes_.of_sidecar[s].empty()) {
          next.subrequests[s].settled = true;
          continue;
        }
        const Status status = send_one(scratch, next, int32_t(s), call, deadline);
        if (status != Status::ok) fail(scratch, next, int32_t(s), call, status, result);
      }
      ++sent;
      result.times.route += int64_t(now_ns() - begin);
    }
    if (received < sent && result.status == Status::ok) receive(scratch, scratch.window[received++ % kWindow], call, deadline, result);
  }
  // After a failure the slots still out are nobody's until the sidecars have answered them.
  for (size_t c = received; c < sent; ++c)
    for (Subrequest& sub : scratch.window[c % kWindow].subrequests)
      if (!sub.settled && sub.slot >= 0) sub.lane->abandon(uint32_t(sub.slot));
  scratch.lanes.clear();
  result.times.total = int64_t(now_ns() - start);
  totals_.lookups.fetch_add(1, std::memory_order_relaxed);
  totals_.samples.fetch_add(scratch.routed.samples(), std::memory_order_relaxed);
  totals_.statuses[size_t(result.status)].fetch_add(1, std::memory_order_relaxed);
  for (const Fault& fault : scratch.faults)
    if (fault.status != Status::ok) totals_.refused_parts.fetch_add(1, std::memory_order_relaxed);
  return result;
}

Status LookupClient::send_one(Scratch& scratch, InFlight& chunk, int32_t s, const LookupCall& call, uint64_t deadline) {
  Subrequest& sub = chunk.subrequests[size_t(s)];
  const std::vector<int32_t>& mine = routes_.of_sidecar[size_t(s)];
  const RoutedLookup::Size size = scratch.routed.measure(chunk.chunk, s, sub.counts);
  if (size.values == 0) {
    sub.empty = true;
    return Status::ok;
  }
  if (sub.lane == nullptr || sub.lane->dead()) return Status::transport;
  const int slot = sub.lane->acquire(deadline);
  if (slot < 0) return slot == -2 ? Status::transport : Status::overloaded;
  const uint32_t batch = scratch.routed.chunk_batch(chunk.chunk);
  sub.offsets.assign(1, 0);
  for (size_t i = 0; i < mine.size(); ++i) {
    const RoutedFeature& feature = routes_.features[size_t(mine[i])];
    sub.offsets.push_back(sub.offsets.back() + block_bytes(feature.pooling, feature.dim, batch, sub.counts[i], call.out.format));
  }
  std::byte* frame = sub.lane->request(uint32_t(slot));
  scratch.routed.encode(chunk.chunk, s, sub.counts, size, frame);
  RequestHeader header;
  header.frame_bytes = size.layout.total;
  header.slot = uint32_t(slot);
  header.priority = call.priority;
  header.lookup_id = next_id_.fetch_add(1, std::memory_order_relaxed);
  header.epoch = uint64_t(epoch_);
  header.batch = batch;
  header.feature_count = uint32_t(mine.size());
  header.value_count = size.values;
  header.output_format = call.out.format;
  if (call.trace != nullptr) std::memcpy(header.trace, call.trace, sizeof header.trace);
  sub.sent_ns = header.sent_ns = now_ns();
  header.budget_ns = deadline > sub.sent_ns ? deadline - sub.sent_ns : 0;
  std::memcpy(frame, &header, sizeof header);
  const Status status = sub.lane->post(uint32_t(slot), size.layout.total, header.lookup_id, sub.offsets, deadline);
  if (status != Status::ok) {
    sub.lane->release(uint32_t(slot));
    return status;
  }
  sub.slot = slot;
  scratch.times[size_t(s)].request_bytes += int64_t(size.layout.total);
  return Status::ok;
}

void LookupClient::receive(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result) {
  for (size_t s = 0; s < chunk.subrequests.size(); ++s) {
    Subrequest& sub = chunk.subrequests[s];
    if (sub.settled) continue;
    if (sub.empty) {
      const std::vector<int32_t>& mine = routes_.of_sidecar[s];
      for (const int32_t f : mine) scratch.routed.zero(chunk.chunk, f, call.out);
      sub.settled = true;
      continue;
    }
    if (result.status != Status::ok) {
      sub.lane->abandon(uint32_t(sub.slot));
      sub.settled = true;
      continue;
    }
    const Status status = receive_one(scratch, chunk, int32_t(s), call, deadline, result);
    if (status != Status::ok) fail(scratch, chunk, int32_t(s), call, status, result);
    sub.settled = true;
  }
}

Status LookupClient::receive_one(Scratch& scratch, InFlight& chunk, int32_t s, const LookupCall& call, uint64_t deadline,
                                 LookupResult& result) {
  Subrequest& sub = chunk.subrequests[size_t(s)];
  const std::vector<int32_t>& mine = routes_.of_sidecar[size_t(s)];
  const uint32_t slot = uint32_t(sub.slot);
  const std::byte* payload = sub.lane->response(slot) + sizeof(ResponseHeader);
  const uint64_t turned = now_ns();
  for (;;) {
    const uint64_t waiting = now_ns();
    Status status;
    const uint32_t word = sub.lane->wait(slot, sub.merged, deadline, spin_ns_, status);
    const uint64_t seen = now_ns();
    result.times.wait += int64_t(seen - waiting);
    if (status != Status::ok) {
      sub.lane->abandon(slot);
      return status;
    }
    const uint32_t ready = std::min<uint32_t>(word & kSlotProgress, uint32_t(mine.size()));
    for (; sub.merged < ready; ++sub.merged)
      scratch.routed.merge(chunk.chunk, mine[sub.merged], payload + sub.offsets[sub.merged], call.out);
    result.times.merge += int64_t(now_ns() - seen);
    if ((word & kSlotDone) == 0) continue;

    ResponseHeader header;
    std::memcpy(&header, sub.lane->response(slot), sizeof header);
    sub.lane->release(slot);
    SidecarTimes& times = scratch.times[size_t(s)];
    times.response_bytes += int64_t(sizeof header + sub.offsets[sub.merged]);
    if (header.status != 0) return header.status > 0 && header.status <= int32_t(Status::internal) ? Status(header.status) : Status::frame;
    if (sub.merged != mine.size()) return Status::frame;
    const int64_t queue = int64_t(header.started_ns - header.received_ns), pool = int64_t(header.finished_ns - header.started_ns);
    if (queue + pool >= times.queue + times.pool) {
      times.queue = queue;
      times.pool = pool;
      if (sub.lane->same_clock()) {
        times.lane_out = int64_t(header.received_ns - sub.sent_ns);
        // The ranker may have been busy with another sidecar when this one finished: that is not the lane's time.
        times.lane_back = std::max<int64_t>(0, int64_t(seen - std::max(header.finished_ns, std::min(turned, seen))));
      } else {
        times.lane_out = times.lane_back = std::max<int64_t>(0, (int64_t(seen - sub.sent_ns) - queue - pool) / 2);
      }
    }
    return Status::ok;
  }
}

void LookupClient::fail(Scratch& scratch, InFlight& chunk, int32_t s, const LookupCall& call, Status status, LookupResult& result) {
  chunk.subrequests[size_t(s)].settled = true;
  if (degrade_ && may_degrade(status)) {
    const std::vector<int32_t>& mine = routes_.of_sidecar[size_t(s)];
    for (const int32_t f : mine) scratch.routed.zero(chunk.chunk, f, call.out);
    scratch.times[size_t(s)].degraded = true;
    return;
  }
  if (result.status == Status::ok) {
    result.status = status;
    result.sidecar = s;
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
