// RDMA as the rest of the core sees it: nothing here needs the verbs' headers. Without them the factories throw.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "client_lane.hpp"
#include "counters.hpp"
#include "server_lane.hpp"

namespace sidepool {

struct RdmaOptions {
  std::string device = "auto";  // or a name; auto: the first with an active port
  int port = 0;                 // 0: the first active one
  int gid_index = -1;           // -1: the best one, see docs/rdma.md
  uint32_t piece_bytes = 0;     // a response leaves in writes of about this size while pooling goes on
  uint64_t window_bytes = 0;    // credit granted to the peer; at least one slot; 0: four slots
  bool piggyback = false;       // credits ride in frames instead of on queue pairs of their own
  double peer_timeout_s = 0;    // a peer that acknowledges nothing for this long is dead
  uint8_t service_level = 0, control_service_level = 0;
  uint8_t traffic_class = 0, control_traffic_class = 0;
};

// Counted by the engine that does it; what docs/rdma.md's figures are made of.
struct RdmaCounters {
  Counter work_requests;   // data writes posted
  Counter credit_writes;   // writes of grants, keepalives included
  Counter doorbells;       // post_send calls
  Counter rounds;          // poll rounds in which something was posted
  Counter most_doorbells;  // on one queue pair in one poll round, pieces sent during pooling aside
  Counter signalled;       // sends that asked for a completion
  Counter receives;        // receives posted again
  Counter receive_doorbells;
  Counter registrations;   // memory regions and queue pairs made by the engine's own thread
  Counter failures;        // lanes that a bad completion or a device event ended
  Counter asleep;          // times the engine waited for an event
  Histogram credit;        // from grant to being seen; only between processes of one host
};

// An engine's share of a device: its completion queue, its thread domain, its queue pairs. Everything but `make` and the
// counters belongs to the engine's thread.
class RdmaDomain {
 public:
  virtual ~RdmaDomain() = default;
  // Whether the provider has thread domains, and so promises to take no lock for this one.
  virtual bool thread_domain() const = 0;
  // Take in completions, hand them to their lanes. True: there were some.
  virtual bool poll(uint64_t now_ns) = 0;
  // One doorbell for every queue pair with something to send.
  virtual void flush() = 0;
  // What posting takes here, per write as a rule: next to nothing with a card; SoftRoCE sends the packets meanwhile.
  virtual uint64_t post_ns() const = 0;
  // Before sleeping: ask for an event. False: something has come meanwhile.
  virtual bool arm() = 0;
  // How long the engine may sleep at most; -1: for ever.
  virtual int patience_ms() const = 0;
  // Readable when an asked-for event has come; then take_event.
  virtual int fd() const = 0;
  virtual void take_event() = 0;
  virtual const RdmaCounters& counters() const = 0;
  // After the last poll: wait a moment until peers have heard that their lanes end.
  virtual void settle() = 0;
};

// An engine with lanes sleeps no longer than this, so that it keeps telling its peers that it is alive. A quarter of the
// shortest peer_timeout_s allowed.
constexpr uint64_t kRdmaTickNs = 250'000'000;

// The sidecar's side: one device, a domain per engine.
class RdmaServer {
 public:
  virtual ~RdmaServer() = default;
  virtual std::unique_ptr<RdmaDomain> make_domain() = 0;
  // Admit one ranker whose end is `peer` (bytes of a RdmaEnd): a lane for the engine that owns `domain`, not adopted yet,
  // and this end's bytes. Throws Error. Thread-safe.
  virtual std::pair<std::unique_ptr<ServerLane>, std::string> admit(RdmaDomain& domain, const LaneLimits& limits, const std::string& peer) = 0;
  // What was found, for logs: device, port, gid and its index, mtu.
  virtual std::string description() const = 0;
};
std::shared_ptr<RdmaServer> make_rdma_server(const RdmaOptions& options);

// An end that a ranker has prepared and not yet connected; dropping it frees everything.
class RdmaOffer {
 public:
  virtual ~RdmaOffer() = default;
  virtual std::string end() const = 0;
  virtual std::shared_ptr<ClientLane> connect(const std::string& peer) = 0;
};

// The ranker's side: one device, a few engines (threads) that own its lanes. Outlives its lanes' use by an engine; closing
// ends them all.
class RdmaRanker {
 public:
  virtual ~RdmaRanker() = default;
  virtual std::shared_ptr<RdmaOffer> prepare(const LaneLimits& limits) = 0;
  virtual void close() = 0;
  struct EngineStats {
    bool thread_domain;
    int64_t lanes;
    const RdmaCounters* counters;
  };
  virtual std::vector<EngineStats> engines() const = 0;
};
std::shared_ptr<RdmaRanker> make_rdma_ranker(const RdmaOptions& options, int engines, uint32_t spin_us);

// Empty where the lane was compiled in and libibverbs can be loaded; else what to do about it.
std::string rdma_unavailable();

// Why this device cannot write into memory of another device (a GPU's) that is given as a dma-buf; empty: it can. `fd` is such
// memory of at least a page, or -1 to ask the driver alone: one that can complains of the descriptor instead. Throws Error.
std::string rdma_dmabuf_refusal(const std::string& device, int fd);

}  // namespace sidepool
