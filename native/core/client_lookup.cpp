// One lookup of a ranker: chunks sent, answers merged as they come, replicas asked in place of others.
#include "client.hpp"

#include <algorithm>
#include <utility>

#include "clock.hpp"

namespace sidepool {
namespace {

// Chunks of one lookup that may be under way at once: enough to keep a sidecar pooling while the ranker merges, few
// enough that one large lookup leaves most credits of a lane (16 by default) to the others.
constexpr size_t kWindow = 4;

bool may_degrade(Status status) {
  return status == Status::transport || status == Status::deadline || status == Status::overloaded || status == Status::draining;
}

bool credits_free(const std::vector<std::shared_ptr<ClientLane>>& lanes) {
  return std::all_of(lanes.begin(), lanes.end(), [](const auto& lane) { return !lane || lane->has_free(); });
}

// While two sidecars race for the same legs, each is waited for in turns of this length: well below a healthy answer's
// time over a network, well above the cost of looking.
constexpr uint64_t kRaceTurnNs = 50'000;
// How often a late subrequest looks whether another replica has a slot free by now.
constexpr uint64_t kSlotLookNs = 1'000'000;

}  // namespace

struct LookupClient::Subrequest {
  int32_t sidecar = 0;
  ClientLane* lane = nullptr;
  int slot = -1;
  Status status = Status::ok;
  bool settled = false;
  uint64_t sent_ns = 0;
  uint64_t others_ns = 0;  // when others are asked for what is missing then
  bool hedge = false;      // that moment is early, and needs budget
  uint32_t merged = 0;
  int64_t bytes = 0;       // request and response, while in flight
  Asked asked;
  std::vector<size_t> offsets;  // payload offset per leg, one more at the end
};

struct LookupClient::InFlight {
  size_t chunk = 0;
  size_t count = 0;  // subrequests in use
  bool racing = false;
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
};

LookupClient::Scratch& LookupClient::scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

const std::vector<int32_t>& LookupClient::last_degraded() { return scratch().degraded; }

// Takes the lock only where lanes have come or gone since this thread's last lookup.
void LookupClient::hold_lanes(Scratch& scratch) {
  if (scratch.lanes_version != lanes_version_.load(std::memory_order_acquire)) {
    std::lock_guard lock(lanes_mutex_);
    scratch.known.assign(lanes_.begin(), lanes_.end());
    scratch.lanes_version = lanes_version_.load(std::memory_order_relaxed);
  }
  scratch.lanes.resize(scratch.known.size());
  for (size_t s = 0; s < scratch.known.size(); ++s) scratch.lanes[s] = scratch.known[s].lock();
}

LookupResult LookupClient::lookup(const LookupCall& call) {
  Scratch& scratch = this->scratch();
  const uint64_t start = now_ns();
  // A budget beyond a day is no budget; the bound keeps the sum within 64 bits.
  const uint64_t deadline = start + std::min<uint64_t>(call.budget_ns, 86'400'000'000'000ull);
  LookupResult result;
  result.sidecars = &scratch.times;
  result.faults = &scratch.faults;
  result.degraded = &scratch.degraded;
  scratch.times.assign(sidecar_count(), SidecarTimes{});
  scratch.degraded.clear();
  scratch.routed.admit(routes_, call.parts, call.part_count, scratch.faults);
  hold_lanes(scratch);
  choose_sidecars(scratch);
  set_budgets(scratch);
  scratch.routed.plan(scratch.budgets, call.out.format, scratch.faults);
  scratch.routed.zero_refused(scratch.faults, call.out);
  result.times.chunks = int64_t(scratch.routed.chunk_count());
  result.times.route = int64_t(now_ns() - start);

  size_t sent = 0, received = 0;
  const size_t chunks = scratch.routed.chunk_count();
  while (received < chunks && result.status == Status::ok) {
    while (sent < chunks && sent - received < kWindow && result.status == Status::ok) {
      // The first may wait for credits; the others only use what is free, or two large lookups could starve each other.
      if (sent > received && !credits_free(scratch.lanes)) break;
      const uint64_t begin = now_ns();
      InFlight& next = scratch.window[sent % kWindow];
      next.chunk = sent++;
      send_chunk(scratch, next, call, deadline, result);
      result.times.route += int64_t(now_ns() - begin);
    }
    if (received < sent && result.status == Status::ok) receive(scratch, scratch.window[received++ % kWindow], call, deadline, result);
  }
  // After a failure the slots still out are nobody's until the sidecars have answered them.
  for (size_t c = received > 0 ? received - 1 : 0; c < sent; ++c) {
    InFlight& chunk = scratch.window[c % kWindow];
    for (size_t i = 0; i < chunk.count; ++i)
      if (!chunk.subrequests[i].settled) settle(chunk.subrequests[i], false);
  }
  scratch.lanes.clear();
  result.times.total = int64_t(now_ns() - start);
  totals_.lookups.fetch_add(1, std::memory_order_relaxed);
  totals_.samples.fetch_add(scratch.routed.samples(), std::memory_order_relaxed);
  totals_.statuses[size_t(result.status)].fetch_add(1, std::memory_order_relaxed);
  if (const int64_t outside = scratch.routed.out_of_range(); outside > 0) totals_.out_of_range.fetch_add(outside, std::memory_order_relaxed);
  if (!scratch.degraded.empty()) totals_.degraded.fetch_add(1, std::memory_order_relaxed);
  for (const Fault& fault : scratch.faults)
    if (fault.status != Status::ok) totals_.refused_parts.fetch_add(1, std::memory_order_relaxed);
  return result;
}

void LookupClient::choose_sidecars(Scratch& scratch) {
  const uint64_t now = routes_.replicated ? now_ns() : 0;
  scratch.sidecar_of_set.clear();
  for (const std::vector<int32_t>& holders : routes_.holder_sets) {
    const auto usable = [&scratch](int32_t s) { return scratch.lanes[size_t(s)] && !scratch.lanes[size_t(s)]->dead(); };
    scratch.sidecar_of_set.push_back(replicas_.choose(holders, now, usable));
  }
  scratch.routed.assign(scratch.sidecar_of_set);
}

// Whoever takes over from a replica must have room for what that one was asked.
void LookupClient::set_budgets(Scratch& scratch) const {
  scratch.budgets.assign(sidecar_count(), SlotBudget{SIZE_MAX, SIZE_MAX});
  for (size_t s = 0; s < sidecar_count(); ++s)
    if (scratch.lanes[s]) scratch.budgets[s] = {scratch.lanes[s]->limits().request_bytes, scratch.lanes[s]->payload_capacity()};
  if (!routes_.replicated) return;
  SlotBudget least{SIZE_MAX, SIZE_MAX};
  for (const SlotBudget& budget : scratch.budgets)
    least = {std::min(least.request_bytes, budget.request_bytes), std::min(least.payload_bytes, budget.payload_bytes)};
  std::fill(scratch.budgets.begin(), scratch.budgets.end(), least);
}

void LookupClient::send_chunk(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result) {
  chunk.count = 0;
  chunk.racing = false;
  chunk.done.assign(routes_.legs.size(), 0);
  chunk.asked.assign(routes_.legs.size(), 0);
  for (int32_t s = 0; s < routes_.sidecars && result.status == Status::ok; ++s) {
    const std::vector<int32_t>& legs = scratch.routed.legs_of(s);
    if (legs.empty() || !send(scratch, chunk, s, legs, call, deadline, true)) continue;
    const size_t last = chunk.count - 1;
    if (chunk.subrequests[last].settled) failed(scratch, chunk, last, call, deadline, result);
  }
}

bool LookupClient::send(Scratch& scratch, InFlight& chunk, int32_t s, const std::vector<int32_t>& legs, const LookupCall& call,
                        uint64_t deadline, bool wait) {
  Subrequest& sub = chunk.add();
  sub.sidecar = s;
  sub.lane = scratch.lanes[size_t(s)].get();
  sub.slot = -1;
  sub.settled = false;
  sub.merged = 0;
  sub.bytes = 0;
  scratch.routed.measure(chunk.chunk, legs, sub.asked);
  if (sub.asked.values == 0) {
    --chunk.count;
    return false;
  }
  for (const int32_t l : sub.asked.legs) chunk.asked[size_t(l)] = 1;
  sub.status = post(scratch, chunk, sub, call, deadline, wait);
  sub.settled = sub.status != Status::ok;
  if (sub.status == Status::overloaded && !wait) {
    --chunk.count;
    return false;
  }
  return true;
}

Status LookupClient::post(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, bool wait) {
  if (sub.lane == nullptr || sub.lane->dead()) return Status::transport;
  const uint32_t batch = scratch.routed.chunk_batch(chunk.chunk);
  sub.offsets.assign(1, 0);
  for (size_t i = 0; i < sub.asked.legs.size(); ++i)
    sub.offsets.push_back(sub.offsets.back() + scratch.routed.answer_bytes(chunk.chunk, sub.asked, i, call.out.format));
  const size_t bytes = sub.asked.layout.total;
  if (bytes > sub.lane->limits().request_bytes || sub.offsets.back() > sub.lane->payload_capacity()) return Status::overloaded;

  // Half of what is left belongs to whoever takes over.
  const uint64_t begin = now_ns();
  sub.others_ns = UINT64_MAX;
  sub.hedge = false;
  if (routes_.replicated)
    for (size_t i = 0; i < sub.asked.legs.size() && sub.others_ns == UINT64_MAX; ++i)
      if (another_holder(scratch, chunk, sub.asked.legs[i]) >= 0) sub.others_ns = begin + (deadline > begin ? (deadline - begin) / 2 : 0);
  const int slot = sub.lane->acquire(wait ? std::min(deadline, sub.others_ns) : 0);
  if (slot < 0) return slot == -2 ? Status::transport : Status::overloaded;
  std::byte* frame = sub.lane->request(uint32_t(slot));
  scratch.routed.encode(chunk.chunk, sub.asked, frame);
  RequestHeader header;
  header.frame_bytes = bytes;
  header.slot = uint32_t(slot);
  header.priority = call.priority;
  header.lookup_id = next_id_.fetch_add(1, std::memory_order_relaxed);
  header.epoch = uint64_t(epoch_);
  header.batch = batch;
  header.feature_count = uint32_t(sub.asked.legs.size());
  header.value_count = sub.asked.values;
  header.output_format = call.out.format;
  if (call.trace != nullptr) std::memcpy(header.trace, call.trace, sizeof header.trace);
  sub.sent_ns = header.sent_ns = now_ns();
  header.budget_ns = deadline > sub.sent_ns ? deadline - sub.sent_ns : 0;
  std::memcpy(frame, &header, sizeof header);
  const Status status = sub.lane->post(uint32_t(slot), bytes, header.lookup_id, sub.offsets, deadline);
  if (status != Status::ok) {
    sub.lane->release(uint32_t(slot));
    return status;
  }
  sub.slot = slot;
  sub.bytes = int64_t(bytes + sub.offsets.back());
  replicas_.sent(sub.sidecar, sub.bytes);
  scratch.times[size_t(sub.sidecar)].request_bytes += int64_t(bytes);
  const uint64_t patience = sub.others_ns != UINT64_MAX ? replicas_.hedge_after_ns(sub.sidecar) : 0;
  if (patience > 0 && sub.sent_ns + patience < sub.others_ns) {
    sub.others_ns = sub.sent_ns + patience;
    sub.hedge = true;
  }
  return Status::ok;
}

int32_t LookupClient::another_holder(const Scratch& scratch, const InFlight& chunk, int32_t leg) const {
  int32_t best = -1;
  for (const int32_t s : routes_.holder_sets[size_t(routes_.legs[size_t(leg)].holders)]) {
    const ClientLane* lane = scratch.lanes[size_t(s)].get();
    if (lane == nullptr || lane->dead() || chunk.tried(s, leg)) continue;
    if (best < 0 || replicas_.in_flight(s) < replicas_.in_flight(best)) best = s;
  }
  return best;
}

void LookupClient::ask_others(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, bool wait) {
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

void LookupClient::receive(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result) {
  scratch.routed.begin_merge(chunk.chunk, call.out);
  // Legs without ids.
  for (size_t l = 0; l < chunk.asked.size(); ++l)
    if (!chunk.asked[l]) scratch.routed.lose(chunk.chunk, int32_t(l), call.out);
  for (size_t turn = 0, settled = 0; settled < chunk.count && result.status == Status::ok; turn = (turn + 1) % chunk.count) {
    if (chunk.subrequests[turn].settled) {
      ++settled;
      continue;
    }
    settled = 0;
    if (chunk.racing && !chunk.needed(chunk.subrequests[turn])) {
      settle(chunk.subrequests[turn], false);
      continue;
    }
    for (;;) {
      // The sender of a second subrequest may have moved the first.
      Subrequest& sub = chunk.subrequests[turn];
      const uint64_t until = std::min(deadline, sub.others_ns);
      const uint64_t here = chunk.racing ? std::min(until, now_ns() + kRaceTurnNs) : until;
      if (receive_some(scratch, chunk, sub, call, here, result)) {
        if (sub.status != Status::ok) failed(scratch, chunk, turn, call, deadline, result);
        break;
      }
      const uint64_t now = now_ns();
      if (now >= deadline) {
        sub.status = Status::deadline;
        settle(sub, false);
        failed(scratch, chunk, turn, call, deadline, result);
        break;
      }
      if (now >= sub.others_ns) late(scratch, chunk, turn, call, deadline);
      if (chunk.racing) break;
    }
  }
  scratch.routed.finish_merge(chunk.chunk, call.out);
}

bool LookupClient::receive_some(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t until,
                                LookupResult& result) {
  const uint32_t slot = uint32_t(sub.slot), legs = uint32_t(sub.asked.legs.size());
  const std::byte* payload = sub.lane->response(slot) + sizeof(ResponseHeader);
  const uint64_t turned = now_ns();
  for (;;) {
    const uint64_t waiting = now_ns();
    Status status;
    const uint32_t word = sub.lane->wait(slot, sub.merged, until, spin_ns_, status);
    const uint64_t seen = now_ns();
    result.times.wait += int64_t(seen - waiting);
    if (status == Status::deadline) return false;
    if (status != Status::ok) {
      sub.status = status;
      settle(sub, false);
      return true;
    }
    const uint32_t ready = std::min<uint32_t>(word & kSlotProgress, legs);
    for (; sub.merged < ready; ++sub.merged) {
      const int32_t leg = sub.asked.legs[sub.merged];
      if (std::exchange(chunk.done[size_t(leg)], 1) == 0)
        scratch.routed.merge(chunk.chunk, leg, payload + sub.offsets[sub.merged], call.out);
    }
    result.times.merge += int64_t(now_ns() - seen);
    if ((word & kSlotDone) == 0) continue;

    ResponseHeader header;
    std::memcpy(&header, sub.lane->response(slot), sizeof header);
    settle(sub, true);
    SidecarTimes& times = scratch.times[size_t(sub.sidecar)];
    times.response_bytes += int64_t(sizeof header + sub.offsets[sub.merged]);
    if (header.status != 0) {
      sub.status = header.status > 0 && header.status <= int32_t(Status::internal) ? Status(header.status) : Status::frame;
      return true;
    }
    if (sub.merged != legs) {
      sub.status = Status::frame;
      return true;
    }
    replicas_.answered(sub.sidecar, seen - sub.sent_ns);
    const int64_t queue = int64_t(header.started_ns - header.received_ns), pool = int64_t(header.finished_ns - header.started_ns);
    if (queue + pool >= times.queue + times.pool) {
      times.queue = queue;
      times.pool = pool;
      if (sub.lane->same_clock()) {
        times.lane_out = int64_t(header.received_ns - sub.sent_ns);
        // The ranker may have been busy with another sidecar when this one finished: that is not the lane's time.
        times.lane_back = std::max<int64_t>(0, int64_t(seen - std::max(header.finished_ns, std::min(turned, seen))));
      } else {
        times.lane_out = times.lane_back = std::max<int64_t>(0, (int64_t(seen - sub.sent_ns) - queue - pool) / 2);
      }
    }
    return true;
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
  ask_others(scratch, chunk, call, deadline, false);
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
    replicas_.shun(sidecar, now_ns());
    scratch.wanted.clear();
    for (const int32_t l : chunk.subrequests[at].asked.legs)
      if (!chunk.done[size_t(l)] && !chunk.covered(l)) scratch.wanted.push_back(l);
    if (scratch.wanted.empty()) return;
    const size_t before = chunk.count;
    ask_others(scratch, chunk, call, deadline, true);
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

void LookupClient::settle(Subrequest& sub, bool answered) {
  if (answered) {
    sub.lane->release(uint32_t(sub.slot));
  } else {
    sub.lane->abandon(uint32_t(sub.slot));
  }
  replicas_.settled(sub.sidecar, sub.bytes);
  sub.settled = true;
}

}  // namespace sidepool
