#include "rdma_link.hpp"

#ifdef SIDEPOOL_VERBS
#include <algorithm>

namespace sidepool {
namespace {

RdmaQueue::Depths depths(uint32_t slots) { return {4 * slots + 32, receives_for(slots, false)}; }

class RdmaServerLane final : public ServerLane, public RdmaPeer {
 public:
  RdmaServerLane(const LaneLimits& limits, std::shared_ptr<RdmaMemory> memory, RdmaLink link, const RdmaEnd& peer, uint64_t window_bytes,
                 uint64_t piece_bytes)
      : ServerLane(limits, Fd()), RdmaPeer(std::move(memory), std::move(link), peer, window_bytes), piece_bytes_(piece_bytes) {
    // A slot is answered in at most this many pieces, so the queue can never need to grow.
    pieces_.resize(limits.slots * (limits.response_bytes / piece_bytes_ + 2));
  }

  ~RdmaServerLane() override {
    if (twin_) twin_.data->domain().discard(std::move(twin_.data), std::move(twin_.control), memory_);
    if (!adopted_) return;
    domain().leave(*this);
    part();
  }

  const char* kind() const override { return "rdma"; }
  bool polled() const override { return true; }
  bool has_pending() const override { return arrived_ != 0 || failed(); }
  bool wants_write() const override { return head_ != tail_; }

  void adopted() override {
    adopted_ = true;
    domain().join(*this);
    link_.bind(this);
    if (moved_) give_grant(true);  // one sent on the old queues may have been lost with them
  }

  std::unique_ptr<Twin> make_twin(RdmaDomain* target) const override {
    auto twin = std::make_unique<RdmaTwin>();
    twin->link = RdmaLink(static_cast<VerbsDomain&>(*target), *memory_, depths(limits_.slots), !piggybacks());
    return twin;
  }

  void begin_move(std::unique_ptr<Twin> twin) override {
    twin_ = std::move(static_cast<RdmaTwin&>(*twin).link);
    step_ = RdmaKind::offer;
    const RdmaMove numbers = twin_.numbers();
    tell(RdmaKind::offer, &numbers);
  }

  bool ready_to_move() const override { return step_ == RdmaKind::changed && !wants_write() && !failed(); }

  void leave() override {
    tell(RdmaKind::closed, nullptr, true);
    // At once: the new engine may write what these writes are sent from.
    data().flush();
    if (link_.control) link_.control->flush();
    VerbsDomain& old = domain();
    old.leave(*this);
    old.retire(std::move(link_.data), std::move(link_.control), memory_);
    link_ = std::move(twin_);
    step_ = RdmaKind::request;
    waiting_ = false;
    moved_ = true;
  }

  void on_receive(RdmaQueue&, RdmaImmediate immediate, uint32_t bytes) override {
    const uint64_t bit = 1ull << immediate.slot;
    switch (immediate.kind) {
      case RdmaKind::request:
        if (immediate.slot >= limits_.slots || ((busy_ | arrived_) & bit)) return fail("the peer used a slot that it had not got back");
        frame_bytes_[immediate.slot] = bytes;
        arrived_ |= bit;
        return;
      case RdmaKind::accept: return connect_twin();
      case RdmaKind::changed:
        if (step_ != RdmaKind::change) return fail("the peer changed queue pairs without being asked");
        step_ = RdmaKind::changed;
        return;
      case RdmaKind::bye: return fail("the peer closed the lane");
      default: return fail("the peer sent an immediate that no ranker sends");
    }
  }

