// An engine: one thread that exclusively owns its lanes and answers their subrequests, the most urgent first (work_queue.hpp).
//
// Ownership: lanes, the queue and the scratch memory belong to the engine thread. Other threads reach it only through
// `adopt` and `stop` (a mailbox behind a mutex, taken when its eventfd rings) and through counters, which are relaxed
// atomics with one writer. The published TableSet is taken over when its version number has changed: no lock per lookup.
#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "board.hpp"
#include "lines.hpp"
#include "rdma.hpp"
#include "work_queue.hpp"

namespace sidepool {

// What all engines of a sidecar share; written rarely, by the control plane.
class Published {
 public:
  // What was published before goes on answering lookups of its epoch, until it is retired or something else is published.
  void set(std::shared_ptr<const TableSet> tables);
  void retire_previous();
  std::shared_ptr<const TableSet> get() const;
  struct Both {
    std::shared_ptr<const TableSet> tables, previous;
  };
  Both both() const;
  uint64_t version() const { return version_.load(std::memory_order_acquire); }

  // What arrives after this moment is refused; 0 while serving.
  std::atomic<uint64_t> draining_since_ns{0};

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const TableSet> tables_, previous_;
  std::atomic<uint64_t> version_{0};
};

constexpr size_t kStatusCount = 10;

struct EngineCounters {
  Counter lanes, queued, served, busy_ns;
  Counter shed;             // subrequests refused because they could not be answered in time
  Counter shed_on_arrival;  // those of them that never queued
  Counter helped;   // pieces of other engines' subrequests
  Counter writing;  // lanes with response bytes that their socket has not taken yet
  Counter statuses[kStatusCount];
  Counter moved;  // lanes that came from another engine
  Histogram queue, pool;
  Histogram blackout;  // of a lane that came: from its last response there to its first here
};

class Engine;

// A lane and what its engine knows of it. On lines of its own: it is small, and the next one may be another engine's.
struct alignas(kCacheLine) EngineLane {
  std::unique_ptr<ServerLane> lane;
  bool dead = false;
  bool writing = false;  // something waits to leave
  bool watched = false;  // EPOLLOUT is armed
  uint32_t queued = 0;
  Engine* target = nullptr;       // where the lane is moving to
  uint64_t last_response_ns = 0;  // kept for the blackout of a move
  bool just_moved = false;
};

class alignas(kCacheLine) Engine {
 public:
  // `seat` is this engine's place on the board, which outlives it. `cpus`: where the thread may run; empty: anywhere.
  Engine(Published& published, Board& board, size_t seat, uint32_t spin_us, const std::vector<int>& cpus, Order order = Order::edf);
  ~Engine();

  // Count a lane that is about to be adopted; every reserve is followed by an adopt or a release. Thread-safe.
  void reserve() { load_.fetch_add(1, std::memory_order_relaxed); }
  void release() { load_.fetch_sub(1, std::memory_order_relaxed); }
  // Serve rdma lanes of this domain too; once, before the first such lane. Thread-safe.
  void enable_rdma(std::unique_ptr<RdmaDomain> domain);
  RdmaDomain* rdma() const { return rdma_.load(std::memory_order_acquire); }
  // Hand a reserved lane to this engine. Thread-safe.
  void adopt(std::unique_ptr<ServerLane> lane);
  // Move a lane to `target` while its requests flow; what is queued goes with it. Returns when the move has begun, and ends
  // nothing if the lane ends first. Throws Error(rejected) where it cannot. Thread-safe.
  void move(uint64_t lane, Engine& target);
  // Finish nothing more, drop all lanes, join. Idempotent. No engine may be destroyed before all have stopped.
  void stop();

  int page_fd() const { return page_fd_.get(); }   // the engine page, for shm peers (sealed against their writes)
  int doorbell_fd() const { return doorbell_.get(); }
  const EngineCounters& counters() const { return counters_; }
  // Lanes reserved or adopted, and not yet dropped: what placement goes by.
  int64_t load() const { return load_.load(std::memory_order_relaxed); }
  // Subrequests not served yet, and lanes whose responses are not out yet: a drain must wait for both.
  int64_t in_flight() const { return counters_.queued.get() + counters_.writing.get() + arriving_.load(std::memory_order_relaxed); }

