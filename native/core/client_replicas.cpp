// Replicas asked in place of sidecars that are late or have failed.
#include <algorithm>
#include <utility>

#include "client_scratch.hpp"
#include "clock.hpp"

namespace sidepool {
namespace {

bool may_degrade(Status status) {
  return status == Status::transport || status == Status::deadline || status == Status::overloaded || status == Status::draining;
}

// How often a late subrequest looks whether another replica has a slot free by now.
constexpr uint64_t kSlotLookNs = 1'000'000;

}  // namespace

int32_t LookupClient::another_holder(const Scratch& scratch, const InFlight& chunk, int32_t leg) const {
  int32_t best = -1;
  for (const int32_t s : routes_.holder_sets[size_t(routes_.legs[size_t(leg)].holders)]) {
    const ClientLane* lane = scratch.lanes[size_t(s)].get();
    if (lane == nullptr || lane->dead() || chunk.tried(s, leg)) continue;
    if (best < 0 || replicas_.in_flight(s) < replicas_.in_flight(best)) best = s;
  }
  return best;
}

void LookupClient::ask_others(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, Wait wait) {
  scratch.asks.resize(sidecar_count());
  for (bool again = true; again;) {
    again = false;
    for (std::vector<int32_t>& legs : scratch.asks) legs.clear();
    size_t left = 0;
    for (const int32_t l : scratch.wanted) {
      if (const int32_t s = another_holder(scratch, chunk, l); s >= 0) {
        scratch.asks[size_t(s)].push_back(l);
      } else {
        scratch.wanted[left++] = l;
      }
    }
    scratch.wanted.resize(left);
    for (int32_t s = 0; s < routes_.sidecars; ++s) {
      const std::vector<int32_t>& legs = scratch.asks[size_t(s)];
      if (legs.empty() || !send(scratch, chunk, s, legs, call, deadline, wait)) continue;
      chunk.racing = true;
      if (!chunk.subrequests[chunk.count - 1].settled) continue;
      scratch.wanted.insert(scratch.wanted.end(), legs.begin(), legs.end());
      again = true;
    }
  }
}

// An answer is late: others are asked for what it has not brought yet, and the first to come is taken. Only where they have
// a slot free: the late one keeps its own, and two lookups that wait for each other's slots would wait until their deadlines.
void LookupClient::late(Scratch& scratch, InFlight& chunk, size_t at, const LookupCall& call, uint64_t deadline) {
  const uint64_t now = now_ns();
  const bool hedge = std::exchange(chunk.subrequests[at].hedge, false);
  const uint64_t half = chunk.subrequests[at].sent_ns + (deadline - chunk.subrequests[at].sent_ns) / 2;
  if (hedge && !replicas_.take_hedge()) {
    chunk.subrequests[at].others_ns = half;
    return;
  }
  if (!hedge) replicas_.shun(chunk.subrequests[at].sidecar, now);
  scratch.wanted.clear();
  for (const int32_t l : chunk.subrequests[at].asked.legs)
    if (!chunk.done[size_t(l)]) scratch.wanted.push_back(l);
  const size_t before = chunk.count;
  ask_others(scratch, chunk, call, deadline, Wait::never);
  const bool asked = chunk.count > before, nobody = !scratch.wanted.empty();
  // The list of subrequests may have grown, and moved.
  chunk.subrequests[at].others_ns = asked || nobody ? UINT64_MAX : hedge ? half : now + kSlotLookNs;
  if (asked) (hedge ? totals_.hedges : totals_.failovers).fetch_add(1, std::memory_order_relaxed);
}

// A subrequest is over without an answer: its legs go to other replicas; what has none left is lost, or fails the lookup.
void LookupClient::failed(Scratch& scratch, InFlight& chunk, size_t at, const LookupCall& call, uint64_t deadline, LookupResult& result) {
  const Status status = chunk.subrequests[at].status;
  const int32_t sidecar = chunk.subrequests[at].sidecar;
  if (may_degrade(status)) {
    // One that was not even asked, for lack of time, is not to blame.
    if (status != Status::deadline || chunk.subrequests[at].slot >= 0) replicas_.shun(sidecar, now_ns());
    scratch.wanted.clear();
    for (const int32_t l : chunk.subrequests[at].asked.legs)
      if (!chunk.done[size_t(l)] && !chunk.covered(l)) scratch.wanted.push_back(l);
    if (scratch.wanted.empty()) return;
    const size_t before = chunk.count;
    ask_others(scratch, chunk, call, deadline, Wait::hold);
    if (chunk.count > before) totals_.failovers.fetch_add(1, std::memory_order_relaxed);
    if (scratch.wanted.empty()) return;
    if (degrade_) {
      for (const int32_t l : scratch.wanted) {
        scratch.routed.lose(chunk.chunk, l, call.out);
        const int32_t feature = routes_.bands[size_t(routes_.legs[size_t(l)].band)].feature;
        const auto place = std::lower_bound(scratch.degraded.begin(), scratch.degraded.end(), feature);
        if (place == scratch.degraded.end() || *place != feature) scratch.degraded.insert(place, feature);
      }
      scratch.times[size_t(sidecar)].degraded = true;
      return;
    }
  }
  if (result.status == Status::ok) {
    result.status = status;
    result.sidecar = sidecar;
  }
}

}  // namespace sidepool