  bool collect(LineVector<uint32_t>& slots, bool) override {
    if (failed()) return false;
    for (uint64_t arrived = std::exchange(arrived_, 0); arrived != 0; arrived &= arrived - 1) {
      const uint32_t slot = uint32_t(std::countr_zero(arrived));
      RequestHeader header;  // a copy: the peer may rewrite the original at any time
      std::memcpy(&header, request_slot(slot), sizeof header);
      if (check_request_header(header, limits_.request_bytes, limits_.slots) != Status::ok || header.slot != slot ||
          header.frame_bytes != frame_bytes_[slot])
        fail("the peer sent bytes that are no request");
      else if (!window_.arrived(frame_bytes_[slot]))
        fail("the peer sent more than it was granted");
      if (failed()) return false;
      if (piggybacks()) {
        Grant grant;
        std::memcpy(&grant, reinterpret_cast<const std::byte*>(&header) + kGrantOffset, sizeof grant);
        take_grant(grant);
      }
      busy_ |= 1ull << slot;
      slots.push_back(slot);
      counters_.received.add();
      counters_.request_bytes.add(int64_t(frame_bytes_[slot]));
      counters_.in_flight.add();
    }
    return true;
  }

  std::pair<const std::byte*, size_t> request(uint32_t slot) const override { return {request_slot(slot), frame_bytes_[slot]}; }

  std::pair<std::byte*, size_t> payload(uint32_t slot) override {
    return {response_slot(slot), limits_.response_bytes - sizeof(ResponseHeader)};
  }

  void begin(uint32_t slot, const ParsedRequest&, uint64_t) override {
    slot_ = slot;
    done_ = 0;
    queued_ = ready_ = 0;
  }

  void progress(uint32_t done, size_t bytes) override {
    done_ = done;
    ready_ = bytes;
    if (ready_ - queued_ < piece_bytes_) return;
    queue(RdmaKind::piece, ready_);
    data().flush(true);  // at once: the rest of this subrequest takes longer than a doorbell
  }

  bool finish(ResponseHeader header) override {
    if (header.status != 0) ready_ = queued_;  // the response is void: what has not left stays here
    header.slot = slot_;
    header.flags = kLastPiece;
    header.first = 0;
    header.count = done_;
    header.frame_bytes = sizeof header + ready_;
    std::memcpy(response_slot(slot_) + ready_, &header, sizeof header);
    counters_.sent.add();
    counters_.response_bytes.add(int64_t(header.frame_bytes));
    queue(RdmaKind::last, ready_ + sizeof header);
    window_.consumed(frame_bytes_[slot_]);
    give_grant();
    return !failed();
  }

  bool resume() override {
    take_grant();
    if (!failed() && !send_queued()) return false;
    waiting_ = false;
    return true;
  }

 private:
  struct RdmaTwin final : Twin {
    RdmaLink link;
  };

  struct Piece {
    RdmaImmediate immediate;
    size_t begin, end;  // bytes of the response slot
  };

  const std::byte* request_slot(uint32_t slot) const { return memory_->landing.data() + slot * limits_.request_bytes; }
  std::byte* response_slot(uint32_t slot) { return memory_->staging.data() + slot * limits_.response_bytes; }

  // The ranker's twins are there: connect ours to them, and ask it to use them.
  void connect_twin() {
    if (step_ != RdmaKind::offer) return fail("the peer accepts a move that was not offered");
    RdmaMove numbers;
    std::memcpy(&numbers, &memory_->control().move, sizeof numbers);
    try {
      twin_.connect(peer_, numbers);
    } catch (const Error&) {
      return fail("the twin queue pairs cannot be connected");
    }
    step_ = RdmaKind::change;
    tell(RdmaKind::change);
  }

  void queue(RdmaKind kind, size_t end) {
    pieces_[tail_++ % pieces_.size()] = {{kind, slot_, done_}, queued_, end};
    counters_.leaving_bytes.add(int64_t(end - queued_));
    queued_ = end;
    if (!send_queued()) {
      counters_.credit_waits.add();
      wait_for_credit();
    }
  }

