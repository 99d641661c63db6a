#include "rdma_domain.hpp"

#ifdef SIDEPOOL_VERBS
#include <algorithm>

#include "clock.hpp"

namespace sidepool {
namespace {

// One send in sixteen asks for a completion: that is all the reaping a queue needs.
constexpr uint64_t kSignalEvery = 16;
// Receives are posted again in groups of this many: one call and one doorbell for them all.
constexpr uint32_t kReceiveBatch = 16;
// The largest small write worth copying into the work request: a header with three pooled vectors of dim 32. Providers take
// what they can; SoftRoCE takes 448.
constexpr uint32_t kWantedInline = 512;

// Tries after the first. SoftRoCE takes the largest number, 7, for "without end".
constexpr uint8_t kRetries = 6;

// How long a peer that finds no receive here waits before it tries again: code 14 is 1.28 ms. A slow engine is no reason, since
// receives outnumber what a peer may send, so a peer without any is not waited for without end: these tries, 8 ms together,
// are for adapters that see a receive late.
constexpr uint8_t kReceiverNotReady = 14;

// The local ACK timeout whose tries last at least this long: 4.096 µs · 2^n each.
uint8_t ack_timeout(double peer_timeout_s) {
  uint8_t n = 1;
  while (n < 31 && (1 + kRetries) * 4.096e-6 * double(1u << n) < peer_timeout_s) ++n;
  return n;
}

}  // namespace

RdmaQueue::RdmaQueue(VerbsDomain& domain, ibv_pd* pd, const Depths& depths, bool control)
    : domain_(domain), depths_(depths), control_(control) {
  if (domain.td() != nullptr) {
    ibv_parent_domain_init_attr init{};
    init.pd = pd;
    init.td = domain.td();
    parent_ = require(ibv_alloc_parent_domain(domain.device().context(), &init), "allocate a parent domain");
    pd = parent_.get();
  }
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = domain.cq();
  init.qp_type = IBV_QPT_RC;
  for (max_inline_ = kWantedInline; !qp_; max_inline_ /= 2) {
    init.cap = {depths.sends, std::max(depths.receives + kReceiveBatch, 1u), 1, 1, max_inline_};
    qp_.reset(verbs().create_qp(pd, &init));
    if (!qp_ && (errno != EINVAL || max_inline_ == 0)) require<ibv_qp>(nullptr, "create a queue pair");
    if (qp_) break;
  }
  max_inline_ = init.cap.max_inline_data;
  psn_ = uint32_t(now_ns() * 0x9e3779b97f4a7c15ull >> 40);  // 24 bits that a packet of an earlier life does not have by chance
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_INIT;
  attr.port_num = domain.device().port();
  attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  if (const int rc = verbs().modify_qp(qp_.get(), &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS); rc != 0)
    throw Error(Status::transport, std::string("rdma: cannot initialise a queue pair: ") + std::strerror(rc));
  sends_.resize(depths.sends);
  pieces_.resize(depths.sends);
  receives_.resize(kReceiveBatch);
  early_.reserve(depths.receives + kReceiveBatch);
  domain.enlist(*this, depths.sends + depths.receives + kReceiveBatch);
  for (uint32_t i = 0; i < kReceiveBatch; ++i) receives_[i] = {uint64_t(id_) << 33, nullptr, nullptr, 0};
  if (depths.receives == 0) return;
  // One batch more than needed, so that consuming a batch before posting it again leaves enough.
  for (uint32_t left = depths.receives + kReceiveBatch; left > 0;) {
    const uint32_t count = std::min(left, kReceiveBatch);
    post_receives(count);
    left -= count;
  }
}

RdmaQueue::~RdmaQueue() {
  domain_.strike(*this, depths_.sends + depths_.receives + kReceiveBatch);
  qp_.reset();
}

void RdmaQueue::connect(const RdmaEnd& peer, uint32_t qpn, uint32_t psn) {
  const RdmaDevice& device = domain_.device();
  const RdmaOptions& options = device.options();
  const RdmaEnd own = device.end();
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RTR;
  attr.path_mtu = ibv_mtu(std::min(own.mtu, peer.mtu));
  attr.dest_qp_num = qpn;
  attr.rq_psn = psn;
  attr.min_rnr_timer = kReceiverNotReady;
  attr.ah_attr.port_num = device.port();
  attr.ah_attr.dlid = peer.lid;
  attr.ah_attr.sl = control_ ? options.control_service_level : options.service_level;
  // Routed fabrics need the global header; InfiniBand subnets take it too, at 40 bytes a packet, so only Ethernet gets it.
  if (device.ethernet()) {
    attr.ah_attr.is_global = 1;
    std::memcpy(attr.ah_attr.grh.dgid.raw, peer.gid, sizeof peer.gid);
    attr.ah_attr.grh.sgid_index = uint8_t(device.gid_index());
    attr.ah_attr.grh.hop_limit = 64;
    attr.ah_attr.grh.traffic_class = control_ ? options.control_traffic_class : options.traffic_class;
  }
  const auto move = [this](ibv_qp_attr& to, int mask, const char* what) {
    if (const int rc = verbs().modify_qp(qp_.get(), &to, mask); rc != 0)
      throw Error(Status::transport, std::string("rdma: cannot connect a queue pair (") + what + "): " + std::strerror(rc));
  };
  move(attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
       "ready to receive");
  attr = {};
  attr.qp_state = IBV_QPS_RTS;
  attr.sq_psn = psn_;
  attr.timeout = ack_timeout(options.peer_timeout_s);
  attr.retry_cnt = kRetries;
  attr.rnr_retry = kRetries;
  move(attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC, "ready to send");
}

void RdmaQueue::bind(QueueOwner* owner) {
  owner_ = owner;
  if (owner == nullptr) return;
  for (const Early& e : early_) owner->on_receive(*this, RdmaImmediate::decode(e.immediate), e.bytes);
  early_.clear();
  if (failed_) owner->on_failure(*this, why_);
}

void RdmaQueue::write(const Write& write) {
  if (!dirty_) domain_.to_flush(*this);
  dirty_ = true;
  ibv_sge& piece = pieces_[chained_];
  piece = {reinterpret_cast<uintptr_t>(write.from), uint32_t(write.bytes), write.lkey};
  ibv_send_wr& wr = sends_[chained_];
  wr = {};
  const uint64_t count = posted_ + ++chained_;
  const bool signalled = write.signalled || count % kSignalEvery == 0;
  wr.wr_id = uint64_t(id_) << 33 | 1ull << 32 | uint32_t(count);
  wr.sg_list = &piece;
  wr.num_sge = write.bytes > 0;
  wr.opcode = write.immediate != nullptr ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
  wr.send_flags = (signalled ? unsigned(IBV_SEND_SIGNALED) : 0u) | (write.bytes <= max_inline_ ? unsigned(IBV_SEND_INLINE) : 0u);
  if (write.immediate != nullptr) wr.imm_data = __builtin_bswap32(write.immediate->encode());
  wr.wr.rdma.remote_addr = write.to;
  wr.wr.rdma.rkey = write.rkey;
  RdmaCounters& counters = domain_.count();
  if (control_ || write.immediate == nullptr)
    counters.credit_writes.add();
  else
    counters.work_requests.add();
  if (signalled) counters.signalled.add();
}

uint32_t RdmaQueue::flush(bool during_pooling) {
  if (chained_ == 0 || failed_) return 0;
  for (uint32_t i = 0; i + 1 < chained_; ++i) sends_[i].next = &sends_[i + 1];
  sends_[chained_ - 1].next = nullptr;
  if (completed_ == posted_) progress_ns_ = domain_.now();
  const uint32_t writes = std::exchange(chained_, 0);
  posted_ += writes;
  RdmaCounters& counters = domain_.count();
  counters.doorbells.add();
  if (!during_pooling) counters.most_doorbells.set(std::max<int64_t>(counters.most_doorbells.get(), ++doorbells_in_round_));
  ibv_send_wr* bad;
  if (ibv_post_send(qp_.get(), sends_.data(), &bad) != 0) fail("the queue pair takes no more work");
  return writes;
}

void RdmaQueue::received(const ibv_wc& completion) {
  if (++consumed_ == kReceiveBatch) {
    post_receives(kReceiveBatch);
    consumed_ = 0;
    domain_.count().receives.add(kReceiveBatch);
    domain_.count().receive_doorbells.add();
  }
  const uint32_t immediate = __builtin_bswap32(completion.imm_data);
  if (owner_ != nullptr)
    owner_->on_receive(*this, RdmaImmediate::decode(immediate), completion.byte_len);
  else if (early_.size() < early_.capacity())
    early_.push_back({immediate, completion.byte_len});
}

void RdmaQueue::post_receives(uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) receives_[i].next = i + 1 < count ? &receives_[i + 1] : nullptr;
  ibv_recv_wr* bad;
  if (ibv_post_recv(qp_.get(), receives_.data(), &bad) != 0) fail("the queue pair takes no more receives");
}

void RdmaQueue::fail(const char* why) {
  if (failed_) return;
  failed_ = true;
  why_ = why;
  if (owner_ != nullptr) owner_->on_failure(*this, why);
}

}  // namespace sidepool
#endif
