#include "server.hpp"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>

#include "clock.hpp"
#include "connect.hpp"

namespace sidepool {
namespace {

// A handshake is 64 bytes from a peer that has just been told to connect: two seconds are plenty, and 128 of them at
// once (256 lanes reconnecting in two bursts) bound what strangers can hold open.
constexpr uint64_t kHandshakeNs = 2'000'000'000;
constexpr size_t kMaxHandshakes = 128;
// Tokens that were granted and never used; beyond this the oldest lapse first.
constexpr size_t kMaxTickets = 4096;

std::string why() { return std::strerror(errno); }

// Discards: the grpc lane returns the whole response at once.
class NoSink final : public ResponseSink {
 public:
  void progress(uint32_t done, size_t bytes) override {
    done_ = done;
    bytes_ = bytes;
  }
  uint32_t done_ = 0;
  size_t bytes_ = 0;
};

bool send_fds(int socket, const HelloAck& ack, const int* fds, size_t count) {
  iovec part{const_cast<HelloAck*>(&ack), sizeof ack};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 3)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (count > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * count);
    std::memcpy(CMSG_DATA(c), fds, sizeof(int) * count);
  }
  return sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == ssize_t(sizeof ack);
}

HelloAck ack_of(const LaneLimits& limits, const TcpOptions& tcp, bool local) {
  HelloAck ack;
  ack.slots = limits.slots;
  ack.request_bytes = limits.request_bytes;
  ack.response_bytes = limits.response_bytes;
  ack.clock_id = clock_id();
  if (local) return ack;
  ack.window_bytes = tcp.window_bytes;
  ack.dedicated = tcp.dedicated;
  ack.traffic_class = tcp.traffic_class;
  ack.control_traffic_class = tcp.control_traffic_class;
  return ack;
}

}  // namespace

SidecarServer::SidecarServer(int engines, uint32_t spin_us, uint32_t max_lanes, uint64_t max_frame_bytes,
                             const std::vector<std::vector<int>>& cpus, Order order)
    : board_(size_t(engines)), max_lanes_(max_lanes), max_frame_bytes_(max_frame_bytes) {
  for (size_t i = 0; i < size_t(engines); ++i) {
    const std::vector<int> where = cpus.empty() ? std::vector<int>{} : cpus[i % cpus.size()];
    engines_.push_back(std::make_unique<Engine>(published_, board_, i, spin_us, where, order));
  }
  epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !wake_) throw Error(Status::internal, "cannot make the acceptor: " + why());
  epoll_event event{EPOLLIN, {}};
  event.data.fd = wake_.get();
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event);
  acceptor_ = std::thread([this] { accept_loop(); });
}

SidecarServer::~SidecarServer() { close(); }

void SidecarServer::listen_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path)
    throw Error(Status::plan, "unix socket path " + path + ": " + std::to_string(path.size()) + " characters; allowed: at most " +
                                  std::to_string(sizeof address.sun_path - 1));
  std::memcpy(address.sun_path, path.data(), path.size());
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  // A socket file whose listener is dead refuses connections: replace it. A live one is somebody else's.
  if (Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
      connect(probe.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0)
    throw Error(Status::plan, "unix socket " + path + " is taken by a running process");
  else if (errno == ECONNREFUSED)
    unlink(path.c_str());
  if (bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0)
    throw Error(Status::plan, "cannot bind the unix socket " + path + ": " + why());
  chmod(path.c_str(), 0600);
  if (listen(socket.get(), 128) != 0) throw Error(Status::plan, "cannot listen on " + path + ": " + why());
  unix_path_ = path;
  unix_listener_ = std::move(socket);
  epoll_event event{EPOLLIN, {}};
  event.data.fd = unix_listener_.get();
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, unix_listener_.get(), &event);
}

std::string SidecarServer::listen_rdma(const RdmaOptions& options) {
  rdma_ = make_rdma_server(options);
  for (const auto& engine : engines_) engine->enable_rdma(rdma_->make_domain());
  return rdma_->description();
}

