#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "client_lane.hpp"
#include "connect.hpp"
#include "credit.hpp"
#include "tcp_credit.hpp"

namespace sidepool {
namespace {

// Who waits for credit waits for a slow sidecar: looking every millisecond is soon enough.
constexpr uint64_t kCreditLookNs = 1'000'000;
// What the rest of a grant gets whose beginning has left; the sidecar reads whatever else it does.
constexpr uint64_t kGrantRestNs = 1'000'000'000;

// A lock for the few microseconds of a send; waits on a futex, with a deadline.
class SendLock {
 public:
  bool try_lock() {
    uint32_t state = 0;
    return state_.compare_exchange_strong(state, 1, std::memory_order_seq_cst);
  }
  bool lock(uint64_t deadline_ns) {
    if (try_lock()) return true;
    while (state_.exchange(2, std::memory_order_acquire) != 0) {
      if (now_ns() >= deadline_ns) return false;
      futex_wait_until(state_, 2, deadline_ns);
    }
    return true;
  }
  void unlock() {
    if (state_.exchange(0, std::memory_order_seq_cst) == 2) futex_wake(state_, 1);
  }

 private:
  std::atomic<uint32_t> state_{0};
};

// One socket for all slots. There is no receiving thread: one of the threads that wait for a response reads the socket
// for everybody until its own response is complete, then passes the reading on to another waiter.
//
// Credits: the sidecar's grants are read by a sender that has run out of credit (dedicated connection), or come in response
// headers. What a response takes of the window counts until it has been read into its slot, so the reading thread grants.
class TcpClientLane final : public ClientLane {
 public:
  // `credit`, `window`: bytes that may be under way to the sidecar and from it. Without `grants`, credits travel in frames.
  TcpClientLane(const LaneLimits& limits, Fd socket, Fd grants, uint64_t credit, uint64_t window, bool same_clock)
      : ClientLane(limits),
        socket_(std::move(socket)),
        memory_(Mapping::anonymous(limits.slots * (limits.request_bytes + limits.response_bytes))),
        controls_(std::make_unique<SlotControl[]>(limits.slots)),
        grants_(std::move(grants)),
        credit_(credit),
        window_(window) {
    same_clock_ = same_clock;
  }

  const char* kind() const override { return "tcp"; }
  bool windowed() const override { return true; }
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
    Status status = wait_for_credit(bytes, deadline_ns);
    if (status == Status::ok) {
      if (!grants_) put_grant(request(slot));
      status = send_all(request(slot), bytes, deadline_ns);
    }
    send_lock_.unlock();
    if (owes_grant()) send_grant();  // it fell due while we held the lock
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
  // Until `bytes` are covered, which this spends. With the send lock.
  Status wait_for_credit(uint64_t bytes, uint64_t deadline_ns) {
    for (bool waited = false;;) {
      credit_.grant(limit_.load(std::memory_order_relaxed));
      if (credit_.covers(bytes)) {
        credit_.spend(bytes);
        return Status::ok;
      }
      if (dead()) return Status::transport;
      if (grants_) {
        Grant newest;
        if (!grants_.receive(newest)) kill();
        take_grant(newest);
      } else {
        collect();
        if (owes_grant()) tell_grant();  // the sidecar may be waiting for ours before it sends its own
      }
      if (limit_.load(std::memory_order_relaxed) > credit_.limit()) continue;
      const uint64_t now = now_ns();
      if (now >= deadline_ns) return Status::deadline;
      if (!waited) counters_.credit_waits.fetch_add(1, std::memory_order_relaxed);
      waited = true;
      wait_ready(grants_ ? grants_.fd() : socket_.get(), POLLIN, std::min(deadline_ns, now + kCreditLookNs));
    }
  }

  void take_grant(const Grant& grant) {
    uint64_t limit = limit_.load(std::memory_order_relaxed);
    while (limit < grant.limit && !limit_.compare_exchange_weak(limit, grant.limit, std::memory_order_relaxed)) {
    }
  }

  // The reading thread's: more has been read than the sidecar knows of.
  void give_grant() {
    const Grant grant{window_.grant(), now_ns()};
    if (grants_) {
      if (!grants_.send(grant)) kill();
      return;
    }
    due_ns_.store(grant.granted_ns, std::memory_order_relaxed);
    due_limit_.store(grant.limit, std::memory_order_seq_cst);
    send_grant();
  }

  bool owes_grant() const { return due_limit_.load(std::memory_order_seq_cst) > told_limit_.load(std::memory_order_relaxed); }

