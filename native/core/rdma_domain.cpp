#include "rdma_domain.hpp"

#ifdef SIDEPOOL_VERBS
#include <fcntl.h>

#include <algorithm>

#include "clock.hpp"

namespace sidepool {
namespace {

// Completions that one engine's queue holds. 65,536 lets about 400 lanes of 16 slots fail at once; devices that hold fewer
// (SoftRoCE: 32,767) admit fewer lanes.
constexpr int kCompletions = 65536;
// Completions taken per call, and calls per round: enough for a round's arrivals, few enough to stay in the first-level cache
// and to let the other lanes' sockets have their turn.
constexpr int kBatch = 16, kBatches = 4;
// Acknowledging events takes the library's lock, so it is done for many at once.
constexpr uint32_t kAcknowledgeEvents = 1024;
// What posting takes is followed in steps of this part of it, up or down, which leads to the median: a flush in which the
// thread lost its processor counts no more than another.
constexpr uint64_t kPostSteps = 64;
// What a retired queue gets to deliver its last message. Its lane lives on; only memory waits.
constexpr uint64_t kRetireNs = 10'000'000'000;
// What all of them together get when the engine ends: peers that are there acknowledge within a round trip, and those that
// hear nothing find out by themselves.
constexpr uint64_t kPartNs = 200'000'000;

}  // namespace

VerbsDomain::VerbsDomain(std::shared_ptr<RdmaDevice> device) : device_(std::move(device)) {
  ibv_context* context = device_->context();
  ibv_td_init_attr init{};
  td_.reset(ibv_alloc_td(context, &init));  // null where the provider has none
  channel_ = require(verbs().create_comp_channel(context), "create a completion channel");
  fcntl(channel_->fd, F_SETFL, fcntl(channel_->fd, F_GETFL) | O_NONBLOCK);
  cqe_ = std::min(device_->max_cqe(), kCompletions);
  cq_ = require(verbs().create_cq(context, cqe_, nullptr, channel_.get(), 0), "create a completion queue");
  dirty_.reserve(kQueues);
  waiting_.reserve(kQueues);
  resumed_.reserve(kQueues);
  device_->listen(this);
}

VerbsDomain::~VerbsDomain() {
  device_->forget(this);
  settle();
  if (unacknowledged_ > 0) verbs().ack_cq_events(cq_.get(), unacknowledged_);
}

void VerbsDomain::discard(std::unique_ptr<RdmaQueue> data, std::unique_ptr<RdmaQueue> control, std::shared_ptr<void> memory) {
  std::lock_guard lock(mail_mutex_);
  discarded_.push_back({std::move(memory), std::move(data), std::move(control), 0});
  any_mail_.store(true, std::memory_order_relaxed);
}

void VerbsDomain::settle() {
  flush();
  take_mail();
  for (const uint64_t until = now_ns() + kPartNs; !retired_.empty() && now_ns() < until; bury(0))
    if (!poll(0)) cpu_pause();
  retired_.clear();
}

void VerbsDomain::enlist(RdmaQueue& queue, uint32_t completions) {
  std::lock_guard lock(table_mutex_);
  if (reserved_ + completions > cqe_) throw Error(Status::overloaded, "rdma: the engine's completion queue has no room for another lane");
  for (uint32_t tries = 0; tries < kQueues; ++tries) {
    const uint32_t id = next_id_++ & 0x7fffffff;
    if (table_[id % kQueues].load(std::memory_order_relaxed) != nullptr) continue;
    reserved_ += completions;
    counters_.registrations.add();
    queue.set_id(id);
    table_[id % kQueues].store(&queue, std::memory_order_release);
    return;
  }
  throw Error(Status::overloaded, "rdma: the engine has " + std::to_string(kQueues) + " queue pairs already");
}

void VerbsDomain::strike(RdmaQueue& queue, uint32_t completions) {
  std::lock_guard lock(table_mutex_);
  table_[queue.id() % kQueues].store(nullptr, std::memory_order_relaxed);
  reserved_ -= completions;
  if (queue.dirty()) std::erase(dirty_, &queue);
}

void VerbsDomain::join(QueueOwner& owner) { owners_.push_back(&owner); }

void VerbsDomain::leave(QueueOwner& owner) {
  std::erase(owners_, &owner);
  std::erase(waiting_, &owner);
}

void VerbsDomain::retire(std::unique_ptr<RdmaQueue> data, std::unique_ptr<RdmaQueue> control, std::shared_ptr<void> memory) {
  data->bind(nullptr);
  if (control) control->bind(nullptr);
  retired_.push_back({std::move(memory), std::move(data), std::move(control), now_ns() + kRetireNs});
}

void VerbsDomain::bury(uint64_t now) {
  for (Retired& r : retired_) {
    if (!r.data->failed() && !r.data->idle() && now < r.until_ns) continue;
    // First: closing the gaps below may let go of the memory before, and a protection domain in use cannot be freed.
    r.data.reset();
    r.control.reset();
  }
  std::erase_if(retired_, [](const Retired& r) { return r.data == nullptr; });
}

RdmaQueue* VerbsDomain::find(uint64_t wr_id) const {
  const uint32_t id = uint32_t(wr_id >> 33);
  RdmaQueue* queue = table_[id % kQueues].load(std::memory_order_acquire);
  // A completion may outlive its queue; a later queue in the same place has another id.
  return queue != nullptr && queue->id() == id ? queue : nullptr;
}

void VerbsDomain::take(const ibv_wc& completion) {
  RdmaQueue* queue = find(completion.wr_id);
  if (queue == nullptr) return;
  if (completion.status != IBV_WC_SUCCESS)
    queue->fail(meaning(completion.status));
  else if (completion.wr_id >> 32 & 1)
    queue->sent(uint32_t(completion.wr_id));
  else
    queue->received(completion);
}

bool VerbsDomain::poll(uint64_t now) {
  now_ = std::max(now_, now);
  ibv_wc completions[kBatch];
  bool found = false;
  for (int batch = 0; batch < kBatches; ++batch) {
    const int n = ibv_poll_cq(cq_.get(), kBatch, completions);
    for (int i = 0; i < n; ++i) take(completions[i]);
    found |= n > 0;
    if (n < kBatch) break;
  }
  if (any_mail_.load(std::memory_order_relaxed)) take_mail();
  if (!waiting_.empty()) {
    resumed_.swap(waiting_);
    for (QueueOwner* owner : resumed_)
      if (!owner->resume()) waiting_.push_back(owner);
    resumed_.clear();
  }
  if (now >= next_tick_ns_) tick(now);
  return found;
}

void VerbsDomain::tick(uint64_t now) {
  next_tick_ns_ = now + kRdmaTickNs;
  for (QueueOwner* owner : owners_) owner->on_tick(now);
  bury(now);
}

void VerbsDomain::flush() {
  if (dirty_.empty()) return;
  counters_.rounds.add();
  const uint64_t begin = now_ns();
  uint64_t writes = 0;
  // A failing flush may end lanes, which strikes queues from the list only when they are destroyed, later.
  for (size_t i = 0; i < dirty_.size(); ++i) writes += dirty_[i]->flush();
  for (RdmaQueue* queue : dirty_) queue->end_round();
  dirty_.clear();
  if (writes > 0) learn_post((now_ns() - begin) / writes);
}

void VerbsDomain::learn_post(uint64_t ns) {
  const uint64_t step = post_ns_ / kPostSteps + 1;
  post_ns_ = ns > post_ns_ ? post_ns_ + step : post_ns_ - std::min(step, post_ns_);
}

bool VerbsDomain::arm() {
  ibv_req_notify_cq(cq_.get(), 0);
  // What arrived before the request raises no event.
  if (poll(now_ns())) return false;
  flush();
  counters_.asleep.add();
  return true;
}

int VerbsDomain::patience_ms() const {
  if (owners_.empty() && retired_.empty()) return -1;
  // A grant is a plain write and raises no event. Who waits for one waits for a slow peer: a millisecond is soon enough.
  return waiting_.empty() ? int(kRdmaTickNs / 1'000'000) : 1;
}

void VerbsDomain::take_event() {
  ibv_cq* cq;
  void* context;
  while (verbs().get_cq_event(channel_.get(), &cq, &context) == 0) ++unacknowledged_;
  if (unacknowledged_ < kAcknowledgeEvents) return;
  verbs().ack_cq_events(cq_.get(), unacknowledged_);
  unacknowledged_ = 0;
}

void VerbsDomain::device_failed(uint32_t qpn) {
  std::lock_guard lock(mail_mutex_);
  failures_.push_back(qpn);
  any_mail_.store(true, std::memory_order_relaxed);
}

void VerbsDomain::take_mail() {
  std::vector<uint32_t> failures;
  std::vector<Retired> discarded;
  {
    std::lock_guard lock(mail_mutex_);
    failures.swap(failures_);
    discarded.swap(discarded_);
    any_mail_.store(false, std::memory_order_relaxed);
  }
  discarded.clear();
  if (failures.empty()) return;
  for (auto& entry : table_) {
    RdmaQueue* queue = entry.load(std::memory_order_acquire);
    if (queue == nullptr) continue;
    for (const uint32_t qpn : failures)
      if (qpn == 0 || qpn == queue->number()) queue->fail(qpn == 0 ? "the device failed or was removed" : "the device reports a fault of the queue pair");
  }
}

}  // namespace sidepool
#endif