  // As many pieces as the queue and the ranker's credit take; true: all of them.
  bool send_queued() {
    for (; head_ != tail_; ++head_) {
      const Piece& piece = pieces_[head_ % pieces_.size()];
      const size_t bytes = piece.end - piece.begin;
      if (!may_send(bytes) && !(take_grant() && may_send(bytes))) return false;
      const uint32_t slot = piece.immediate.slot;
      std::byte* from = response_slot(slot) + piece.begin;
      const bool last = piece.immediate.kind == RdmaKind::last;
      if (last && piggybacks()) put_grant(from + bytes - sizeof(ResponseHeader));
      send(from, memory_->staging_mr->lkey, bytes, peer_.slots_address + slot * peer_.slot_stride + sizeof(ResponseHeader) + piece.begin,
           piece.immediate);
      // Only now may the ranker use the slot again.
      if (last) busy_ &= ~(1ull << slot);
      counters_.in_flight.add(-int64_t(last));
      counters_.leaving_bytes.add(-int64_t(bytes));
    }
    return true;
  }

  const uint64_t piece_bytes_;
  bool adopted_ = false, moved_ = false;
  RdmaLink twin_;                       // at the engine that the lane moves to
  RdmaKind step_ = RdmaKind::request;   // the last step of a move; `request`: none is under way
  uint64_t arrived_ = 0, busy_ = 0;  // slots with a new request; slots being answered
  size_t frame_bytes_[kMaxSlots] = {};
  LineVector<Piece> pieces_;  // ring
  size_t head_ = 0, tail_ = 0;
  uint32_t slot_ = 0, done_ = 0;
  size_t queued_ = 0, ready_ = 0;
};

class VerbsServer final : public RdmaServer {
 public:
  explicit VerbsServer(const RdmaOptions& options) : device_(std::make_shared<RdmaDevice>(options)) {}

  std::unique_ptr<RdmaDomain> make_domain() override { return std::make_unique<VerbsDomain>(device_); }
  std::string description() const override { return device_->description(); }

  std::pair<std::unique_ptr<ServerLane>, std::string> admit(RdmaDomain& any, const LaneLimits& limits, const std::string& bytes) override {
    const RdmaOptions& options = device_->options();
    const RdmaEnd peer = parse_end(*device_, bytes, limits, limits.response_bytes + kTrailerBytes);
    if (!options.piggyback && peer.control_qpn == 0)
      throw Error(Status::transport, "rdma: the peer's end: control queue pair: found 0; allowed: one, since this sidecar's credits are dedicated");
    auto memory = std::make_shared<RdmaMemory>(device_, limits.slots * limits.request_bytes, limits.slots * limits.response_bytes);
    RdmaLink link(static_cast<VerbsDomain&>(any), *memory, depths(limits.slots), !options.piggyback);
    link.connect(peer, {peer.data_qpn, peer.data_psn, peer.control_qpn, peer.control_psn});
    RdmaEnd end = device_->end();
    const RdmaMove numbers = link.numbers();
    end.data_qpn = numbers.data_qpn;
    end.data_psn = numbers.data_psn;
    end.control_qpn = numbers.control_qpn;
    end.control_psn = numbers.control_psn;
    end.receives = receives_for(limits.slots, false);
    end.slots = limits.slots;
    end.slots_address = uint64_t(reinterpret_cast<uintptr_t>(memory->landing.data()));
    end.slots_rkey = memory->landing_mr->rkey;
    end.slot_stride = limits.request_bytes;
    end.control_address = uint64_t(reinterpret_cast<uintptr_t>(memory->page.data()));
    end.control_rkey = memory->page_mr->rkey;
    end.window_bytes = window_for(options.window_bytes, end.slot_stride);
    auto lane = std::make_unique<RdmaServerLane>(limits, std::move(memory), std::move(link), peer, end.window_bytes,
                                                 piece_bytes_for(options, peer, limits.slots));
    return {std::move(lane), std::string(reinterpret_cast<const char*>(&end), sizeof end)};
  }

 private:
  std::shared_ptr<RdmaDevice> device_;
};

}  // namespace

std::shared_ptr<RdmaServer> make_rdma_server(const RdmaOptions& options) { return std::make_shared<VerbsServer>(options); }

}  // namespace sidepool
#endif
