// One lookup of a ranker: admitted, cut into chunks, sent. client_receive.cpp and client_replicas.cpp have the rest.
#include <algorithm>

#include "client_scratch.hpp"
#include "clock.hpp"

namespace sidepool {
namespace {

bool credits_free(const std::vector<std::shared_ptr<ClientLane>>& lanes) {
  return std::all_of(lanes.begin(), lanes.end(), [](const auto& lane) { return !lane || lane->has_free(); });
}

}  // namespace

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
  if (max_ids_ == 0) return look_up(scratch, call, start);
  int64_t ids = 0;
  for (size_t p = 0; p < call.part_count; ++p) ids += call.parts[p].value_count;
  const int64_t before = ids_.fetch_add(ids, std::memory_order_relaxed);
  LookupResult result;
  if (before > 0 && before + ids > max_ids_) {
    scratch.faults.clear();
    scratch.times.clear();
    scratch.degraded.clear();
    result.sidecars = &scratch.times;
    result.faults = &scratch.faults;
    result.degraded = &scratch.degraded;
    result.status = Status::overloaded;
    totals_.refused.fetch_add(1, std::memory_order_relaxed);
    totals_.statuses[size_t(result.status)].fetch_add(1, std::memory_order_relaxed);
  } else {
    result = look_up(scratch, call, start);
  }
  ids_.fetch_sub(ids, std::memory_order_relaxed);
  return result;
}