  // A table's counters, summed by the caller over engines; sized at the first publication with more tables.
  void read_tables(std::vector<TableSums>& sums) const;
  // Adds a table's most asked rows: sampled ids since its plan was published.
  void read_top(size_t table, std::map<int64_t, int64_t>& counts) const;
  // Visit the counters of live lanes, then (`live` false) the sums over dropped lanes of each kind.
  using LaneVisitor = std::function<void(uint64_t id, const std::string& kind, bool live, const LaneCounters& counters)>;
  void read_lanes(const LaneVisitor& visit) const;

 private:
  using Owned = EngineLane;
  // What other threads send: a lane (with its queue, where it comes from another engine), or (null) a move to begin.
  struct Mail {
    std::unique_ptr<Owned> lane;
    std::vector<Work> works;
    uint64_t move_lane = 0;
    std::unique_ptr<ServerLane::Twin> twin;
    Engine* target = nullptr;
  };

  void run();
  void post(Mail mail);
  void settle_in(Mail& mail);
  void begin_move(Mail& mail);
  void hand_over();
  void watch(Owned& owned);
  void dismiss(Owned& owned);
  bool poll_memory();
  void poll_sockets(int timeout_ms);
  void take_mail();
  void collect(Owned& owned, bool readable);
  void admit(Owned& owned, uint32_t slot, uint64_t now);
  void serve_some(uint64_t begin_ns, uint64_t post_ns);
  void serve_one();
  // `hopeless`: it is known to be late already.
  void answer(const Work& work, bool hopeless);
  ResponseHeader refusal(const Work& work, Status status, uint64_t now) const;
  ResponseHeader pool(const Work& work, ServerLane& lane);
  // What answers a lookup of this epoch, and where it is counted: only what is published now is, since counters go by its indices.
  std::pair<const TableSet*, TableCounters*> tables_of(uint64_t epoch) const;
  ResponseHeader serve_shared(const ServeInput& input, ServerLane& lane, uint64_t estimate_ns);
  bool help();
  void refresh();
  void drop_dead();
  bool anything_pending() const;
  void sleep();
  void step_aside(int cpu);
  void learn(uint64_t ns, int64_t values);

  Published& published_;
  Board& board_;
  const size_t seat_;
  const std::vector<int> cpus_;
  const uint64_t spin_ns_;
  Fd epoll_, doorbell_, page_fd_;
  std::unique_ptr<RdmaDomain> domain_;  // made and destroyed by the control plane, else the engine thread's, through rdma_
  std::atomic<RdmaDomain*> rdma_{nullptr};
  Mapping page_mapping_;
  EnginePage* page_;

  std::mutex mail_mutex_;
  std::vector<Mail> mail_;
  std::atomic<int64_t> arriving_{0};  // subrequests that come with mail
  std::atomic<bool> stopping_{false};

  mutable std::mutex roster_mutex_;  // lanes_ for read_lanes; the engine takes it only to add or drop a lane
  std::vector<std::unique_ptr<Owned>> lanes_;
  std::map<std::string, LaneCounters> dropped_;  // by kind, under roster_mutex_: totals must not fall when a lane goes
  std::atomic<int64_t> load_{0};

  int moving_ = 0;        // lanes with a target
  int stream_lanes_ = 0;  // lanes that only their socket can announce
  WorkQueue queue_;
  LineVector<uint32_t> arrived_;
  ParsedRequest parsed_;
  std::shared_ptr<const TableSet> tables_, previous_;
  uint64_t tables_version_ = 0;
  std::shared_ptr<TableCounters[]> table_counters_;
  size_t table_count_ = 0;
  mutable std::mutex table_mutex_;  // guards replacing table_counters_ and their tops, not counting

  double ns_per_value_ = 10;  // of one engine alone, learnt from what was served: how large pieces are, and who is asked to help
  ServiceTime service_time_;  // as it was, helped or not: what can still be answered in time
  EngineCounters counters_;
  std::thread thread_;
};

}  // namespace sidepool
