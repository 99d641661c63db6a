#include "engine.hpp"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>

#include "clock.hpp"
#include "top_rows.hpp"

namespace sidepool {
namespace {

// How often an engine that is never idle looks at its sockets: often enough that a dead or new tcp peer waits less
// than a typical subrequest (~20 µs), rarely enough that the ~0.5 µs system call does not show.
constexpr uint64_t kSocketPollNs = 20'000;

// Set in the pointer that epoll keeps for a lane's second socket.
constexpr uint64_t kGrantsTag = 1;

// A subrequest estimated to take this long is offered to engines that are awake; a sleeping one is woken for every kWakeNs of
// it, which is what makes up for the wake-up. Measured with two engines on two cores of a Zen 5, one client, 26 features of
// 20 ids, alone over shared: both spinning, 59 µs of pooling 1.22, 120 µs 1.22; one asleep, 89 µs 0.99, 120 µs 1.00, 180 µs
// 1.04, 380 µs 1.22.
constexpr uint64_t kOfferNs = 50'000;
constexpr uint64_t kWakeNs = 150'000;
// What a piece should take: hundreds of times what claiming it costs, and as long as the owner, or a request that finds its
// engine helping, may have to wait for one.
constexpr uint64_t kPieceNs = 20'000;

// Ask the scheduler for short slices: an engine works in bursts of microseconds and wants to begin at once when it wakes,
// which is what a short slice means to Linux's EEVDF scheduler (6.12 and later: a woken thread with a shorter slice
// preempts). 100 µs is the shortest it grants. Needs no privilege; older kernels ignore or refuse it, which changes nothing
// but latency beside busy neighbours.
void ask_for_short_slices() {
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  attributes.size = sizeof attributes;
  attributes.runtime = 100'000;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

// Ignored where it is refused: the thread then runs where the kernel likes.
void run_on(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) {
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  sched_setaffinity(0, sizeof set, &set);
}

}  // namespace

Engine::Engine(Published& published, Board& board, size_t seat, uint32_t spin_us, const std::vector<int>& cpus, Order order)
    : published_(published), board_(board), seat_(seat), cpus_(cpus), spin_ns_(uint64_t(spin_us) * 1000), queue_(order) {
  epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  doorbell_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  page_fd_ = Fd(memfd_create("sidepool-engine", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!epoll_ || !doorbell_ || !page_fd_ || ftruncate(page_fd_.get(), 4096) != 0)
    throw Error(Status::internal, std::string("cannot make an engine: ") + std::strerror(errno));
  page_mapping_ = Mapping::shared(page_fd_.get(), 4096, true);
  page_ = new (page_mapping_.data()) EnginePage();
  // Our mapping stays writable; rankers can only read.
  if (fcntl(page_fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0)
    throw Error(Status::internal, std::string("cannot seal an engine page: ") + std::strerror(errno));
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, doorbell_.get(), &event);
  board_.sit(seat_, &page_->sleeping, doorbell_.get());
  thread_ = std::thread([this] { run(); });
}

Engine::~Engine() { stop(); }

void Engine::adopt(std::unique_ptr<ServerLane> lane) {
  Mail mail;
  mail.lane = std::make_unique<Owned>();
  mail.lane->lane = std::move(lane);
  post(std::move(mail));
}

void Engine::post(Mail mail) {
  {
    std::lock_guard lock(mail_mutex_);
    mail_.push_back(std::move(mail));
  }
  eventfd_write(doorbell_.get(), 1);
}

void Engine::enable_rdma(std::unique_ptr<RdmaDomain> domain) {
  domain_ = std::move(domain);
  epoll_event event{EPOLLIN, {}};
  event.data.ptr = domain_.get();
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, domain_->fd(), &event);
  rdma_.store(domain_.get(), std::memory_order_release);
}

void Engine::stop() {
  if (!thread_.joinable()) return;
  stopping_.store(true, std::memory_order_release);
  eventfd_write(doorbell_.get(), 1);
  thread_.join();
  std::lock_guard roster(roster_mutex_);
  lanes_.clear();
  std::lock_guard mail(mail_mutex_);
  mail_.clear();
  if (domain_) domain_->settle();
  load_.store(0, std::memory_order_relaxed);
}

void Engine::run() {
  ask_for_short_slices();
  if (!cpus_.empty()) run_on(cpus_);
  uint64_t last_socket_poll = 0;
  uint64_t idle_since = now_ns();
  while (!stopping_.load(std::memory_order_acquire)) {
    refresh();
    const uint64_t now = now_ns();
    RdmaDomain* const rdma = this->rdma();
    bool worked = rdma != nullptr && rdma->poll(now);
    worked |= poll_memory();
    const bool listening = queue_.empty() && stream_lanes_ > 0;
    if (listening || now - last_socket_poll >= kSocketPollNs) {
      poll_sockets(0);
      last_socket_poll = now;
    }
    if (!queue_.empty()) {
      serve_some(now, rdma != nullptr ? rdma->post_ns() : 0);
      worked = true;
    } else if (!worked) {
      worked = help();
    }
    if (moving_ > 0) hand_over();
    if (rdma != nullptr) rdma->flush();
    drop_dead();
    if (worked) {
      idle_since = now_ns();
    } else if (now - idle_since >= spin_ns_) {
      sleep();
      last_socket_poll = idle_since = now_ns();
    } else {
      cpu_pause();
    }
  }
}

void Engine::refresh() {
  const uint64_t version = published_.version();
  if (version == tables_version_) return;
  Published::Both both = published_.both();
  const bool same = tables_ == both.tables;
  tables_ = std::move(both.tables);
  previous_ = std::move(both.previous);
  tables_version_ = version;
  if (same) return;
  const size_t count = tables_ ? size_t(tables_->table_count()) : 0;
  std::lock_guard lock(table_mutex_);
  if (count > table_count_) {
    std::shared_ptr<TableCounters[]> grown(new TableCounters[count]);
    for (size_t i = 0; i < table_count_; ++i) grown[i].add(table_counters_[i]);
    table_counters_ = std::move(grown);
    table_count_ = count;
  }
  // Rows are those of the tables published now.
  for (size_t i = 0; i < table_count_; ++i) {
    const bool held = i < count && tables_->table(int32_t(i)).base.load(std::memory_order_relaxed) != nullptr;
    table_counters_[i].top = held ? std::make_shared<TopRows>() : nullptr;
  }
}

bool Engine::poll_memory() {
  bool found = false;
  for (auto& owned : lanes_) {
    if (owned->dead || !owned->lane->polled()) continue;
    if (owned->lane->has_pending()) {
      collect(*owned, false);
      found = true;
    }
    if (owned->writing) watch(*owned);
  }
  return found;
}

void Engine::poll_sockets(int timeout_ms) {
  epoll_event events[32];
  const int n = epoll_wait(epoll_.get(), events, 32, timeout_ms);
  for (int i = 0; i < n; ++i) {
    if (events[i].data.ptr == nullptr) {
      eventfd_t value;
      eventfd_read(doorbell_.get(), &value);
      take_mail();
      continue;
    }
    if (RdmaDomain* const rdma = this->rdma(); events[i].data.ptr == rdma) {
      rdma->take_event();
      continue;
    }
    const bool grants = events[i].data.u64 & kGrantsTag;
    Owned& owned = *reinterpret_cast<Owned*>(events[i].data.u64 & ~kGrantsTag);
    if (owned.dead) continue;
    if (grants) {
      owned.dead = !owned.lane->take_grants();
      watch(owned);
      continue;
    }
    if ((events[i].events & EPOLLOUT) && !owned.lane->writable()) owned.dead = true;
    if (!owned.dead && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) collect(owned, true);
    if (owned.writing) watch(owned);
  }
}

// Follow what of the lane waits to leave, and whether its socket must say when there is room.
void Engine::watch(Owned& owned) {
  const bool writing = owned.lane->wants_write(), room = owned.lane->wants_room();
  if (owned.dead) return;
  if (writing != owned.writing) {
    counters_.writing.add(writing ? 1 : -1);
    if (writing) owned.lane->counters().credit_waits.add();
    owned.writing = writing;
  }
  if (owned.lane->fd() < 0 || room == owned.watched) return;
  owned.watched = room;
  epoll_event event{EPOLLIN | (room ? uint32_t(EPOLLOUT) : 0u), {&owned}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, owned.lane->fd(), &event);
}

void Engine::take_mail() {
  std::vector<Mail> mail;
  {
    std::lock_guard lock(mail_mutex_);
    mail.swap(mail_);
  }
  for (Mail& each : mail) {
    if (each.lane)
      settle_in(each);
    else
      begin_move(each);
  }
}

void Engine::settle_in(Mail& mail) {
  Owned& owned = *mail.lane;
  owned.lane->adopted();
  counters_.moved.add(mail.move_lane != 0);
  epoll_event event{EPOLLIN, {&owned}};
  if (owned.lane->fd() >= 0) epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, owned.lane->fd(), &event);
  event.data.u64 |= kGrantsTag;
  if (owned.lane->grants_fd() >= 0) epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, owned.lane->grants_fd(), &event);
  stream_lanes_ += !owned.lane->polled();
  std::lock_guard roster(roster_mutex_);
  lanes_.push_back(std::move(mail.lane));
  counters_.lanes.set(int64_t(lanes_.size()));
  // Room for every slot of every lane: the request path never grows these.
  size_t slots = 0;
  for (const auto& each : lanes_) slots += each->lane->limits().slots;
  queue_.reserve(slots);
  arrived_.reserve(kMaxSlots);
  for (Work& work : mail.works) {
    work.owner = &owned;
    queue_.push(work);
  }
  counters_.queued.set(int64_t(queue_.size()));
  arriving_.fetch_sub(int64_t(mail.works.size()), std::memory_order_relaxed);
}

