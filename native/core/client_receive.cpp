// Answers of a lookup: merged as they come; what is over gives back what it held.
#include <algorithm>
#include <utility>

#include "client_scratch.hpp"
#include "clock.hpp"

namespace sidepool {

namespace {

// While two sidecars race for the same legs, each is waited for in turns of this length: well below a healthy answer's
// time over a network, well above the cost of looking.
constexpr uint64_t kRaceTurnNs = 50'000;
// While subrequests are held back, answers are waited for in turns of this length, to send those as soon as there is room.
constexpr uint64_t kHeldTurnNs = 100'000;
// An answer that is read so long after it began to be waited for was not there before: a large one is read in less.
constexpr uint64_t kWaitedNs = 250'000;

}  // namespace

void LookupClient::receive(Scratch& scratch, InFlight& chunk, const LookupCall& call, uint64_t deadline, LookupResult& result) {
  scratch.routed.begin_merge(chunk.chunk, call.out);
  // Legs without ids.
  for (size_t l = 0; l < chunk.asked.size(); ++l)
    if (!chunk.asked[l]) scratch.routed.lose(chunk.chunk, int32_t(l), call.out);
  for (size_t turn = 0, settled = 0; settled < chunk.count && result.status == Status::ok; turn = (turn + 1) % chunk.count) {
    if (chunk.held > 0) send_held(scratch, chunk, call, deadline, result);
    if (chunk.subrequests[turn].settled) {
      ++settled;
      continue;
    }
    settled = 0;
    if (chunk.subrequests[turn].held) continue;  // others are under way; else send_held would have waited
    if (chunk.racing && !chunk.needed(chunk.subrequests[turn])) {
      settle(chunk, chunk.subrequests[turn], false);
      continue;
    }
    for (;;) {
      // The sender of a second subrequest may have moved the first.
      Subrequest& sub = chunk.subrequests[turn];
      const uint64_t until = std::min(deadline, sub.others_ns);
      const uint64_t turn_ns = chunk.racing ? kRaceTurnNs : kHeldTurnNs;
      const uint64_t here = chunk.racing || chunk.held > 0 ? std::min(until, now_ns() + turn_ns) : until;
      if (receive_some(scratch, chunk, sub, call, here, result)) {
        if (sub.status != Status::ok) failed(scratch, chunk, turn, call, deadline, result);
        break;
      }
      const uint64_t now = now_ns();
      if (now >= deadline) {
        sub.status = Status::deadline;
        if (sub.window_bytes != 0 && sub.lane->newly_marked()) window_.marked(now - sub.sent_ns, now);
        settle(chunk, sub, false);
        failed(scratch, chunk, turn, call, deadline, result);
        break;
      }
      if (now >= sub.others_ns) late(scratch, chunk, turn, call, deadline);
      if (chunk.racing || chunk.held > 0) break;
    }
  }
  scratch.routed.finish_merge(chunk.chunk, call.out);
}

bool LookupClient::receive_some(Scratch& scratch, InFlight& chunk, Subrequest& sub, const LookupCall& call, uint64_t until,
                                LookupResult& result) {
  const uint32_t slot = uint32_t(sub.slot), legs = uint32_t(sub.asked.legs.size());
  const std::byte* payload = sub.lane->response(slot) + sizeof(ResponseHeader);
  // Who waits in turns for something to become free lets those have the processor whom it waits for.
  const uint64_t turned = now_ns(), spin_ns = chunk.held > 0 ? 0 : spin_ns_;
  for (;;) {
    const uint64_t waiting = now_ns();
    Status status;
    const uint32_t word = sub.lane->wait(slot, sub.merged, until, spin_ns, status);
    const uint64_t seen = now_ns();
    result.times.wait += int64_t(seen - waiting);
    if (status == Status::deadline) return false;
    if (status != Status::ok) {
      sub.status = status;
      settle(chunk, sub, false);
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
    learn(sub, header, turned, seen);
    settle(chunk, sub, true);
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

// What an answer says about the times to expect, and about the network.
void LookupClient::learn(const Subrequest& sub, const ResponseHeader& header, uint64_t turned, uint64_t seen) {
  const uint64_t bytes = sub.response_bytes(), took = seen - sub.sent_ns, there = header.finished_ns - header.received_ns;
  if (header.status == 0) times_.answered(sub.sidecar, bytes, took);
  if (sub.window_bytes == 0 || there > took) return;
  if (sub.lane->newly_marked()) window_.marked(took - there, seen);
  // One that may have lain here unread says nothing.
  if (header.status != 0 || (seen - turned < kWaitedNs && turned - sub.sent_ns > kWaitedNs)) return;
  const uint64_t least = times_.least_delay_ns(sub.sidecar, bytes, took - there, seen);
  window_.answered(bytes, took - there, least, seen);
}

void LookupClient::settle(InFlight& chunk, Subrequest& sub, bool answered) {
  sub.settled = true;
  if (sub.held) {
    sub.held = false;
    --chunk.held;
    leave_line(chunk);
    return;
  }
  if (answered) {
    sub.lane->release(uint32_t(sub.slot));
  } else {
    sub.lane->abandon(uint32_t(sub.slot));
  }
  if (sub.window_bytes != 0) window_.give_back(sub.window_bytes);
  replicas_.settled(sub.sidecar, sub.bytes);
  --chunk.in_flight;
}

}  // namespace sidepool