std::string SidecarServer::connect_rdma(const LaneLimits& limits, const std::string& peer) {
  if (!rdma_) throw Error(Status::rejected, "lane: found rdma; this sidecar does not listen for it");
  check(limits);
  Engine* engine;
  {
    std::lock_guard lock(admission_mutex_);
    if (lanes() >= int64_t(max_lanes_)) throw Error(Status::overloaded, "no more lanes");
    engine = &least_loaded();
    engine->reserve();
  }
  try {
    auto [lane, end] = rdma_->admit(*engine->rdma(), limits, peer);
    engine->adopt(numbered(std::move(lane)));
    return end;
  } catch (...) {
    engine->release();
    throw;
  }
}

int SidecarServer::listen_tcp(const std::string& host, int port, const TcpOptions& options) {
  tcp_ = options;
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | AI_PASSIVE;
  const std::string where = host + ":" + std::to_string(port);
  if (const int rc = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found); rc != 0)
    throw Error(Status::plan, "tcp address " + where + ": " + gai_strerror(rc));
  std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> guard(found, freeaddrinfo);
  Fd socket(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int on = 1;
  setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(socket.get(), found->ai_addr, found->ai_addrlen) != 0 || listen(socket.get(), 128) != 0)
    throw Error(Status::plan, "cannot listen on tcp address " + where + ": " + why());
  sockaddr_storage bound{};
  socklen_t length = sizeof bound;
  getsockname(socket.get(), reinterpret_cast<sockaddr*>(&bound), &length);
  tcp_listener_ = std::move(socket);
  epoll_event event{EPOLLIN, {}};
  event.data.fd = tcp_listener_.get();
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, tcp_listener_.get(), &event);
  return ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                                           : reinterpret_cast<sockaddr_in&>(bound).sin_port);
}

void SidecarServer::check(const LaneLimits& limits) {
  if (limits.slots < 1 || limits.slots > kMaxSlots)
    throw Error(Status::rejected, "slots: found " + std::to_string(limits.slots) + "; allowed: 1 to " + std::to_string(kMaxSlots));
  for (const uint64_t bytes : {limits.request_bytes, limits.response_bytes})
    if (bytes < 4096 || bytes > kMaxSlotBytes || bytes % 4096 != 0)
      throw Error(Status::rejected, "slot size: found " + std::to_string(bytes) + "; allowed: multiples of 4096 up to " +
                                        std::to_string(kMaxSlotBytes));
}

void SidecarServer::expect(const std::string& token, const std::string& kind, const LaneLimits& limits, double ttl_s) {
  if (token.size() != sizeof Hello::token) throw Error(Status::rejected, "token: 16 bytes are required");
  if (kind != "shm" && kind != "tcp") throw Error(Status::rejected, "lane: found " + kind + "; allowed: shm, tcp");
  check(limits);
  const uint64_t now = now_ns();
  std::lock_guard lock(tickets_mutex_);
  std::erase_if(tickets_, [now](const auto& item) { return item.second.expires_ns < now; });
  if (tickets_.size() >= kMaxTickets) throw Error(Status::overloaded, "too many lanes are being connected at once");
  tickets_[token] = {kind, limits, now + uint64_t(ttl_s * 1e9)};
}

void SidecarServer::accept_loop() {
  while (!stopping_.load(std::memory_order_acquire)) {
    epoll_event events[32];
    const int n = epoll_wait(epoll_.get(), events, 32, handshakes_.empty() ? -1 : 100);
    for (int i = 0; i < n && !stopping_.load(std::memory_order_acquire); ++i) {
      const int fd = events[i].data.fd;
      if (fd == wake_.get()) continue;
      if (fd == unix_listener_.get()) {
        accept_from(fd, true);
      } else if (fd == tcp_listener_.get()) {
        accept_from(fd, false);
      } else if (auto found = handshakes_.find(fd); found != handshakes_.end() && advance(found->second)) {
        handshakes_.erase(found);
      }
    }
    const uint64_t now = now_ns();
    std::erase_if(handshakes_, [now](const auto& item) { return item.second.expires_ns < now; });
  }
}