void Engine::collect(Owned& owned, bool readable) {
  arrived_.clear();
  if (!owned.lane->collect(arrived_, readable)) {
    owned.dead = true;
    return;
  }
  if (arrived_.empty()) return;
  const uint64_t now = now_ns();
  for (const uint32_t slot : arrived_) admit(owned, slot, now);
  counters_.queued.set(int64_t(queue_.size()));
}

// Into the queue, unless its time would run out there.
void Engine::admit(Owned& owned, uint32_t slot, uint64_t now) {
  if (owned.dead) return;
  const auto [frame, bytes] = owned.lane->request(slot);
  RequestHeader header;
  std::memcpy(&header, frame, sizeof header);
  // A budget beyond a day is no budget; the bound keeps the sum within 64 bits.
  const uint64_t deadline = now + std::min<uint64_t>(header.budget_ns, 86'400'000'000'000ull);
  // The body, not looked at yet, has room for no more ids than this.
  const uint64_t values = std::min<uint64_t>(header.value_count, bytes / sizeof(int64_t));
  const Work work{deadline, now, service_time_.of(values), header.priority, slot, &owned};
  if (queue_.hopeless(work, now)) {
    counters_.shed_on_arrival.add();
    answer(work, true);
    return;
  }
  queue_.push(work);
  ++owned.queued;
  owned.lane->counters().queued.add();
  owned.lane->counters().queued_bytes.add(int64_t(bytes));
}