LookupResult LookupClient::look_up(Scratch& scratch, const LookupCall& call, uint64_t start) {
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

  scratch.sent = scratch.received = 0;
  const size_t chunks = scratch.routed.chunk_count();
  while (scratch.received < chunks && result.status == Status::ok) {
    while (scratch.sent < chunks && scratch.sent - scratch.received < kWindow && result.status == Status::ok) {
      // The first may wait for credits; the others only use what is free, or two large lookups could starve each other.
      // Nor does one overtake what is held back.
      const bool alone = scratch.sent == scratch.received;
      if (!alone && (scratch.window[(scratch.sent - 1) % kWindow].held > 0 || !credits_free(scratch.lanes))) break;
      const uint64_t begin = now_ns();
      InFlight& next = scratch.window[scratch.sent % kWindow];
      next.chunk = scratch.sent++;
      send_chunk(scratch, next, call, deadline, alone, result);
      result.times.route += int64_t(now_ns() - begin);
    }
    if (result.status != Status::ok) break;
    receive(scratch, scratch.window[scratch.received % kWindow], call, deadline, result);
    if (result.status == Status::ok) ++scratch.received;
  }
  // After a failure the slots still out are nobody's until the sidecars have answered them.
  take_back(scratch, scratch.received);
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

void LookupClient::send_chunk(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, bool alone, LookupResult& result) {
  chunk.count = chunk.in_flight = 0;
  chunk.racing = false;
  chunk.done.assign(routes_.legs.size(), 0);
  chunk.asked.assign(routes_.legs.size(), 0);
  for (int32_t s = 0; s < routes_.sidecars && result.status == Status::ok; ++s) {
    const std::vector<int32_t>& legs = scratch.routed.legs_of(s);
    // Who waits while answers are on their way would not read them, and keep from others what they hold.
    const Wait wait = alone && chunk.in_flight == 0 ? Wait::block : Wait::hold;
    if (legs.empty() || !send(scratch, chunk, s, legs, call, deadline, wait)) continue;
    const size_t last = chunk.count - 1;
    if (chunk.subrequests[last].settled) failed(scratch, chunk, last, call, deadline, result);
  }
}

bool LookupClient::send(Scratch& scratch, InFlight& chunk, int32_t s, const std::vector<int32_t>& legs, const LookupCall& call,
                        uint64_t deadline, Wait wait) {
  Subrequest& sub = chunk.add();
  sub.sidecar = s;
  sub.lane = scratch.lanes[size_t(s)].get();
  sub.slot = -1;
  sub.settled = sub.held = false;
  sub.window_bytes = 0;
  sub.merged = 0;
  sub.bytes = 0;
  scratch.routed.measure(chunk.chunk, legs, sub.asked);
  if (sub.asked.values == 0) {
    --chunk.count;
    return false;
  }
  for (const int32_t l : sub.asked.legs) chunk.asked[size_t(l)] = 1;
  sub.status = prepare(scratch, chunk, sub, call.out.format);
  if (sub.status == Status::ok) {
    if (chunk.held > 0 && wait == Wait::block) wait = Wait::hold;
    const Room room = chunk.held > 0 ? Room::no : take_room(chunk, sub, call, deadline, wait);
    sub.status = room == Room::yes ? post(scratch, chunk, sub, call, deadline, wait)
                                   : room == Room::late ? Status::deadline : Status::overloaded;
    sub.held = sub.status == Status::overloaded && wait == Wait::hold;
    chunk.held += sub.held;
    if (sub.held) return true;
  }
  sub.settled = sub.status != Status::ok;
  if (sub.status == Status::overloaded && wait == Wait::never) {
    --chunk.count;
    return false;
  }
  return true;
}

// Where the answer's blocks will lie, and whether the lane can carry them.
Status LookupClient::prepare(const Scratch& scratch, const InFlight& chunk, Subrequest& sub, OutputFormat format) const {
  if (sub.lane == nullptr || sub.lane->dead()) return Status::transport;
  sub.offsets.assign(1, 0);
  for (size_t i = 0; i < sub.asked.legs.size(); ++i)
    sub.offsets.push_back(sub.offsets.back() + scratch.routed.answer_bytes(chunk.chunk, sub.asked, i, format));
  const bool fits = sub.asked.layout.total <= sub.lane->limits().request_bytes && sub.offsets.back() <= sub.lane->payload_capacity();
  return fits ? Status::ok : Status::overloaded;
}

// What the window must have for the answer. `late`: what is left of the budget is less than answers usually take. Of what is
// held only the first may ask: nobody of a lookup overtakes another, which keeps the order of sidecars in which slots are taken.
LookupClient::Room LookupClient::take_room(InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, Wait wait) {
  const uint64_t bytes = sub.response_bytes(), expected = times_.expected_ns(sub.sidecar, bytes);
  const uint64_t latest = deadline > expected ? deadline - expected : 0;
  if (now_ns() > latest) return give_up(chunk, sub);
  if (!window_.on() || !sub.lane->windowed()) return Room::yes;
  sub.window_bytes = bytes;
  if (chunk.place == ReceiveWindow::kNoPlace) {
    const Urgency urgency{call.priority, deadline};
    if (window_.try_take(bytes, urgency)) return Room::yes;
    sub.window_bytes = 0;
    if (wait == Wait::never) return Room::no;
    chunk.place = window_.stand(bytes, urgency);
    if (chunk.place == ReceiveWindow::kNoPlace) return give_up(chunk, sub);
  }
  if (wait == Wait::block ? window_.wait(chunk.place, latest) : window_.granted(chunk.place)) {
    chunk.place = ReceiveWindow::kNoPlace;
    sub.window_bytes = bytes;
    return Room::yes;
  }
  sub.window_bytes = 0;
  return wait == Wait::hold ? Room::no : give_up(chunk, sub);
}

LookupClient::Room LookupClient::give_up(InFlight& chunk, const Subrequest& sub) {
  leave_line(chunk);
  times_.doubt(sub.sidecar, sub.response_bytes());
  totals_.shed.fetch_add(1, std::memory_order_relaxed);
  return Room::late;
}

void LookupClient::leave_line(InFlight& chunk) {
  if (chunk.place != ReceiveWindow::kNoPlace) window_.withdraw(chunk.place);
  chunk.place = ReceiveWindow::kNoPlace;
}

// Sends what there is room for by now of what was held back, in order. Waits only where nothing of the lookup is under way, for
// which chunks after this one are taken back: whoever waits for a slot with others in hand may wait for who waits for those.
void LookupClient::send_held(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result) {
  for (size_t i = 0; i < chunk.count && chunk.held > 0 && result.status == Status::ok; ++i) {
    Subrequest& sub = chunk.subrequests[i];
    if (!sub.held) continue;
    if (chunk.racing && !chunk.needed(sub)) {
      settle(chunk, sub, false);
      continue;
    }
    const Wait wait = chunk.in_flight == 0 ? Wait::block : Wait::hold;
    if (wait == Wait::block) take_back(scratch, chunk.chunk + 1);
    const Room room = take_room(chunk, sub, call, deadline, wait);
    if (room == Room::no) return;
    sub.status = room == Room::late ? Status::deadline : post(scratch, chunk, sub, call, deadline, wait);
    if (sub.status == Status::overloaded && wait == Wait::hold) return;
    sub.held = false;
    --chunk.held;
    sub.settled = sub.status != Status::ok;
    if (sub.settled) failed(scratch, chunk, i, call, deadline, result);
  }
}

// Chunks from `first` on are as if never sent.
void LookupClient::take_back(Scratch& scratch, size_t first) {
  for (size_t c = first; c < scratch.sent; ++c) {
    InFlight& chunk = scratch.window[c % kWindow];
    for (size_t i = 0; i < chunk.count; ++i)
      if (!chunk.subrequests[i].settled) settle(chunk, chunk.subrequests[i], false);
  }
  scratch.sent = std::min(scratch.sent, first);
}

// Status::overloaded: no slot is free, or became free in time.
Status LookupClient::post(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, Wait wait) {
  const Status status = send_frame(scratch, chunk, sub, call, deadline, wait);
  if (status == Status::ok)
    ++chunk.in_flight;
  else if (sub.window_bytes != 0)
    window_.give_back(sub.window_bytes);
  return status;
}

Status LookupClient::send_frame(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t deadline, Wait wait) {
  // Half of what is left belongs to whoever takes over.
  const uint64_t begin = now_ns();
  sub.others_ns = UINT64_MAX;
  sub.hedge = false;
  if (routes_.replicated)
    for (size_t i = 0; i < sub.asked.legs.size() && sub.others_ns == UINT64_MAX; ++i)
      if (another_holder(scratch, chunk, sub.asked.legs[i]) >= 0) sub.others_ns = begin + (deadline > begin ? (deadline - begin) / 2 : 0);
  const int slot = sub.lane->acquire(wait == Wait::block ? std::min(deadline, sub.others_ns) : 0);
  if (slot < 0) return slot == -2 ? Status::transport : Status::overloaded;
  std::byte* frame = sub.lane->request(uint32_t(slot));
  scratch.routed.encode(chunk.chunk, sub.asked, frame);
  RequestHeader header;
  header.frame_bytes = sub.asked.layout.total;
  header.slot = uint32_t(slot);
  header.priority = call.priority;
  header.lookup_id = next_id_.fetch_add(1, std::memory_order_relaxed);
  header.epoch = uint64_t(epoch_);
  header.batch = scratch.routed.chunk_batch(chunk.chunk);
  header.feature_count = uint32_t(sub.asked.legs.size());
  header.value_count = sub.asked.values;
  header.output_format = call.out.format;
  if (call.trace != nullptr) std::memcpy(header.trace, call.trace, sizeof header.trace);
  sub.sent_ns = header.sent_ns = now_ns();
  header.budget_ns = deadline > sub.sent_ns ? deadline - sub.sent_ns : 0;
  std::memcpy(frame, &header, sizeof header);
  const Status status = sub.lane->post(uint32_t(slot), header.frame_bytes, header.lookup_id, sub.offsets, deadline);
  if (status != Status::ok) {
    sub.lane->release(uint32_t(slot));
    return status;
  }
  sub.slot = slot;
  sub.bytes = int64_t(header.frame_bytes + sub.offsets.back());
  replicas_.sent(sub.sidecar, sub.bytes);
  scratch.times[size_t(sub.sidecar)].request_bytes += int64_t(header.frame_bytes);
  const uint64_t patience = sub.others_ns != UINT64_MAX ? replicas_.hedge_after_ns(sub.sidecar) : 0;
  if (patience > 0 && sub.sent_ns + patience < sub.others_ns) {
    sub.others_ns = sub.sent_ns + patience;
    sub.hedge = true;
  }
  return Status::ok;
}

}  // namespace sidepool