void SidecarServer::accept_from(int listener, bool local) {
  Fd socket(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!socket) {
    // Out of descriptors: the listener stays readable; do not spin on it.
    if (errno == EMFILE || errno == ENFILE) usleep(10'000);
    return;
  }
  if (handshakes_.size() >= kMaxHandshakes) return;
  if (!local) {
    const int on = 1;
    setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    // A peer that vanished without a word (power, cable) is noticed within about ten seconds.
    const int idle = 5, interval = 2, probes = 3;
    setsockopt(socket.get(), SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(socket.get(), IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(socket.get(), IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(socket.get(), IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  }
  const int fd = socket.get();
  Handshake& handshake = handshakes_[fd];
  handshake.socket = std::move(socket);
  handshake.local = local;
  handshake.expires_ns = now_ns() + kHandshakeNs;
  epoll_event event{EPOLLIN, {}};
  event.data.fd = fd;
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
}

bool SidecarServer::advance(Handshake& handshake) {
  if (handshake.acknowledged) return true;  // it has nothing to say before its second connection has come
  const ssize_t n = recv(handshake.socket.get(), reinterpret_cast<std::byte*>(&handshake.hello) + handshake.received,
                         sizeof(Hello) - handshake.received, MSG_DONTWAIT);
  if (n <= 0) return n == 0 || (errno != EAGAIN && errno != EINTR);
  handshake.received += size_t(n);
  if (handshake.received < sizeof(Hello)) return false;
  const Hello& hello = handshake.hello;
  if (hello.magic != kMagic || hello.version != kWireVersion) return true;
  if (hello.kind == FrameKind::hello_credits && !handshake.local) join_credits(handshake);
  if (hello.kind != FrameKind::hello) return true;
  Ticket ticket;
  {
    std::lock_guard lock(tickets_mutex_);
    const auto found = tickets_.find(std::string(reinterpret_cast<const char*>(hello.token), sizeof hello.token));
    if (found == tickets_.end() || found->second.expires_ns < now_ns() || (found->second.kind == "shm") != handshake.local) return true;
    ticket = found->second;
    tickets_.erase(found);
  }
  if (handshake.local || !tcp_.dedicated) {
    admit(handshake, ticket);
    return true;
  }
  handshake.acknowledged = ticket;
  return !send_fds(handshake.socket.get(), ack_of(ticket.limits, tcp_, false), nullptr, 0);
}

// The second connection of a lane that waits for it; both show the same token.
void SidecarServer::join_credits(Handshake& second) {
  const auto found = std::find_if(handshakes_.begin(), handshakes_.end(), [&](const auto& item) {
    const Handshake& first = item.second;
    return first.acknowledged && std::memcmp(first.hello.token, second.hello.token, sizeof second.hello.token) == 0;
  });
  if (found == handshakes_.end()) return;
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, second.socket.get(), nullptr);
  admit(found->second, *found->second.acknowledged, std::move(second.socket));
  handshakes_.erase(found);
}

void SidecarServer::admit(Handshake& handshake, const Ticket& ticket, Fd grants) {
  HelloAck ack = ack_of(ticket.limits, tcp_, handshake.local);
  const int fd = handshake.socket.get(), told = grants ? grants.get() : fd;
  if (lanes() >= int64_t(max_lanes_)) {
    ack.status = int32_t(Status::overloaded);
    send_fds(told, ack, nullptr, 0);
    return;
  }
  // Counted before the peer hears of it: once it has the acknowledgement the lane exists.
  Engine& engine = least_loaded();
  engine.reserve();
  bool adopted = false;
  try {
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    if (handshake.local) {
      ShmRegion region = make_shm_region(ticket.limits);
      const int fds[3] = {region.memfd.get(), engine.page_fd(), engine.doorbell_fd()};
      if (send_fds(fd, ack, fds, 3)) {
        region.memfd.reset();
        engine.adopt(numbered(make_shm_server_lane(ticket.limits, std::move(handshake.socket), std::move(region))));
        adopted = true;
      }
    } else {
      set_traffic_class(fd, tcp_.traffic_class);
      if (grants) set_traffic_class(told, tcp_.control_traffic_class);
      auto lane = make_tcp_server_lane(ticket.limits, std::move(handshake.socket), std::move(grants), handshake.hello, tcp_.window_bytes);
      if (send_fds(told, ack, nullptr, 0)) {
        engine.adopt(numbered(std::move(lane)));
        adopted = true;
      }
    }
  } catch (const std::exception&) {
    // Out of memory or descriptors: the socket closes with the handshake, the peer sees a refused lane.
  }
  if (!adopted) engine.release();
}

std::unique_ptr<ServerLane> SidecarServer::numbered(std::unique_ptr<ServerLane> lane) {
  lane->set_id(next_lane_.fetch_add(1, std::memory_order_relaxed));
  return lane;
}

void SidecarServer::migrate(uint64_t lane, size_t to) {
  if (to >= engines_.size())
    throw Error(Status::rejected, "engine: found " + std::to_string(to) + "; allowed: 0 to " + std::to_string(engines_.size() - 1));
  for (const LaneStats& each : lane_stats()) {
    if (each.id != lane || lane == 0) continue;
    if (size_t(each.engine) != to) engines_[size_t(each.engine)]->move(lane, *engines_[to]);
    return;
  }
  throw Error(Status::rejected, "lane: found " + std::to_string(lane) + "; allowed: the number of an open lane, as Stats gives it");
}

Engine& SidecarServer::least_loaded() {
  return **std::min_element(engines_.begin(), engines_.end(), [](const auto& a, const auto& b) { return a->load() < b->load(); });
}

int64_t SidecarServer::lanes() const {
  int64_t total = 0;
  for (const auto& engine : engines_) total += engine->load();
  return total;
}

std::string SidecarServer::serve_frame(const std::byte* frame, size_t bytes) {
  struct InFlight {
    std::atomic<int64_t>& count;
    explicit InFlight(std::atomic<int64_t>& c) : count(c) { count.fetch_add(1); }
    ~InFlight() { count.fetch_sub(1); }
  } in_flight(direct_in_flight_);

  const uint64_t received = now_ns();
  // A caller's frame may lie anywhere; the sections want 64-byte alignment.
  std::vector<uint64_t> aligned((bytes + 63) / 8 + 8);
  std::byte* copy = reinterpret_cast<std::byte*>(align_up(reinterpret_cast<uintptr_t>(aligned.data())));
  std::memcpy(copy, frame, bytes);

  ParsedRequest request;
  ResponseHeader header;
  std::string out;
  auto [tables, previous] = published_.both();
  // Counters go by the indices of what is published now.
  std::vector<TableCounters> counters(tables ? size_t(tables->table_count()) : 0);
  NoSink sink;
  if (bytes > max_frame_bytes_ || parse_request(copy, bytes, request) != Status::ok) {
    header.status = int32_t(Status::frame);
  } else if (published_.draining_since_ns.load(std::memory_order_relaxed) != 0) {
    header.status = int32_t(Status::draining);
    header.lookup_id = request.header.lookup_id;
  } else if (too_late(request.header)) {
    header.status = int32_t(Status::deadline);
    header.lookup_id = request.header.lookup_id;
  } else {
    const bool old = previous && tables && request.header.epoch == uint64_t(previous->epoch()) && tables->epoch() != previous->epoch();
    if (old) tables = previous;
    size_t payload = 0;
    for (const FeatureEntry& entry : request.entries) {
      const Table* table = tables ? tables->held(entry.feature, entry.shard) : nullptr;
      if (table == nullptr) continue;
      payload += block_bytes(entry, tables->feature(int32_t(entry.feature)).pooling, table->dim, request.header.batch,
                             request.header.output_format);
    }
    payload = std::min<size_t>(payload, max_frame_bytes_);
    Mapping block = Mapping::anonymous(std::max<size_t>(payload, kAlign));
    const ServeInput input{&request, received, block.data(), payload};
    header = serve(tables.get(), input, sink, old ? nullptr : counters.data());
    header.count = sink.done_;
    out.reserve(sizeof header + sink.bytes_);
    out.resize(sizeof header);
    out.append(reinterpret_cast<const char*>(block.data()), sink.bytes_);
  }
  header.flags = kLastPiece;
  header.frame_bytes = sizeof header + sink.bytes_;
  out.resize(header.frame_bytes);
  std::memcpy(out.data(), &header, sizeof header);

  std::lock_guard lock(direct_.mutex);
  direct_.counters.statuses[size_t(header.status)].add();
  direct_.counters.served.add();
  if (header.status == 0) direct_.service_time.learn(header.finished_ns - header.started_ns, request.header.value_count);
  direct_.counters.pool.record_ns(header.finished_ns - header.started_ns);
  direct_.lane.received.add();
  direct_.lane.sent.add();
  direct_.lane.request_bytes.add(int64_t(bytes));
  direct_.lane.response_bytes.add(int64_t(out.size()));
  if (direct_.tables.size() < counters.size()) {
    std::vector<TableCounters> grown(counters.size());
    for (size_t i = 0; i < direct_.tables.size(); ++i) grown[i].add(direct_.tables[i]);
    direct_.tables.swap(grown);
  }
  for (size_t i = 0; i < counters.size(); ++i) direct_.tables[i].add(counters[i]);
  return out;
}

// A grpc lane's frames do not queue here: only their own time counts.
bool SidecarServer::too_late(const RequestHeader& request) {
  std::lock_guard lock(direct_.mutex);
  const bool late = direct_.service_time.of(request.value_count) > request.budget_ns || request.budget_ns == 0;
  if (late) direct_.service_time.doubt();
  direct_.counters.shed.add(late);
  return late;
}

void SidecarServer::drain() { published_.draining_since_ns.store(now_ns(), std::memory_order_relaxed); }

int64_t SidecarServer::in_flight() const {
  int64_t total = direct_in_flight_.load();
  for (const auto& engine : engines_) total += engine->in_flight();
  return total;
}

void SidecarServer::close() {
  if (!acceptor_.joinable()) return;
  stopping_.store(true, std::memory_order_release);
  eventfd_write(wake_.get(), 1);
  acceptor_.join();
  handshakes_.clear();
  unix_listener_.reset();
  tcp_listener_.reset();
  if (!unix_path_.empty()) unlink(unix_path_.c_str());
  for (auto& engine : engines_) engine->stop();
}

std::vector<LaneStats> SidecarServer::lane_stats() const {
  std::vector<LaneStats> all;
  std::map<std::string, LaneCounters> dropped;
  const auto push = [&](uint64_t id, const std::string& kind, int engine, const LaneCounters& c) {
    all.push_back({id, kind, engine, c.received.get(), c.sent.get(), c.request_bytes.get(), c.response_bytes.get(), c.credit_waits.get(),
                   c.busy_ns.get(), c.queued.get(), c.queued_bytes.get(), c.in_flight.get(), c.leaving_bytes.get(),
                   c.grants.get(), c.grant_us.get(), c.late_bytes.get()});
  };
  for (size_t e = 0; e < engines_.size(); ++e)
    engines_[e]->read_lanes([&](uint64_t id, const std::string& kind, bool live, const LaneCounters& c) {
      if (live)
        push(id, kind, int(e), c);
      else
        dropped[kind].add(c);
    });
  for (const auto& [kind, sums] : dropped) push(0, kind, -1, sums);
  return all;
}

std::vector<TableSums> SidecarServer::table_stats() const {
  std::vector<TableSums> sums;
  for (const auto& engine : engines_) engine->read_tables(sums);
  auto& direct = const_cast<Direct&>(direct_);
  std::lock_guard lock(direct.mutex);
  if (sums.size() < direct.tables.size()) sums.resize(direct.tables.size());
  for (size_t i = 0; i < direct.tables.size(); ++i) direct.tables[i].add_to(sums[i]);
  return sums;
}

std::map<int64_t, int64_t> SidecarServer::top_rows(size_t table) const {
  std::map<int64_t, int64_t> counts;
  for (const auto& engine : engines_) engine->read_top(table, counts);
  return counts;
}

}  // namespace sidepool
