#include "grpc_load.hpp"

#include "grpc_connection.hpp"

#ifdef SIDEPOOL_HTTP2
#include <netdb.h>

#include <algorithm>

#include "pacer.hpp"

namespace sidepool {
namespace {

// A healthy server greets within a round trip.
constexpr uint64_t kGreetNs = 5'000'000'000;
// A server that was lost is asked again this often: soon against the seconds a restart takes, cheap against a load.
constexpr uint64_t kRetryNs = 50'000'000;
// Requests started between two looks at what has come in, so that a loop that is behind still reads.
constexpr int kBurst = 64;
constexpr int kEvents = 64;
// Of ours, per call: its node in the connection's map.
constexpr size_t kCallBytes = 160;

// With gRPC's prefix.
GrpcMessage framed(const GrpcMessage& message) {
  const size_t n = message.bytes.size();
  GrpcMessage whole = message;
  whole.bytes = {'\0', char(n >> 24), char(n >> 16), char(n >> 8), char(n)};
  if (whole.deadline_at >= 0) whole.deadline_at += int64_t(whole.bytes.size());
  whole.bytes += message.bytes;
  return whole;
}

uint64_t unix_ns() {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000ull + uint64_t(t.tv_nsec);
}

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  explicit Address(const GrpcTarget& target) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    const int error = getaddrinfo(target.host.c_str(), std::to_string(target.port).c_str(), &hints, &found);
    if (error != 0) throw Error(Status::transport, target.host + ": " + gai_strerror(error));
    std::memcpy(&storage, found->ai_addr, found->ai_addrlen);
    length = found->ai_addrlen;
    freeaddrinfo(found);
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

class GrpcLoad final : public Load, public Replies {
 public:
  GrpcLoad(const GrpcTarget& target, const std::vector<GrpcMessage>& messages) : target_(target), address_(target), pacer_(target.spin_ns) {
    http2();
    std::transform(messages.begin(), messages.end(), std::back_inserter(messages_), framed);
  }

  LoadTotals run(const Schedule& schedule, const Outcomes& outcomes, uint64_t drain_ns) override {
    outcomes_ = &outcomes;
    connect_all();
    totals_.start_ns = now_ns() + kLeadNs;
    unix_start_ns_ = int64_t(unix_ns() + kLeadNs);
    const uint64_t end = totals_.start_ns + uint64_t(schedule.count ? schedule.due_ns[schedule.count - 1] : 0) + drain_ns;
    size_t next = 0;
    while ((next < schedule.count || outstanding_ > 0) && !stopped_.load(std::memory_order_relaxed) && now_ns() < end) {
      for (int i = 0; i < kBurst && next < schedule.count && totals_.start_ns + uint64_t(schedule.due_ns[next]) <= now_ns(); ++i, ++next)
        start(next, schedule.due_ns[next], messages_[size_t(schedule.request[next])]);
      for (auto& connection : connections_) connection->flush();
      handle_events(next < schedule.count ? totals_.start_ns + uint64_t(schedule.due_ns[next]) : end);
    }
    for (auto& connection : connections_) connection->close(kUnanswered, "no answer by the end of the run");
    for (; next < schedule.count; ++next) outcomes.done(next, since_start(), kNotSent);
    connections_.clear();
    return totals_;
  }

  void stop() override {
    stopped_.store(true, std::memory_order_relaxed);
    pacer_.wake();
  }

  std::map<int32_t, std::string> examples() const override { return examples_; }

 private:
  int64_t since_start() const { return int64_t(now_ns()) - int64_t(totals_.start_ns); }

  void connect_all() {
    for (int i = 0; i < target_.connections; ++i) {
      connections_.push_back(std::make_unique<GrpcConnection>(target_, *this, memory_));
      open(size_t(i));
    }
    const uint64_t until = now_ns() + kGreetNs;
    const auto greeted = [](const auto& c) { return c->greeted(); };
    while (!std::all_of(connections_.begin(), connections_.end(), greeted)) {
      handle_events(until);
      const bool lost = std::any_of(connections_.begin(), connections_.end(), [](const auto& c) { return !c->is_open(); });
      if (lost || now_ns() > until || stopped_.load(std::memory_order_relaxed))
        throw Error(Status::transport, target_.authority() + ": no HTTP/2 server answers there");
    }
  }

  void open(size_t i) { connections_[i]->open(address_.get(), address_.length, pacer_.epoll(), i); }

  void start(size_t index, int64_t due_ns, const GrpcMessage& message) {
    outcomes_->sent(index, since_start());
    ++outstanding_;
    const size_t bytes = memory_.bytes + outstanding_ * kCallBytes;
    if (bytes > target_.memory_bytes) return over(index, kNotSent, "the calls outstanding have reached the memory limit");
    GrpcConnection* connection = choose();
    if (connection == nullptr) return over(index, kLost, "no connection to the server");
    connection->call(index, message, (unix_start_ns_ + due_ns + message.deadline_ns) / 1000);
    totals_.most_outstanding = std::max(totals_.most_outstanding, outstanding_);
    totals_.most_bytes = std::max(totals_.most_bytes, bytes);
  }

  // In turn, those that take calls; one that was lost is opened again.
  GrpcConnection* choose() {
    for (size_t tried = 0; tried < connections_.size(); ++tried) {
      const size_t i = turn_++ % connections_.size();
      if (!connections_[i]->is_open()) reopen(i);
      if (connections_[i]->takes_calls()) return connections_[i].get();
    }
    return nullptr;
  }

  void reopen(size_t i) {
    if (now_ns() < retry_at_) return;
    retry_at_ = now_ns() + kRetryNs;
    ++totals_.reconnects;
    try {
      open(i);
    } catch (const Error&) {
      // Counted with every request that finds no connection.
    }
  }

  void handle_events(uint64_t until) {
    epoll_event events[kEvents];
    const int n = pacer_.wait(until, events, kEvents);
    for (int i = 0; i < n; ++i)
      if (events[i].data.u64 != Pacer::kWoken) connections_[events[i].data.u64]->handle(events[i].events);
  }

  void over(size_t index, int32_t status, const std::string& message) override {
    --outstanding_;
    outcomes_->done(index, since_start(), status);
    if (status != 0) examples_.emplace(status, message);
  }

  const GrpcTarget target_;
  const Address address_;
  std::vector<GrpcMessage> messages_;
  Pacer pacer_;
  CountedMemory memory_;
  std::vector<std::unique_ptr<GrpcConnection>> connections_;
  const Outcomes* outcomes_ = nullptr;
  LoadTotals totals_;
  std::map<int32_t, std::string> examples_;
  size_t outstanding_ = 0, turn_ = 0;
  uint64_t retry_at_ = 0;
  int64_t unix_start_ns_ = 0;
  std::atomic<bool> stopped_{false};
};

}  // namespace

std::string grpc_load_unavailable() {
  try {
    http2();
    return "";
  } catch (const Error& e) {
    return e.what();
  }
}

std::unique_ptr<Load> make_grpc_load(const GrpcTarget& target, const std::vector<GrpcMessage>& messages) {
  return std::make_unique<GrpcLoad>(target, messages);
}

}  // namespace sidepool

#else
#include "status.hpp"

namespace sidepool {

std::string grpc_load_unavailable() {
  return "gRPC load: this build has none: libnghttp2-dev was missing; apt-get install libnghttp2-dev, then make native";
}
std::unique_ptr<Load> make_grpc_load(const GrpcTarget&, const std::vector<GrpcMessage>&) {
  throw Error(Status::transport, grpc_load_unavailable());
}

}  // namespace sidepool
#endif
