#include "rdma_link.hpp"

#ifdef SIDEPOOL_VERBS
#include <algorithm>

namespace sidepool {
namespace {

// Messages about the lane itself that may be under way besides its frames: bye and the steps of a move.
constexpr uint32_t kOwnMessages = 8;
// Pieces of responses that a ranker keeps receives for, besides one per slot: a 32 MiB window in pieces of 128 KiB. They
// have no buffers, so they cost a descriptor each.
constexpr uint32_t kPieceReceives = 256;
// The control queue carries a grant per quarter window and a keepalive per tick.
constexpr RdmaQueue::Depths kControlDepths{64, 0};

Owned<ibv_mr> register_memory(ibv_pd* pd, const Mapping& memory, int access, const char* what) {
  return require(verbs().reg_mr(pd, memory.data(), memory.bytes(), access),
                 (std::string("register ") + std::to_string(memory.bytes()) + " bytes of " + what +
                  " (ulimit -l must allow all slots of all rdma lanes)").c_str());
}

size_t whole_pages(size_t bytes) { return (bytes + 4095) & ~size_t(4095); }

}  // namespace

RdmaMemory::RdmaMemory(std::shared_ptr<RdmaDevice> shared, size_t landing_bytes, size_t staging_bytes)
    : device(std::move(shared)),
      landing(Mapping::anonymous(whole_pages(landing_bytes))),
      staging(Mapping::anonymous(whole_pages(staging_bytes))),
      page(Mapping::anonymous(4096)) {
  new (page.data()) RdmaControl();
  new (page.data() + 2048) RdmaControl();
  pd = require(verbs().alloc_pd(device->context()), "allocate a protection domain");
  landing_mr = register_memory(pd.get(), landing, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, "slots that the peer writes");
  staging_mr = register_memory(pd.get(), staging, 0, "slots that are sent");
  page_mr = register_memory(pd.get(), page, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, "control words");
}

RdmaLink::RdmaLink(VerbsDomain& domain, const RdmaMemory& memory, const RdmaQueue::Depths& depths, bool dedicated) {
  data = std::make_unique<RdmaQueue>(domain, memory.pd.get(), depths, false);
  if (dedicated) control = std::make_unique<RdmaQueue>(domain, memory.pd.get(), kControlDepths, true);
}

void RdmaLink::connect(const RdmaEnd& peer, const RdmaMove& queues) {
  data->connect(peer, queues.data_qpn, queues.data_psn);
  if (control) control->connect(peer, queues.control_qpn, queues.control_psn);
}

RdmaMove RdmaLink::numbers() const {
  RdmaMove move{data->number(), data->psn(), 0, 0};
  if (control) {
    move.control_qpn = control->number();
    move.control_psn = control->psn();
  }
  return move;
}

void RdmaLink::bind(QueueOwner* owner) {
  data->bind(owner);
  if (control) control->bind(owner);
}

uint64_t piece_bytes_for(const RdmaOptions& options, const RdmaEnd& peer, uint32_t slots) {
  const uint64_t pieces = std::max(peer.receives - slots - kOwnMessages, 1u);
  return std::max<uint64_t>(options.piece_bytes, (peer.window_bytes + pieces - 1) / pieces);
}

uint32_t receives_for(uint32_t slots, bool ranker) { return slots + kOwnMessages + (ranker ? kPieceReceives : 0); }

RdmaEnd parse_end(const RdmaDevice& device, const std::string& bytes, const LaneLimits& limits, uint64_t stride) {
  RdmaEnd end;
  const auto refuse = [](const std::string& what) { throw Error(Status::transport, "rdma: the peer's end: " + what); };
  if (bytes.size() != sizeof end) refuse("found " + std::to_string(bytes.size()) + " bytes; allowed: " + std::to_string(sizeof end));
  std::memcpy(&end, bytes.data(), sizeof end);
  device.check(end);
  if (end.slots != limits.slots) refuse("slots: found " + std::to_string(end.slots) + "; allowed: " + std::to_string(limits.slots));
  if (end.slot_stride != stride) refuse("slot_stride: found " + std::to_string(end.slot_stride) + "; allowed: " + std::to_string(stride));
  const uint64_t largest = std::max(limits.request_bytes, limits.response_bytes);
  if (end.window_bytes < stride || end.window_bytes > kMaxSlots * (largest + kTrailerBytes))
    refuse("window_bytes: found " + std::to_string(end.window_bytes) + "; allowed: from one slot to " + std::to_string(kMaxSlots) + " slots");
  if (end.receives < limits.slots + kOwnMessages || end.receives > 1u << 16)
    refuse("receives: found " + std::to_string(end.receives) + "; allowed: " + std::to_string(limits.slots + kOwnMessages) + " to 65536");
  return end;
}

RdmaPeer::RdmaPeer(std::shared_ptr<RdmaMemory> memory, RdmaLink link, const RdmaEnd& peer, uint64_t window_bytes)
    : memory_(std::move(memory)), link_(std::move(link)), piggybacks_(!link_.control), peer_(peer), credit_(peer.window_bytes), window_(window_bytes) {}

void RdmaPeer::fail(const char* why) {
  if (failed()) return;
  domain().count().failures.add();
  why_.store(why, std::memory_order_release);
}

void RdmaPeer::on_failure(RdmaQueue& queue, const char* why) {
  if (link_.owns(queue)) fail(why);
}

void RdmaPeer::on_tick(uint64_t) {
  // The grant as it stands: repairs one that was lost in a move, and finds out whether the peer is still there.
  if (failed()) return;
  const uint64_t patience = uint64_t(domain().device().options().peer_timeout_s * 1e9);
  const uint64_t silent = (piggybacks() ? data() : *link_.control).silent_ns();
  // Providers were seen to lose a queue pair's retries altogether (SoftRoCE, link down): no verdict is one too.
  if (silent > 3 * patience) return fail("the peer does not answer");
  // Most sends ask for no completion; while none comes, this one does.
  give_grant(true, silent > patience / 4);
}

void RdmaPeer::send(const std::byte* from, uint32_t lkey, size_t bytes, uint64_t to, RdmaImmediate immediate) {
  credit_.spend(bytes);
  data().write({from, lkey, bytes, to, peer_.slots_rkey, &immediate});
}

void RdmaPeer::tell(RdmaKind kind, const RdmaMove* move, bool signalled) {
  if (!data().room(0)) return fail("no place to send on");
  const RdmaImmediate immediate{kind};
  RdmaMove& outgoing = memory_->outgoing().move;
  if (move != nullptr) outgoing = *move;
  data().write({&outgoing, memory_->page_mr->lkey, move != nullptr ? sizeof *move : 0, peer_.control_address + offsetof(RdmaControl, move),
                peer_.control_rkey, &immediate, signalled});
}

bool RdmaPeer::take_grant() {
  const Grant& word = memory_->control().grant;
  // The adapter writes the 16 bytes as one packet, in order; a torn pair would only blur the latency histogram.
  Grant grant;
  grant.granted_ns = std::atomic_ref(const_cast<uint64_t&>(word.granted_ns)).load(std::memory_order_relaxed);
  grant.limit = std::atomic_ref(const_cast<uint64_t&>(word.limit)).load(std::memory_order_acquire);
  const uint64_t before = credit_.limit();
  take_grant(grant);
  return credit_.limit() > before;
}

void RdmaPeer::take_grant(const Grant& grant) {
  if (grant.limit <= credit_.limit()) return;
  credit_.grant(grant.limit);
  if (peer_.clock_id == clock_id()) {
    const uint64_t now = now_ns();
    domain().count().credit.record_ns(now > grant.granted_ns ? now - grant.granted_ns : 0);
  }
}

void RdmaPeer::give_grant(bool always, bool signalled) {
  const bool due = window_.due();
  if (due && due_since_ns_ == 0) due_since_ns_ = now_ns();
  RdmaQueue& queue = piggybacks() ? data() : *link_.control;
  if (!(due || always) || !queue.room()) return;
  Grant& outgoing = memory_->outgoing().grant;
  outgoing = {window_.grant(), due ? due_since_ns_ : now_ns()};
  due_since_ns_ = 0;
  queue.write({&outgoing, memory_->page_mr->lkey, sizeof outgoing, peer_.control_address + offsetof(RdmaControl, grant), peer_.control_rkey,
               nullptr, signalled});
}

void RdmaPeer::put_grant(std::byte* header) {
  const Grant grant{window_.grant(), due_since_ns_ != 0 ? due_since_ns_ : now_ns()};
  due_since_ns_ = 0;
  std::memcpy(header + kGrantOffset, &grant, sizeof grant);
}

void RdmaPeer::part() {
  if (data().failed()) return;
  link_.bind(nullptr);
  if (data().room(0)) tell(RdmaKind::bye, nullptr, true);
  VerbsDomain& mine = domain();
  mine.retire(std::move(link_.data), std::move(link_.control), memory_);
}

void RdmaPeer::wait_for_credit() {
  if (!waiting_) domain().wait(*this);
  waiting_ = true;
}

}  // namespace sidepool
#endif