// One subrequest, and others for as long as posting a response takes: posted first, it would delay them more than they delay
// it, and one doorbell does for all. Where posting is cheap, as with a card, or no lane posts, that is one alone.
void Engine::serve_some(uint64_t begin_ns, uint64_t post_ns) {
  do {
    serve_one();
  } while (!queue_.empty() && now_ns() - begin_ns < post_ns);
}

void Engine::serve_one() {
  const Work work = queue_.pop();
  --work.owner->queued;
  LaneCounters& lane = work.owner->lane->counters();
  lane.queued.add(-1);
  lane.queued_bytes.add(-int64_t(work.owner->lane->request(work.slot).second));
  if (!work.owner->dead) answer(work, false);
  counters_.queued.set(int64_t(queue_.size()));
}

void Engine::answer(const Work& work, bool hopeless) {
  ServerLane& lane = *work.owner->lane;
  const auto [frame, bytes] = lane.request(work.slot);
  if (parse_request(frame, bytes, parsed_) != Status::ok) {
    counters_.statuses[size_t(Status::frame)].add();
    work.owner->dead = true;
    return;
  }
  lane.begin(work.slot, parsed_, work.deadline_ns);
  const uint64_t start = now_ns();
  const uint64_t draining_since = published_.draining_since_ns.load(std::memory_order_relaxed);
  ResponseHeader header;
  if (hopeless || start + service_time_.of(parsed_.header.value_count) > work.deadline_ns) {
    header = refusal(work, Status::deadline, start);
    counters_.shed.add();
    service_time_.doubt();
  } else if (draining_since != 0 && work.received_ns > draining_since) {
    header = refusal(work, Status::draining, start);
  } else {
    header = pool(work, lane);
  }
  counters_.queue.record_ns(header.started_ns - work.received_ns);
  counters_.statuses[size_t(header.status)].add();
  counters_.served.add();
  if (!lane.finish(header)) work.owner->dead = true;
  if (work.owner->just_moved) counters_.blackout.record_ns(header.finished_ns - work.owner->last_response_ns);
  work.owner->just_moved = false;
  work.owner->last_response_ns = header.finished_ns;
  watch(*work.owner);
}

