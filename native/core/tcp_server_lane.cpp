#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "clock.hpp"
#include "credit.hpp"
#include "server_lane.hpp"
#include "tcp_credit.hpp"

namespace sidepool {
namespace {

// Responses leave in pieces of about this size while pooling goes on: large enough that a system call is a small part
// of its cost (a 256 KiB copy takes ~25 µs, a sendmsg ~1 µs), small enough to overlap with the next tables.
constexpr size_t kPieceBytes = 256 << 10;

// How often the kernel is asked what the network did to a lane's segments: often enough that the ranker hears of congestion
// within a few round trips, rarely enough that a busy lane does not notice the microsecond.
constexpr uint64_t kMarksNs = 1'000'000;

class TcpServerLane final : public ServerLane {
 public:
  TcpServerLane(const LaneLimits& limits, Fd socket, Fd grants, const Hello& peer, uint64_t window_bytes)
      : ServerLane(limits, std::move(socket)),
        grants_(std::move(grants)),
        same_clock_(peer.clock_id == clock_id()),
        credit_(window_for(peer.window_bytes, limits.response_bytes)),
        window_(window_for(window_bytes, limits.request_bytes)),
        memory_(Mapping::anonymous(limits.slots * (limits.request_bytes + limits.response_bytes))) {
    // A slot is answered in at most this many pieces, so the queue can never need to grow.
    pieces_.resize(limits.slots * (limits.response_bytes / kPieceBytes + 2));
  }

  const char* kind() const override { return "tcp"; }
  std::unique_ptr<Twin> make_twin(RdmaDomain*) const override { return nullptr; }  // its socket is all it needs
  bool polled() const override { return false; }
  bool wants_write() const override { return head_ != tail_; }
  bool wants_room() const override { return wants_write() && !starved_; }
  int grants_fd() const override { return grants_.fd(); }
  bool take_grants() override { return read_grants() && writable(); }

  bool collect(LineVector<uint32_t>& slots, bool readable) override {
    if (!readable) return true;
    // A few frames a turn, so that one busy lane cannot starve the others of its engine.
    for (int frames = 0; frames < 4;) {
      const bool in_header = received_ < sizeof(RequestHeader);
      std::byte* to = in_header ? reinterpret_cast<std::byte*>(&incoming_) + received_ : request_slot(incoming_.slot) + received_;
      const size_t want = (in_header ? sizeof(RequestHeader) : incoming_.frame_bytes) - received_;
      const ssize_t n = recv(fd(), to, want, MSG_DONTWAIT);
      if (n == 0) return false;
      if (n < 0 && errno != EAGAIN && errno != EINTR) return false;
      if (n < 0) break;
      received_ += size_t(n);
      if (in_header && received_ == sizeof(RequestHeader)) {
        Grant grant;
        std::memcpy(&grant, reinterpret_cast<const std::byte*>(&incoming_) + kGrantOffset, sizeof grant);
        if (!grants_) take_grant(grant);
        if (incoming_.kind == FrameKind::grant) {
          if (grants_ || !is_grant(std::bit_cast<GrantFrame>(incoming_))) return false;
          received_ = 0;
          ++frames;
          continue;
        }
        if (check_request_header(incoming_, limits_.request_bytes, limits_.slots) != Status::ok) return false;
        if (busy_ >> incoming_.slot & 1 || !window_.arrived(incoming_.frame_bytes)) return false;
        std::memcpy(request_slot(incoming_.slot), &incoming_, sizeof incoming_);
      }
      if (received_ >= sizeof(RequestHeader) && received_ == incoming_.frame_bytes) {
        busy_ |= 1ull << incoming_.slot;
        slots.push_back(incoming_.slot);
        counters_.received.add();
        counters_.in_flight.add();
        counters_.request_bytes.add(int64_t(received_));
        received_ = 0;
        ++frames;
      }
    }
    return !starved_ || writable();  // what came may be credit
  }

  std::pair<const std::byte*, size_t> request(uint32_t slot) const override {
    const std::byte* frame = const_cast<TcpServerLane*>(this)->request_slot(slot);
    RequestHeader header;
    std::memcpy(&header, frame, sizeof header);
    return {frame, header.frame_bytes};
  }

  std::pair<std::byte*, size_t> payload(uint32_t slot) override {
    return {response_slot(slot), limits_.response_bytes - sizeof(ResponseHeader)};
  }

  void begin(uint32_t slot, const ParsedRequest& request, uint64_t deadline_ns) override {
    slot_ = slot;
    deadline_ns_ = deadline_ns;
    partial_ = {};
    partial_.slot = slot;
    partial_.lookup_id = request.header.lookup_id;
    partial_.epoch = request.header.epoch;
    partial_.batch = request.header.batch;
    first_ = done_ = 0;
    flushed_ = ready_ = 0;
  }

  void progress(uint32_t done, size_t bytes) override {
    done_ = done;
    ready_ = bytes;
    if (ready_ - flushed_ >= kPieceBytes) queue(partial_, false);
  }

  bool finish(ResponseHeader header) override {
    counters_.sent.add();
    header.marks = marks(header.finished_ns);
    window_.consumed(request(slot_).second);
    if (!grants_) {
      const Grant grant{window_.grant(), now_ns()};
      std::memcpy(reinterpret_cast<std::byte*>(&header) + kGrantOffset, &grant, sizeof grant);
    } else if (window_.due() && !grants_.send({window_.grant(), now_ns()})) {
      return false;
    }
    queue(header, true);
    return alive_;
  }

  bool writable() override {
    flush();
    return alive_;
  }

 private:
  struct Piece {
    ResponseHeader header;
    const std::byte* payload;
    size_t payload_bytes;
    uint64_t deadline_ns;
    size_t sent;
    bool paid;  // its credit is spent
  };

