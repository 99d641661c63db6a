// The ranker's data plane: one lane per sidecar, any number of threads looking up at once.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "answer_times.hpp"
#include "client_lane.hpp"
#include "counters.hpp"
#include "rdma.hpp"
#include "receive_window.hpp"
#include "replicas.hpp"
#include "router.hpp"

namespace sidepool {

// What a lookup cost, in nanoseconds unless named otherwise.
struct LookupTimes {
  int64_t route = 0, wait = 0, merge = 0, total = 0, chunks = 0;
};
struct SidecarTimes {
  int64_t lane_out = 0, queue = 0, pool = 0, lane_back = 0, request_bytes = 0, response_bytes = 0;
  bool degraded = false;
};

struct LookupCall {
  const Part* parts = nullptr;
  size_t part_count = 0;
  LookupOutput out;
  uint64_t budget_ns = 0;
  int32_t priority = 0;
  const uint8_t* trace = nullptr;  // 26 bytes or null
};

struct LookupResult {
  Status status = Status::ok;
  int32_t sidecar = -1;
  LookupTimes times;
  std::vector<SidecarTimes>* sidecars = nullptr;
  std::vector<Fault>* faults = nullptr;
  std::vector<int32_t>* degraded = nullptr;  // features that lost rows, in plan order
};

struct ClientOptions {
  double hedge_budget = 0;       // see Replicas
  uint64_t window_delay_ns = 0;  // see ReceiveWindow
  int64_t max_ids = 0;           // of all lookups under way; a further one is refused. 0: no bound; one alone is never refused
};

class LookupClient {
 public:
  LookupClient(int64_t epoch, Routes routes, uint32_t spin_us, bool degrade, const ClientOptions& options = {});
  ~LookupClient();

  size_t sidecar_count() const { return size_t(routes_.sidecars); }
  const Routes& routes() const { return routes_; }
  // Only before the first lookup.
  void set_fixed_columns(const int32_t* begins, const int32_t* widths);

  void attach(int32_t sidecar, std::shared_ptr<ClientLane> lane);
  void detach(int32_t sidecar);
  // The device and engines of this client's rdma lanes, made with the first; closed with the client.
  std::shared_ptr<RdmaRanker> rdma(const RdmaOptions& options, int engines);
  std::shared_ptr<RdmaRanker> rdma() const;
  std::shared_ptr<ClientLane> lane(int32_t sidecar) const;
  bool alive(int32_t sidecar) const;
  const ReceiveWindow& window() const { return window_; }
  int64_t in_flight_bytes(int32_t sidecar) const { return replicas_.in_flight(sidecar); }
  // A sidecar without a live lane; -1 after the timeout; -2 once closed.
  int32_t wait_lane_lost(double timeout_s);

  // Blocks until every part is answered or the budget is spent. The vectors of the result belong to the calling thread
  // and hold until its next lookup.
  LookupResult lookup(const LookupCall& call);
  // Features that lost rows in the calling thread's last lookup, of whatever client.
  static const std::vector<int32_t>& last_degraded();

  // Every lane is killed; waiting lookups return transport.
  void close();

  struct Totals {
    std::atomic<int64_t> lookups{0}, samples{0}, refused_parts{0}, lanes_lost{0};
    std::atomic<int64_t> out_of_range{0};  // ids settled here: tables whose rows are cut
    std::atomic<int64_t> failovers{0}, hedges{0}, degraded{0};
    std::atomic<int64_t> refused{0};  // lookups beyond max_ids
    std::atomic<int64_t> shed{0};     // subrequests that were not sent because they could not be answered in time
    std::atomic<int64_t> statuses[10] = {};
  };
  const Totals& totals() const { return totals_; }

 private:
  struct Subrequest;
  struct InFlight;
  struct Scratch;
  enum class Wait { never, hold, block };
  enum class Room { yes, no, late };

  static Scratch& scratch();
  LookupResult look_up(Scratch& scratch, const LookupCall& call, uint64_t start);
  void hold_lanes(Scratch& scratch);
  void choose_sidecars(Scratch& scratch);
  void set_budgets(Scratch& scratch) const;
  // `alone`: nothing of this lookup is under way.
  void send_chunk(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, bool alone, LookupResult& result);
  // A subrequest for `legs`; false where none of them has ids, so that nobody need be asked.
  // Where the window has no room or the sidecar no slot free: with Wait::block it waits, with Wait::hold the subrequest is sent
  // later, by send_held; with Wait::never false.
  bool send(Scratch& scratch, InFlight& chunk, int32_t sidecar, const std::vector<int32_t>& legs, const LookupCall& call, uint64_t deadline, Wait wait);
  Status prepare(const Scratch& scratch, const InFlight& chunk, Subrequest& sub, OutputFormat format) const;
  Room take_room(InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, Wait wait);
  void send_held(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result);
  void take_back(Scratch& scratch, size_t first);
  Room give_up(InFlight& chunk, const Subrequest& sub);
  void leave_line(InFlight& chunk);
  Status post(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, Wait wait);
  Status send_frame(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, Wait wait);
  // Sends the legs of `scratch.wanted` to other holders; what nobody is left for stays there.
  void ask_others(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, Wait wait);
  int32_t another_holder(const Scratch& scratch, const InFlight& chunk, int32_t leg) const;
  void receive(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result);
  // Waits until the subrequest is over (true) or `until`.
  bool receive_some(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t until, LookupResult& result);
  void late(Scratch& scratch, InFlight& chunk, size_t sub, const LookupCall& call, uint64_t deadline);
  void failed(Scratch& scratch, InFlight& chunk, size_t sub, const LookupCall& call, uint64_t deadline, LookupResult& result);
  void learn(const Subrequest& sub, const ResponseHeader& header, uint64_t turned, uint64_t seen);
  void settle(InFlight& chunk, Subrequest& sub, bool answered);
  void watch();

  const int64_t epoch_;
  Routes routes_;
  const uint64_t spin_ns_;
  const bool degrade_;
  std::atomic<uint64_t> next_id_;
  mutable std::mutex lanes_mutex_;
  std::condition_variable lost_;
  std::vector<std::shared_ptr<ClientLane>> lanes_;
  std::atomic<uint64_t> lanes_version_;  // another one after every change of lanes_
  std::vector<uint64_t> watch_ids_;
  std::shared_ptr<RdmaRanker> rdma_;
  bool closed_ = false;
  Fd epoll_, wake_;
  uint64_t next_watch_ = 1;
  std::atomic<bool> stopping_{false};
  Totals totals_;
  Replicas replicas_;
  AnswerTimes times_;
  ReceiveWindow window_;
  const int64_t max_ids_;
  std::atomic<int64_t> ids_{0};  // of lookups under way, where they are bounded
  std::thread watcher_;
};

}  // namespace sidepool