ResponseHeader Engine::refusal(const Work& work, Status status, uint64_t now) const {
  ResponseHeader header;
  header.status = int32_t(status);
  header.lookup_id = parsed_.header.lookup_id;
  header.epoch = parsed_.header.epoch;
  header.batch = parsed_.header.batch;
  header.received_ns = work.received_ns;
  header.started_ns = header.finished_ns = now;
  return header;
}

ResponseHeader Engine::pool(const Work& work, ServerLane& lane) {
  const auto [payload, capacity] = lane.payload(work.slot);
  const ServeInput input{&parsed_, work.received_ns, payload, capacity};
  const uint64_t alone = uint64_t(ns_per_value_ * double(parsed_.header.value_count));
  const bool share = alone >= kWakeNs ? board_.shared() : alone >= kOfferNs && board_.anyone_awake(seat_);
  const auto [tables, counters] = tables_of(parsed_.header.epoch);
  const ResponseHeader header = share ? serve_shared(input, lane, alone) : serve(tables, input, lane, counters);
  const uint64_t spent = header.finished_ns - header.started_ns;
  if (header.status == 0) {
    service_time_.learn(spent, parsed_.header.value_count);
    if (!share) learn(spent, int64_t(parsed_.header.value_count));
  }
  counters_.pool.record_ns(spent);
  counters_.busy_ns.add(int64_t(spent));
  lane.counters().busy_ns.add(int64_t(spent));
  return header;
}

std::pair<const TableSet*, TableCounters*> Engine::tables_of(uint64_t epoch) const {
  if (previous_ && uint64_t(previous_->epoch()) == epoch && uint64_t(tables_->epoch()) != epoch) return {previous_.get(), nullptr};
  return {tables_.get(), table_counters_.get()};
}

ResponseHeader Engine::serve_shared(const ServeInput& input, ServerLane& lane, uint64_t estimate_ns) {
  Sharing sharing{&board_, seat_, size_t(estimate_ns / kWakeNs), std::max<int64_t>(1, int64_t(double(kPieceNs) / ns_per_value_))};
  const auto [tables, counters] = tables_of(input.request->header.epoch);
  const ResponseHeader header = serve(tables, input, lane, counters, &sharing);
  if (header.status == 0) learn(sharing.own_ns, sharing.own_values);
  return header;
}

