#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "client_lane.hpp"
#include "connect.hpp"

namespace sidepool {
namespace {

// A lock for the few microseconds of a send; waits on a futex, with a deadline.
class SendLock {
 public:
  bool lock(uint64_t deadline_ns) {
    uint32_t state = 0;
    if (state_.compare_exchange_strong(state, 1, std::memory_order_acquire)) return true;
    while (state_.exchange(2, std::memory_order_acquire) != 0) {
      if (now_ns() >= deadline_ns) return false;
      futex_wait_until(state_, 2, deadline_ns);
    }
    return true;
  }
  void unlock() {
    if (state_.exchange(0, std::memory_order_release) == 2) futex_wake(state_, 1);
  }

 private:
  std::atomic<uint32_t> state_{0};
};

// One socket for all slots. There is no receiving thread: one of the threads that wait for a response reads the socket
// for everybody until its own response is complete, then passes the reading on to another waiter.
class TcpClientLane final : public ClientLane {
 public:
  TcpClientLane(const LaneLimits& limits, Fd socket, bool same_clock)
      : ClientLane(limits),
        socket_(std::move(socket)),
        memory_(Mapping::anonymous(limits.slots * (limits.request_bytes + limits.response_bytes))),
        controls_(std::make_unique<SlotControl[]>(limits.slots)) {
    same_clock_ = same_clock;
  }

  const char* kind() const override { return "tcp"; }
  int fd() const override { return socket_.get(); }
  std::byte* request(uint32_t slot) override { return memory_.data() + slot * limits_.request_bytes; }
  std::byte* response(uint32_t slot) override {
    return memory_.data() + limits_.slots * limits_.request_bytes + slot * limits_.response_bytes;
  }

  void on_hangup() override { collect(); }

  void collect() override {
    // Whoever reads reads for everybody and comes to the end by itself; if nobody does, read what is there now.
    if (reading_.exchange(true, std::memory_order_seq_cst)) return;
    while (!dead() && receive_some()) {
    }
    reading_.store(false, std::memory_order_seq_cst);
    pass_reading_on();
  }

 protected:
  SlotControl& control(uint32_t slot) override { return controls_[slot]; }
  bool arrives_by_itself() const override { return false; }

  Status send(uint32_t slot, size_t bytes, uint64_t deadline_ns) override {
    if (!send_lock_.lock(deadline_ns)) return Status::deadline;
    const Status status = send_all(request(slot), bytes, deadline_ns);
    send_lock_.unlock();
    return status;
  }

  void receive_or_sleep(uint32_t slot, uint32_t word, uint64_t until_ns, uint64_t spin_ns) override {
    if (!reading_.exchange(true, std::memory_order_seq_cst)) {
      read_for(slot, until_ns, spin_ns);
      reading_.store(false, std::memory_order_seq_cst);
      pass_reading_on();
      return;
    }
    SlotControl& c = control(slot);
    c.waiting.store(1, std::memory_order_seq_cst);
    // Pairs with pass_reading_on: either we see that nobody reads, or the reader sees us waiting and flips our word.
    if (reading_.load(std::memory_order_seq_cst) && c.word.load(std::memory_order_seq_cst) == word && !dead())
      futex_wait_until(c.word, word, until_ns);
    c.waiting.store(0, std::memory_order_seq_cst);
    // A reader may have chosen us to read on just as our time ran out: we shall not, so choose somebody else.
    if (now_ns() >= until_ns && !reading_.load(std::memory_order_seq_cst)) pass_reading_on();
  }

 private:
  Status send_all(const std::byte* data, size_t bytes, uint64_t deadline_ns) {
    for (size_t sent = 0; sent < bytes;) {
      const ssize_t n = ::send(socket_.get(), data + sent, bytes - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n >= 0) {
        sent += size_t(n);
      } else if (errno == EAGAIN) {
        if (wait_ready(socket_.get(), POLLOUT, deadline_ns)) continue;
        if (sent == 0) return Status::deadline;
        kill();  // half a frame is on its way: nothing sensible can follow it
        return Status::deadline;
      } else if (errno != EINTR) {
        kill();
        return Status::transport;
      }
    }
    return Status::ok;
  }

