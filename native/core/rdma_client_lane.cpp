#include "rdma_ranker_engine.hpp"

#ifdef SIDEPOOL_VERBS
namespace sidepool {

RdmaClientLane::RdmaClientLane(RankerEngine& engine, const LaneLimits& limits, std::shared_ptr<RdmaMemory> memory, RdmaLink link,
                               const RdmaEnd& peer, uint64_t window_bytes, Fd watched, Fd held)
    : ClientLane(limits),
      RdmaPeer(std::move(memory), std::move(link), peer, window_bytes),
      engine_(engine),
      watched_(std::move(watched)),
      held_(std::move(held)),
      controls_(std::make_unique<SlotControl[]>(limits.slots)) {
  same_clock_ = peer.clock_id == clock_id();
}

Status RdmaClientLane::send(uint32_t slot, size_t bytes, uint64_t) {
  frame_bytes_[slot] = bytes;
  posted_.fetch_or(1ull << slot, std::memory_order_seq_cst);
  engine_.ring_if_asleep();
  return Status::ok;
}

void RdmaClientLane::released(uint32_t slot) {
  const uint64_t bytes = std::exchange(response_bytes_[slot], 0);
  if (bytes == 0) return;
  consumed_.fetch_add(bytes, std::memory_order_seq_cst);
  // A sleeping engine need not hear of every slot.
  if (owes_grant()) engine_.ring_if_asleep();
}

void RdmaClientLane::adopted() {
  domain().join(*this);
  link_.bind(this);
}

bool RdmaClientLane::work() {
  const uint64_t consumed = consumed_.load(std::memory_order_relaxed);
  if (const uint64_t seen = granted_for_.load(std::memory_order_relaxed); consumed != seen) {
    granted_for_.store(consumed, std::memory_order_relaxed);
    window_.consumed(consumed - seen);
    give_grant();
  }
  if (posted_.load(std::memory_order_relaxed) == 0) return false;
  backlog_ |= posted_.exchange(0, std::memory_order_acq_rel);
  if (!send_posted()) {
    counters_.credit_waits.fetch_add(1, std::memory_order_relaxed);
    wait_for_credit();
  }
  return true;
}

bool RdmaClientLane::send_posted() {
  for (; backlog_ != 0; backlog_ &= backlog_ - 1) {
    const uint32_t slot = uint32_t(std::countr_zero(backlog_));
    const size_t bytes = frame_bytes_[slot];
    if (!may_send(bytes) && !(take_grant() && may_send(bytes))) return false;
    std::byte* frame = request(slot);
    if (piggybacks()) put_grant(frame);
    response_bytes_[slot] = 0;
    outstanding_ |= 1ull << slot;
    RdmaPeer::send(frame, memory_->staging_mr->lkey, bytes, peer_.slots_address + slot * peer_.slot_stride, {RdmaKind::request, slot});
  }
  return true;
}

void RdmaClientLane::on_tick(uint64_t now) {
  if (abandoned_.load(std::memory_order_relaxed) != 0) reclaim();  // given up just as the answer came
  RdmaPeer::on_tick(now);
}

bool RdmaClientLane::resume() {
  take_grant();
  if (!failed() && !send_posted()) return false;
  waiting_ = false;
  return true;
}

void RdmaClientLane::on_failure(RdmaQueue& queue, const char* why) {
  // A response may be lost with the old data queue; a grant lost with the old control queue is made good by the next.
  if (!old_ || &queue != old_.control.get()) fail(why);
}

void RdmaClientLane::on_receive(RdmaQueue&, RdmaImmediate immediate, uint32_t bytes) {
  if (failed()) return;
  switch (immediate.kind) {
    case RdmaKind::piece:
    case RdmaKind::last:
      if (immediate.slot >= limits_.slots || (outstanding_ >> immediate.slot & 1) == 0)
        return fail("the sidecar answered a slot that holds no request");
      if (!window_.arrived(bytes)) return fail("the sidecar sent more than it was granted");
      return immediate.kind == RdmaKind::piece ? take_piece(immediate, bytes) : take_last(immediate, bytes);
    case RdmaKind::offer: return accept_move();
    case RdmaKind::change: return change_queues();
    case RdmaKind::closed: return drop_old();
    case RdmaKind::bye: return fail("the sidecar closed the lane");
    default: return fail("the sidecar sent an immediate that no sidecar sends");
  }
}

void RdmaClientLane::take_piece(RdmaImmediate immediate, uint32_t bytes) {
  const std::vector<size_t>& offsets = slots_[immediate.slot].offsets;
  response_bytes_[immediate.slot] += bytes;
  if (immediate.done >= offsets.size() || offsets[immediate.done] > response_bytes_[immediate.slot])
    return fail("the sidecar says that more is complete than has come");
  controls_[immediate.slot].word.store(immediate.done, std::memory_order_release);
}

void RdmaClientLane::take_last(RdmaImmediate immediate, uint32_t bytes) {
  const uint32_t slot = immediate.slot;
  const SlotState& state = slots_[slot];
  const size_t payload = response_bytes_[slot] + bytes - sizeof(ResponseHeader);
  if (bytes < sizeof(ResponseHeader) || payload > payload_capacity()) return fail("the sidecar sent a response without a header");
  ResponseHeader header;  // a copy: the peer may rewrite the original at any time
  std::memcpy(&header, response(slot) + sizeof header + payload, sizeof header);
  const uint32_t features = uint32_t(state.offsets.size() - 1);
  const bool valid = check_response_header(header, features) == Status::ok && header.slot == slot && header.first == 0 &&
                     header.lookup_id == state.lookup_id.load(std::memory_order_relaxed) &&
                     header.frame_bytes == sizeof header + payload &&
                     (header.status != 0 || (header.count == immediate.done && state.offsets[header.count] == payload));
  if (!valid) return fail("the sidecar sent bytes that are no response");
  if (piggybacks()) {
    Grant grant;
    std::memcpy(&grant, reinterpret_cast<const std::byte*>(&header) + kGrantOffset, sizeof grant);
    take_grant(grant);
  }
  std::memcpy(response(slot), &header, sizeof header);
  response_bytes_[slot] += bytes;
  counters_.response_bytes.fetch_add(int64_t(header.frame_bytes), std::memory_order_relaxed);
  outstanding_ &= ~(1ull << slot);
  mark_done(slot, header.count);
  // A slot that its caller has given up has nobody else who would free it, and its credit.
  if (abandoned_.load(std::memory_order_relaxed) != 0) reclaim();
}

// The sidecar's twins are there: connect own ones to them. This takes the time of a few system calls, which the other lanes
// of this engine wait.
void RdmaClientLane::accept_move() {
  if (twin_ || offered_) return fail("the sidecar offers a move during a move");
  // The last message of an earlier move comes on other queue pairs and may still be under way.
  offered_ = bool(old_);
  if (offered_) return;
  RdmaMove numbers;
  std::memcpy(&numbers, &memory_->control().move, sizeof numbers);
  try {
    twin_ = RdmaLink(domain(), *memory_, ranker_depths(limits_.slots), !piggybacks());
    twin_.connect(peer_, numbers);
  } catch (const Error&) {
    return fail("the twin queue pairs cannot be connected");
  }
  twin_.bind(this);
  const RdmaMove own = twin_.numbers();
  tell(RdmaKind::accept, &own);
}

void RdmaClientLane::change_queues() {
  if (!twin_ || old_) return fail("the sidecar changes queue pairs that it did not offer");
  tell(RdmaKind::changed, nullptr, true);
  old_ = std::move(link_);
  link_ = std::move(twin_);
  give_grant(true);  // one sent on the old queues may be lost with them
}

void RdmaClientLane::drop_old() {
  if (!old_) return fail("the sidecar closes queue pairs that are in use");
  domain().retire(std::move(old_.data), std::move(old_.control), memory_);
  if (std::exchange(offered_, false)) accept_move();
}

void RdmaClientLane::end() {
  kill();
  for (RdmaLink* link : {&twin_, &old_})
    if (*link) link->bind(nullptr);
  domain().leave(*this);
  part();
  twin_ = {};
  old_ = {};
  held_.reset();  // whoever watches the other end learns of it
}

}  // namespace sidepool
#endif