void Engine::learn(uint64_t ns, int64_t values) {
  // Short subrequests say more about fixed costs than about the cost of an id: learn from the others.
  if (values >= 256) ns_per_value_ += (double(ns) / double(values) - ns_per_value_) * 0.05;
}

// The kernel may wake us where the owner runs although another CPU is free: it stops looking for one early on small
// machines (seen on 2 CPUs, 6.18: two engines were no faster than one). Once moved, we are woken where we ran last.
void Engine::step_aside(int cpu) {
  cpu_set_t allowed;
  if (sched_getcpu() != cpu || sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
}

// Pools pieces of another engine's subrequest until there are none, or something of our own turns up.
bool Engine::help() {
  Offer* offer = board_.enter(seat_);
  if (offer == nullptr) return false;
  step_aside(offer->cpu());
  const uint64_t start = now_ns();
  uint64_t now = start, last_socket_poll = start;
  do {
    if (offer->pool_next() == nullptr) break;
    counters_.helped.add();
    now = now_ns();
    if (now - last_socket_poll >= kSocketPollNs) {
      poll_sockets(0);
      if (RdmaDomain* const rdma = this->rdma()) rdma->poll(now);
      last_socket_poll = now;
    }
  } while (queue_.empty() && !anything_pending() && !stopping_.load(std::memory_order_relaxed));
  offer->leave();
  counters_.busy_ns.add(int64_t(now - start));
  return true;
}

void Engine::drop_dead() {
  for (size_t i = 0; i < lanes_.size();) {
    if (!lanes_[i]->dead || lanes_[i]->queued > 0) {
      ++i;
      continue;
    }
    Owned& owned = *lanes_[i];
    dismiss(owned);
    if (owned.target != nullptr) {
      owned.target->release();
      --moving_;
    }
    std::unique_ptr<Owned> gone;
    {
      std::lock_guard roster(roster_mutex_);
      gone = std::move(lanes_[i]);
      lanes_[i] = std::move(lanes_.back());
      lanes_.pop_back();
      dropped_[gone->lane->kind()].add(gone->lane->counters());
      counters_.lanes.set(int64_t(lanes_.size()));
    }
    gone.reset();  // closed before it stops counting
    release();
  }
}

bool Engine::anything_pending() const {
  for (const auto& owned : lanes_)
    if (owned->dead || (owned->lane->polled() && owned->lane->has_pending())) return true;
  return false;
}

void Engine::sleep() {
  // A ranker first publishes its bit, then reads `sleeping`; we first set `sleeping`, then read the bits. All four
  // accesses are in one total order: either we see the bit or the ranker rings. So it is with offers and their owners.
  RdmaDomain* const rdma = this->rdma();
  if (rdma != nullptr && !rdma->arm()) return;
  page_->sleeping.store(1, std::memory_order_seq_cst);
  // The ring that came with `stopping_` may have been taken already, together with others.
  const bool awaited = stopping_.load(std::memory_order_acquire) || anything_pending() || board_.has_pieces(seat_);
  poll_sockets(awaited ? 0 : rdma != nullptr ? rdma->patience_ms() : -1);
  page_->sleeping.store(0, std::memory_order_relaxed);
}

void Engine::read_tables(std::vector<TableSums>& sums) const {
  std::lock_guard lock(table_mutex_);
  if (sums.size() < table_count_) sums.resize(table_count_);
  for (size_t i = 0; i < table_count_; ++i) table_counters_[i].add_to(sums[i]);
}

void Engine::read_top(size_t table, std::map<int64_t, int64_t>& counts) const {
  std::lock_guard lock(table_mutex_);
  if (table < table_count_ && table_counters_[table].top) table_counters_[table].top->read(counts);
}

void Engine::read_lanes(const LaneVisitor& visit) const {
  std::lock_guard roster(roster_mutex_);
  for (const auto& owned : lanes_) visit(owned->lane->id(), owned->lane->kind(), true, owned->lane->counters());
  for (const auto& [kind, sums] : dropped_) visit(0, kind, false, sums);
}

}  // namespace sidepool