  void read_for(uint32_t slot, uint64_t until_ns, uint64_t spin_ns) {
    const uint64_t spin_until = now_ns() + spin_ns;
    while (!dead() && (control(slot).word.load(std::memory_order_acquire) & kSlotDone) == 0) {
      if (receive_some()) continue;
      const uint64_t now = now_ns();
      if (now >= until_ns) return;
      if (now >= spin_until) wait_ready(socket_.get(), POLLIN, until_ns);
    }
  }

  void pass_reading_on() {
    for (uint32_t slot = 0; slot < limits_.slots; ++slot) {
      SlotControl& c = control(slot);
      // One whose response is complete is about to leave, and would not read on.
      if (c.waiting.load(std::memory_order_seq_cst) == 0 || c.word.load(std::memory_order_seq_cst) & kSlotDone) continue;
      c.word.fetch_xor(kSlotPass, std::memory_order_seq_cst);
      futex_wake(c.word, 1);
      return;
    }
  }

  // One recv; false: nothing there now. Only the thread that set reading_ may call it.
  bool receive_some() {
    const bool in_header = received_ < sizeof incoming_;
    std::byte* to = in_header ? reinterpret_cast<std::byte*>(&incoming_) + received_ : target_ + (received_ - sizeof incoming_);
    const size_t want = (in_header ? sizeof incoming_ : incoming_.frame_bytes) - received_;
    const ssize_t n = recv(socket_.get(), to, want, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return errno == EINTR;
    if (n <= 0) {
      kill();
      return false;
    }
    received_ += size_t(n);
    if (in_header && received_ == sizeof incoming_ && !accept_header()) {
      kill();
      return false;
    }
    if (received_ >= sizeof incoming_ && received_ == incoming_.frame_bytes) complete();
    return true;
  }

  bool accept_header() {
    if (incoming_.slot >= limits_.slots) return false;
    const SlotState& state = slots_[incoming_.slot];
    const uint64_t id = state.lookup_id.load(std::memory_order_acquire);
    if (id == 0 || id != incoming_.lookup_id) return false;
    const uint32_t features = uint32_t(state.offsets.size() - 1);
    if (check_response_header(incoming_, features) != Status::ok) return false;
    const size_t begin = state.offsets[incoming_.first], end = state.offsets[incoming_.first + incoming_.count];
    if (incoming_.frame_bytes - sizeof incoming_ != end - begin) return false;
    target_ = response(incoming_.slot) + sizeof(ResponseHeader) + begin;
    return true;
  }

  void complete() {
    received_ = 0;
    counters_.response_bytes.fetch_add(int64_t(incoming_.frame_bytes), std::memory_order_relaxed);
    const uint32_t done = incoming_.first + incoming_.count;
    if (incoming_.flags & kLastPiece) {
      std::memcpy(response(incoming_.slot), &incoming_, sizeof incoming_);
      mark_done(incoming_.slot, done);
    } else {
      control(incoming_.slot).word.store(done, std::memory_order_release);
    }
  }

  Fd socket_;
  Mapping memory_;
  std::unique_ptr<SlotControl[]> controls_;
  SendLock send_lock_;
  std::atomic<bool> reading_{false};
  // Owned by the thread that set reading_.
  ResponseHeader incoming_;
  size_t received_ = 0;
  std::byte* target_ = nullptr;
};

}  // namespace

std::shared_ptr<ClientLane> connect_tcp(const std::string& host, int port, const std::string& token, double timeout_s) {
  const uint64_t deadline = now_ns() + uint64_t(timeout_s * 1e9);
  Fd socket = dial_tcp(host, port, deadline);
  const HelloAck ack = shake_hands(socket.get(), token, nullptr, 0, deadline, "tcp lane at " + host + ":" + std::to_string(port));
  const LaneLimits limits{ack.slots, ack.request_bytes, ack.response_bytes};
  return std::make_shared<TcpClientLane>(limits, std::move(socket), ack.clock_id == clock_id());
}

}  // namespace sidepool
