#include <fcntl.h>
#include <sys/socket.h>

#include <cerrno>

#include "clock.hpp"
#include "server_lane.hpp"

namespace sidepool {
namespace {

class ShmServerLane final : public ServerLane {
 public:
  ShmServerLane(const LaneLimits& limits, Fd socket, ShmRegion region)
      : ServerLane(limits, std::move(socket)), region_(std::move(region)) {
    header_ = reinterpret_cast<ShmHeader*>(region_.mapping.data());
  }

  const char* kind() const override { return "shm"; }
  std::unique_ptr<Twin> make_twin(RdmaDomain*) const override {
    throw Error(Status::rejected, "an shm lane stays with its engine, whose own doorbell its ranker rings");
  }
  bool polled() const override { return true; }
  bool has_pending() const override { return header_->pending.load(std::memory_order_seq_cst) != 0; }

  bool collect(LineVector<uint32_t>& slots, bool readable) override {
    if (readable) {
      // Nothing is ever sent on the socket after the handshake: it is there to tell when the peer is gone.
      char byte;
      const ssize_t n = recv(fd(), &byte, 1, MSG_DONTWAIT);
      if (n >= 0 || (errno != EAGAIN && errno != EINTR)) return false;
    }
    if (header_->pending.load(std::memory_order_relaxed) == 0) return true;
    uint64_t arrived = header_->pending.exchange(0, std::memory_order_acq_rel);
    if (arrived & busy_) return false;  // a slot posted again before it was answered
    while (arrived != 0) {
      const uint32_t slot = uint32_t(std::countr_zero(arrived));
      arrived &= arrived - 1;
      if (slot >= limits_.slots) return false;
      RequestHeader header;  // a copy: the peer may rewrite the original at any time
      std::memcpy(&header, region_.mapping.data() + shm_request_offset(limits_, slot), sizeof header);
      if (check_request_header(header, limits_.request_bytes, limits_.slots) != Status::ok || header.slot != slot) return false;
      frame_bytes_[slot] = header.frame_bytes;
      busy_ |= 1ull << slot;
      slots.push_back(slot);
      counters_.received.add();
      counters_.request_bytes.add(int64_t(header.frame_bytes));
      counters_.in_flight.add();
    }
    return true;
  }

  std::pair<const std::byte*, size_t> request(uint32_t slot) const override {
    return {region_.mapping.data() + shm_request_offset(limits_, slot), frame_bytes_[slot]};
  }

  std::pair<std::byte*, size_t> payload(uint32_t slot) override {
    return {response(slot) + sizeof(ResponseHeader), limits_.response_bytes - sizeof(ResponseHeader)};
  }

  void begin(uint32_t slot, const ParsedRequest&, uint64_t) override {
    slot_ = slot;
    payload_bytes_ = 0;
    done_ = 0;
  }

  void progress(uint32_t done, size_t bytes) override {
    done_ = done;
    payload_bytes_ = bytes;
    header_->control[slot_].word.store(done, std::memory_order_release);
  }

  bool finish(ResponseHeader header) override {
    header.slot = slot_;
    header.flags = kLastPiece;
    header.first = 0;
    header.count = done_;
    header.frame_bytes = sizeof header + payload_bytes_;
    std::memcpy(response(slot_), &header, sizeof header);
    SlotControl& control = header_->control[slot_];
    busy_ &= ~(1ull << slot_);
    counters_.sent.add();
    counters_.in_flight.add(-1);
    counters_.response_bytes.add(int64_t(header.frame_bytes));
    control.word.store(kSlotDone | done_, std::memory_order_seq_cst);
    if (control.waiting.load(std::memory_order_seq_cst) != 0) futex_wake(control.word, 1, Waiters::anywhere);
    return true;
  }

 private:
  std::byte* response(uint32_t slot) { return region_.mapping.data() + shm_response_offset(limits_, slot); }

  ShmRegion region_;
  ShmHeader* header_;
  uint64_t busy_ = 0;  // slots being answered: ours alone, whatever the peer writes
  size_t frame_bytes_[kMaxSlots] = {};
  uint32_t slot_ = 0;
  uint32_t done_ = 0;
  size_t payload_bytes_ = 0;
};

}  // namespace

ShmRegion make_shm_region(const LaneLimits& limits) {
  ShmRegion region;
  const size_t bytes = shm_bytes(limits);
  region.memfd = Fd(memfd_create("sidepool-lane", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!region.memfd) throw Error(Status::internal, std::string("memfd_create: ") + std::strerror(errno));
  if (ftruncate(region.memfd.get(), off_t(bytes)) != 0)
    throw Error(Status::internal, "cannot size a lane of " + std::to_string(bytes) + " bytes: " + std::strerror(errno));
  // Neither end can shrink it under the other.
  if (fcntl(region.memfd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    throw Error(Status::internal, std::string("cannot seal a lane: ") + std::strerror(errno));
  region.mapping = Mapping::shared(region.memfd.get(), bytes, true);
  new (region.mapping.data()) ShmHeader();
  return region;
}

std::unique_ptr<ServerLane> make_shm_server_lane(const LaneLimits& limits, Fd socket, ShmRegion region) {
  return std::make_unique<ShmServerLane>(limits, std::move(socket), std::move(region));
}

}  // namespace sidepool