  // What is due, into the header of a frame that is about to leave. With the send lock.
  void put_grant(std::byte* header) {
    const Grant grant{due_limit_.load(std::memory_order_relaxed), due_ns_.load(std::memory_order_relaxed)};
    told_limit_.store(grant.limit, std::memory_order_relaxed);
    std::memcpy(header + kGrantOffset, &grant, sizeof grant);
  }

  // A frame for what is due, unless somebody is sending, who will see to it (seq_cst: one of us sees the other), or the
  // socket is full; then the reading thread comes back to it.
  void send_grant() {
    for (bool told = true; told && !dead() && owes_grant() && send_lock_.try_lock(); send_lock_.unlock()) told = tell_grant();
  }

  // With the send lock. False: the socket takes nothing now.
  bool tell_grant() {
    GrantFrame frame;
    const uint64_t told = told_limit_.load(std::memory_order_relaxed);
    auto* bytes = reinterpret_cast<std::byte*>(&frame);
    put_grant(bytes);
    const ssize_t n = ::send(socket_.get(), bytes, sizeof frame, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
      told_limit_.store(told, std::memory_order_relaxed);
      if (errno != EAGAIN && errno != EINTR) kill();
      return false;
    }
    if (send_all(bytes + n, sizeof frame - size_t(n), now_ns() + kGrantRestNs) != Status::ok) kill();
    return true;
  }

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
      const bool owes = owes_grant();
      if (owes) send_grant();
      if (now >= spin_until) wait_ready(socket_.get(), POLLIN, owes ? std::min(until_ns, now + kCreditLookNs) : until_ns);
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
    if (!window_.arrived(incoming_.frame_bytes)) return false;
    if (!grants_) {
      Grant grant;
      std::memcpy(&grant, reinterpret_cast<const std::byte*>(&incoming_) + kGrantOffset, sizeof grant);
      take_grant(grant);
    }
    target_ = response(incoming_.slot) + sizeof(ResponseHeader) + begin;
    return true;
  }

  void complete() {
    received_ = 0;
    counters_.response_bytes.fetch_add(int64_t(incoming_.frame_bytes), std::memory_order_relaxed);
    window_.consumed(incoming_.frame_bytes);
    if (window_.due()) give_grant();
    const uint32_t done = incoming_.first + incoming_.count;
    if (incoming_.flags & kLastPiece) {
      marks_.store(incoming_.marks, std::memory_order_relaxed);
      std::memcpy(response(incoming_.slot), &incoming_, sizeof incoming_);
      mark_done(incoming_.slot, done);
    } else {
      control(incoming_.slot).word.store(done, std::memory_order_release);
    }
  }

  Fd socket_;
  Mapping memory_;
  std::unique_ptr<SlotControl[]> controls_;
  GrantSocket grants_;  // received from with the send lock, sent to by the reading thread
  SendLock send_lock_;
  SendCredit credit_;                   // with the send lock
  std::atomic<uint64_t> limit_{0};      // the sidecar's newest grant
  std::atomic<uint64_t> due_limit_{0};  // piggybacked: granted by the reading thread
  std::atomic<uint64_t> due_ns_{0};
  std::atomic<uint64_t> told_limit_{0};  // and what of that has left; written with the send lock
  std::atomic<bool> reading_{false};
  // Owned by the thread that set reading_.
  ReceiveCredit window_;
  ResponseHeader incoming_;
  size_t received_ = 0;
  std::byte* target_ = nullptr;
};

}  // namespace

std::shared_ptr<ClientLane> connect_tcp(const std::string& host, int port, const std::string& token, double timeout_s, uint64_t window_bytes) {
  const uint64_t deadline = now_ns() + uint64_t(timeout_s * 1e9);
  const std::string where = "tcp lane at " + host + ":" + std::to_string(port);
  Fd socket = dial_tcp(host, port, deadline), grants;
  Hello hello = hello_with(token, FrameKind::hello, where);
  hello.window_bytes = window_bytes;
  hello.clock_id = clock_id();
  const HelloAck ack = shake_hands(socket.get(), hello, nullptr, 0, deadline, where);
  set_traffic_class(socket.get(), ack.traffic_class);
  if (ack.dedicated != 0) {
    grants = dial_tcp(host, port, deadline);
    set_traffic_class(grants.get(), ack.control_traffic_class);
    shake_hands(grants.get(), hello_with(token, FrameKind::hello_credits, where), nullptr, 0, deadline, where + " (credits)");
  }
  const LaneLimits limits{ack.slots, ack.request_bytes, ack.response_bytes};
  return std::make_shared<TcpClientLane>(limits, std::move(socket), std::move(grants), window_for(ack.window_bytes, ack.request_bytes),
                                         window_for(window_bytes, ack.response_bytes), ack.clock_id == clock_id());
}

}  // namespace sidepool