  std::byte* request_slot(uint32_t slot) { return memory_.data() + slot * limits_.request_bytes; }
  std::byte* response_slot(uint32_t slot) {
    return memory_.data() + limits_.slots * limits_.request_bytes + slot * limits_.response_bytes;
  }

  void queue(const ResponseHeader& header, bool last) {
    Piece& piece = pieces_[tail_ % pieces_.size()];
    ++tail_;
    piece.header = header;
    piece.header.slot = slot_;
    piece.header.flags = last ? kLastPiece : 0;
    piece.header.first = first_;
    piece.header.count = done_ - first_;
    piece.payload = response_slot(slot_) + flushed_;
    piece.payload_bytes = ready_ - flushed_;
    piece.header.frame_bytes = sizeof(ResponseHeader) + piece.payload_bytes;
    piece.deadline_ns = deadline_ns_;
    piece.sent = 0;
    piece.paid = false;
    first_ = done_;
    flushed_ = ready_;
    counters_.response_bytes.add(int64_t(piece.header.frame_bytes));
    counters_.leaving_bytes.add(int64_t(piece.header.frame_bytes));
    flush();
  }

  void take_grant(const Grant& grant) {
    if (grant.limit <= credit_.limit()) return;
    credit_.grant(grant.limit);
    if (!same_clock_) return;
    const uint64_t now = now_ns();
    counters_.grants.add();
    counters_.grant_us.add(int64_t(now > grant.granted_ns ? (now - grant.granted_ns) / 1000 : 0));
  }

  bool read_grants() {
    Grant newest;
    if (grants_ && !grants_.receive(newest)) alive_ = false;
    take_grant(newest);
    return alive_;
  }

  // The ranker has stopped waiting for this response: what has not begun to leave would only delay the others.
  void let_go(Piece& piece) {
    counters_.late_bytes.add(int64_t(piece.payload_bytes));
    counters_.response_bytes.add(-int64_t(piece.payload_bytes));
    counters_.leaving_bytes.add(-int64_t(piece.payload_bytes));
    piece.payload_bytes = 0;
    piece.header.count = 0;
    piece.header.status = int32_t(Status::deadline);
    piece.header.frame_bytes = sizeof piece.header;
  }

  // Marked or sent again, over the lane's life; read at most every kMarksNs.
  uint32_t marks(uint64_t now) {
    if (now - marks_read_ns_ < kMarksNs) return marks_;
    marks_read_ns_ = now;
    tcp_info info{};
    socklen_t length = sizeof info;
    if (getsockopt(fd(), IPPROTO_TCP, TCP_INFO, &info, &length) == 0) marks_ = info.tcpi_total_retrans + info.tcpi_delivered_ce;
    return marks_;
  }

  bool pay(Piece& piece) {
    const uint64_t bytes = piece.header.frame_bytes;
    piece.paid = credit_.covers(bytes) || (grants_ && read_grants() && credit_.covers(bytes));
    if (piece.paid) credit_.spend(bytes);
    return piece.paid;
  }

  // Hand as much as credit covers and the socket takes to the kernel: header and slot memory in one call, nothing copied here.
  void flush() {
    starved_ = false;
    while (alive_ && head_ != tail_) {
      Piece& piece = pieces_[head_ % pieces_.size()];
      if (!piece.paid && now_ns() > piece.deadline_ns) let_go(piece);
      if (piece.payload_bytes == 0 && (piece.header.flags & kLastPiece) == 0) {
        counters_.leaving_bytes.add(-int64_t(piece.header.frame_bytes));
        ++head_;
        continue;
      }
      starved_ = !piece.paid && !pay(piece);
      if (starved_) return;
      iovec parts[2];
      int count = 0;
      size_t offset = piece.sent;
      if (offset < sizeof piece.header) {
        parts[count++] = {reinterpret_cast<std::byte*>(&piece.header) + offset, sizeof piece.header - offset};
        offset = 0;
      } else {
        offset -= sizeof piece.header;
      }
      if (offset < piece.payload_bytes) parts[count++] = {const_cast<std::byte*>(piece.payload) + offset, piece.payload_bytes - offset};
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = size_t(count);
      const ssize_t n = sendmsg(fd(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno != EAGAIN) alive_ = false;
        return;
      }
      piece.sent += size_t(n);
      if (piece.sent < piece.header.frame_bytes) continue;
      // Only now may the ranker use the slot again: what waits to be sent stays bounded by its credits.
      if (piece.header.flags & kLastPiece) {
        busy_ &= ~(1ull << piece.header.slot);
        counters_.in_flight.add(-1);
      }
      counters_.leaving_bytes.add(-int64_t(piece.header.frame_bytes));
      ++head_;
    }
  }

  GrantSocket grants_;
  const bool same_clock_;
  SendCredit credit_;
  ReceiveCredit window_;
  bool starved_ = false;  // the first piece waits for credit
  Mapping memory_;
  RequestHeader incoming_;
  size_t received_ = 0;
  uint64_t busy_ = 0;
  bool alive_ = true;
  LineVector<Piece> pieces_;  // ring
  size_t head_ = 0, tail_ = 0;
  uint64_t deadline_ns_ = 0;
  uint64_t marks_read_ns_ = 0;
  uint32_t marks_ = 0;
  uint32_t slot_ = 0, first_ = 0, done_ = 0;
  size_t flushed_ = 0, ready_ = 0;
  ResponseHeader partial_;
};

}  // namespace

std::unique_ptr<ServerLane> make_tcp_server_lane(const LaneLimits& limits, Fd socket, Fd grants, const Hello& peer, uint64_t window_bytes) {
  return std::make_unique<TcpServerLane>(limits, std::move(socket), std::move(grants), peer, window_bytes);
}

}  // namespace sidepool
