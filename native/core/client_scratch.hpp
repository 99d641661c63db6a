// What a thread keeps for the lookups it does, and of the one under way. Nothing is allocated once it has grown.
#pragma once
#include <algorithm>
#include <vector>

#include "client.hpp"

namespace sidepool {

// Chunks of one lookup that may be under way at once: enough to keep a sidecar pooling while the ranker merges, few
// enough that one large lookup leaves most credits of a lane (16 by default) to the others.
constexpr size_t kWindow = 4;

struct LookupClient::Subrequest {
  int32_t sidecar = 0;
  ClientLane* lane = nullptr;
  int slot = -1;
  Status status = Status::ok;
  bool settled = false;
  bool held = false;            // not sent yet: the window has no room, or the sidecar no slot
  uint64_t window_bytes = 0;    // taken from the window
  uint64_t sent_ns = 0;
  uint64_t others_ns = 0;  // when others are asked for what is missing then
  bool hedge = false;      // that moment is early, and needs budget
  uint32_t merged = 0;
  int64_t bytes = 0;       // request and response, while in flight
  Asked asked;
  std::vector<size_t> offsets;  // payload offset per leg, one more at the end

  uint64_t response_bytes() const { return sizeof(ResponseHeader) + offsets.back(); }
};

struct LookupClient::InFlight {
  size_t chunk = 0;
  size_t count = 0;  // subrequests in use
  bool racing = false;
  size_t in_flight = 0;                      // subrequests sent and not over
  size_t held = 0;                           // not sent yet; in the order of `subrequests`, which sending keeps
  uint32_t place = ReceiveWindow::kNoPlace;  // in the window's line, of the first that is held
  std::vector<Subrequest> subrequests;
  std::vector<uint8_t> asked, done;  // per leg: some sidecar was asked; merged

  Subrequest& add() {
    if (count == subrequests.size()) subrequests.emplace_back();
    return subrequests[count++];
  }
  bool asks(const Subrequest& sub, int32_t leg) const {
    return std::find(sub.asked.legs.begin(), sub.asked.legs.end(), leg) != sub.asked.legs.end();
  }
  bool covered(int32_t leg) const {
    for (size_t i = 0; i < count; ++i)
      if (!subrequests[i].settled && asks(subrequests[i], leg)) return true;
    return false;
  }
  bool tried(int32_t sidecar, int32_t leg) const {
    for (size_t i = 0; i < count; ++i)
      if (subrequests[i].sidecar == sidecar && asks(subrequests[i], leg)) return true;
    return false;
  }
  bool needed(const Subrequest& sub) const {
    return std::any_of(sub.asked.legs.begin(), sub.asked.legs.end(), [this](int32_t l) { return !done[size_t(l)]; });
  }
};

// Everything a lookup needs, kept by the thread that does lookups: nothing is allocated once it has grown.
struct LookupClient::Scratch {
  RoutedLookup routed;
  std::vector<Fault> faults;
  std::vector<SidecarTimes> times;
  std::vector<SlotBudget> budgets;
  std::vector<std::shared_ptr<ClientLane>> lanes;  // during a lookup
  // The lanes of `lanes_version`, from lookup to lookup: weak, so that a thread without lookups keeps no lane.
  std::vector<std::weak_ptr<ClientLane>> known;
  uint64_t lanes_version = 0;
  std::vector<int32_t> sidecar_of_set;
  std::vector<int32_t> wanted;
  std::vector<std::vector<int32_t>> asks;  // per sidecar
  std::vector<int32_t> degraded;
  std::array<InFlight, kWindow> window;
  size_t sent = 0, received = 0;  // chunks of the lookup under way; those between are in `window`
};

}  // namespace sidepool
