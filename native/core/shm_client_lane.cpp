#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include "client_lane.hpp"
#include "connect.hpp"

namespace sidepool {
namespace {

class ShmClientLane final : public ClientLane {
 public:
  ShmClientLane(const LaneLimits& limits, Fd socket, Fd doorbell, Mapping memory, Mapping page, bool same_clock)
      : ClientLane(limits), socket_(std::move(socket)), doorbell_(std::move(doorbell)), memory_(std::move(memory)), page_(std::move(page)) {
    header_ = reinterpret_cast<ShmHeader*>(memory_.data());
    engine_ = reinterpret_cast<const EnginePage*>(page_.data());
    same_clock_ = same_clock;
    waiters_ = Waiters::anywhere;
  }

  const char* kind() const override { return "shm"; }
  int fd() const override { return socket_.get(); }
  std::byte* request(uint32_t slot) override { return memory_.data() + shm_request_offset(limits_, slot); }
  std::byte* response(uint32_t slot) override { return memory_.data() + shm_response_offset(limits_, slot); }

 protected:
  SlotControl& control(uint32_t slot) override { return header_->control[slot]; }

  Status send(uint32_t slot, size_t, uint64_t) override {
    header_->pending.fetch_or(1ull << slot, std::memory_order_seq_cst);
    // Pairs with Engine::sleep: either the engine sees the bit, or we see it asleep and ring.
    if (engine_->sleeping.load(std::memory_order_seq_cst) != 0) eventfd_write(doorbell_.get(), 1);
    return Status::ok;
  }

 private:
  Fd socket_, doorbell_;
  Mapping memory_, page_;
  ShmHeader* header_;
  const EnginePage* engine_;
};

// The sidecar could otherwise truncate the memory under us (SIGBUS).
void require_sealed(int fd, size_t bytes, const std::string& where) {
  struct stat status {};
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd, &status) != 0 || size_t(status.st_size) < bytes)
    throw Error(Status::frame, where + ": the memory handed over is unsealed or too small");
}

}  // namespace

std::shared_ptr<ClientLane> connect_shm(const std::string& path, const std::string& token, double timeout_s) {
  const uint64_t deadline = now_ns() + uint64_t(timeout_s * 1e9);
  const std::string where = "shm lane at " + path;
  Fd socket = dial_unix(path, deadline);
  Fd fds[3];  // slots, engine page, doorbell
  const HelloAck ack = shake_hands(socket.get(), hello_with(token, FrameKind::hello, where), fds, 3, deadline, where);
  const LaneLimits limits{ack.slots, ack.request_bytes, ack.response_bytes};
  require_sealed(fds[0].get(), shm_bytes(limits), where);
  require_sealed(fds[1].get(), sizeof(EnginePage), where);
  Mapping memory = Mapping::shared(fds[0].get(), shm_bytes(limits), true);
  Mapping page = Mapping::shared(fds[1].get(), 4096, false);
  return std::make_shared<ShmClientLane>(limits, std::move(socket), std::move(fds[2]), std::move(memory), std::move(page),
                                         ack.clock_id == clock_id());
}

}  // namespace sidepool
