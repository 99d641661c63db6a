// A sidecar's data plane: listeners, admission by token, engines.
#pragma once
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine.hpp"

namespace sidepool {

struct LaneStats {
  uint64_t id;  // 0: a sum
  std::string kind;
  int engine;  // -1: the sum over lanes that have gone
  int64_t received, sent, request_bytes, response_bytes, credit_waits, busy_ns, queued, queued_bytes, in_flight, leaving_bytes;
  int64_t grants, grant_us, late_bytes;
};

// Thread-safe. One acceptor thread does every handshake; it never touches a lane once an engine has it.
class SidecarServer {
 public:
  // `cpus[i % size]` says where engine i may run; empty: anywhere.
  SidecarServer(int engines, uint32_t spin_us, uint32_t max_lanes, uint64_t max_frame_bytes,
                const std::vector<std::vector<int>>& cpus = {}, Order order = Order::edf);
  ~SidecarServer();

  void publish(std::shared_ptr<const TableSet> tables) { published_.set(std::move(tables)); }
  void retire_previous() { published_.retire_previous(); }
  void listen_unix(const std::string& path);
  int listen_tcp(const std::string& host, int port, const TcpOptions& options = {});
  // Admit rdma lanes too; returns what device and address were found. Once.
  std::string listen_rdma(const RdmaOptions& options);
  // An rdma lane for the ranker whose end is `peer`; returns this end.
  std::string connect_rdma(const LaneLimits& limits, const std::string& peer);
  // Move a lane to another engine; returns when the move has begun. Throws Error(rejected).
  void migrate(uint64_t lane, size_t engine);
  void expect(const std::string& token, const std::string& kind, const LaneLimits& limits, double ttl_s);
  // The grpc lane: one request frame in, its response piece out, in the calling thread.
  std::string serve_frame(const std::byte* frame, size_t bytes);
  void drain();
  int64_t in_flight() const;
  void close();

  const Published& published() const { return published_; }
  const std::vector<std::unique_ptr<Engine>>& engines() const { return engines_; }
  std::vector<LaneStats> lane_stats() const;
  std::vector<TableSums> table_stats() const;
  // Sampled ids of the most asked rows of a table (TopRows), over all engines.
  std::map<int64_t, int64_t> top_rows(size_t table) const;
  // Statuses and histograms of the grpc lane, which runs on its callers' threads.
  struct Direct {
    std::mutex mutex;
    EngineCounters counters;
    LaneCounters lane;
    std::vector<TableCounters> tables;
    ServiceTime service_time;
  };
  Direct& direct() { return direct_; }

 private:
  struct Ticket {
    std::string kind;
    LaneLimits limits;
    uint64_t expires_ns;
  };
  // A tcp lane whose credits travel on a connection of their own is acknowledged and waits for that, keeping its ticket.
  struct Handshake {
    Fd socket;
    bool local;  // came through the Unix socket
    Hello hello;
    size_t received = 0;
    uint64_t expires_ns = 0;
    std::optional<Ticket> acknowledged;
  };

  void accept_loop();
  void accept_from(int listener, bool local);
  bool advance(Handshake& handshake);  // true: finished, one way or the other
  static void check(const LaneLimits& limits);
  void admit(Handshake& handshake, const Ticket& ticket, Fd grants = Fd());
  void join_credits(Handshake& handshake);
  Engine& least_loaded();
  std::unique_ptr<ServerLane> numbered(std::unique_ptr<ServerLane> lane);
  int64_t lanes() const;
  bool too_late(const RequestHeader& request);

  Published published_;
  Board board_;
  std::vector<std::unique_ptr<Engine>> engines_;
  const uint32_t max_lanes_;
  const uint64_t max_frame_bytes_;
  Fd epoll_, wake_, unix_listener_, tcp_listener_;
  std::string unix_path_;
  TcpOptions tcp_;
  std::shared_ptr<RdmaServer> rdma_;
  std::mutex admission_mutex_;  // rdma lanes are admitted by control threads; counted and placed one at a time
  std::mutex tickets_mutex_;
  std::map<std::string, Ticket> tickets_;
  std::map<int, Handshake> handshakes_;  // acceptor thread only
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> next_lane_{1};
  std::atomic<int64_t> direct_in_flight_{0};
  Direct direct_;
  std::thread acceptor_;
};

}  // namespace sidepool
