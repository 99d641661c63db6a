#include "client_lane.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <bit>
#include <climits>

namespace sidepool {
namespace {

// Answers that come later than a caller may spin are not worth spinning for: after so many waits in vain on a slot, only one
// in kSpinAgain is spun through, to see whether that has changed. Spinning costs whoever else needs the processor, such as the
// engines that many callers at a time wait for.
constexpr uint32_t kSpinsInVain = 8, kSpinAgain = 32;

}  // namespace

ClientLane::ClientLane(const LaneLimits& limits)
    : limits_(limits),
      free_(limits.slots >= 64 ? ~0ull : (1ull << limits.slots) - 1),
      slots_(std::make_unique<SlotState[]>(limits.slots)) {}

int ClientLane::try_acquire() {
  uint64_t free = free_.load(std::memory_order_acquire);
  while (free != 0) {
    // The lowest free slot: its memory is the one most likely to be warm.
    const uint64_t bit = free & -free;
    if (free_.compare_exchange_weak(free, free & ~bit, std::memory_order_acq_rel)) return std::countr_zero(bit);
  }
  return -1;
}

int ClientLane::acquire(uint64_t deadline_ns) {
  for (bool waited = false;;) {
    if (dead()) return -2;
    if (const int slot = try_acquire(); slot >= 0) return slot;
    collect();
    reclaim();
    if (const int slot = try_acquire(); slot >= 0) return slot;
    if (now_ns() >= deadline_ns) return -1;
    if (!waited) counters_.credit_waits.fetch_add(1, std::memory_order_relaxed);
    waited = true;
    acquirers_.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = released_.load(std::memory_order_seq_cst);
    // An abandoned slot is answered without a bell: look again every 20 ms.
    if (free_.load(std::memory_order_seq_cst) == 0 && !dead())
      futex_wait_until(released_, seen, std::min(deadline_ns, now_ns() + 20'000'000));
    acquirers_.fetch_sub(1, std::memory_order_relaxed);
  }
}

void ClientLane::release(uint32_t slot) {
  released(slot);
  slots_[slot].lookup_id.store(0, std::memory_order_release);
  free_.fetch_or(1ull << slot, std::memory_order_seq_cst);
  if (acquirers_.load(std::memory_order_seq_cst) != 0) {
    released_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(released_, 1);
  }
}

void ClientLane::abandon(uint32_t slot) { abandoned_.fetch_or(1ull << slot, std::memory_order_acq_rel); }

void ClientLane::reclaim() {
  uint64_t candidates = abandoned_.load(std::memory_order_acquire);
  while (candidates != 0) {
    const uint32_t slot = uint32_t(std::countr_zero(candidates));
    candidates &= candidates - 1;
    if ((control(slot).word.load(std::memory_order_acquire) & kSlotDone) == 0) continue;
    const uint64_t bit = 1ull << slot;
    if (abandoned_.fetch_and(~bit, std::memory_order_acq_rel) & bit) release(slot);
  }
}

Status ClientLane::post(uint32_t slot, size_t bytes, uint64_t lookup_id, const std::vector<size_t>& offsets, uint64_t deadline_ns) {
  SlotState& state = slots_[slot];
  state.offsets.assign(offsets.begin(), offsets.end());
  control(slot).waiting.store(0, std::memory_order_relaxed);
  control(slot).word.store(0, std::memory_order_relaxed);
  state.lookup_id.store(lookup_id, std::memory_order_release);
  counters_.sent.fetch_add(1, std::memory_order_relaxed);
  counters_.request_bytes.fetch_add(int64_t(bytes), std::memory_order_relaxed);
  return send(slot, bytes, deadline_ns);
}

uint32_t ClientLane::wait(uint32_t slot, uint32_t seen, uint64_t deadline_ns, uint64_t spin_ns, Status& status) {
  SlotControl& c = control(slot);
  const uint64_t start = now_ns();
  uint32_t& vain = slots_[slot].vain;
  const bool spins = arrives_by_itself() && (vain < kSpinsInVain || vain % kSpinAgain == 0);
  const uint64_t spin_until = spins ? start + spin_ns : start;
  bool slept = false;
  status = Status::ok;
  for (uint64_t now = start;; now = now_ns()) {
    const uint32_t word = c.word.load(std::memory_order_acquire);
    if ((word & kSlotDone) || (word & kSlotProgress) > seen) {
      if (word & kSlotDone) counters_.received.fetch_add(1, std::memory_order_relaxed);
      if (slept) {
        vain += spin_ns != 0;
      } else if (now != start) {
        vain = 0;
      }
      return word & (kSlotDone | kSlotProgress);
    }
    // A response that made it here counts even if the peer is gone by now: the word was looked at first.
    if (dead()) {
      status = Status::transport;
      return seen;
    }
    if (now >= deadline_ns) {
      status = Status::deadline;
      return seen;
    }
    if (now < spin_until) {
      cpu_pause();
      continue;
    }
    receive_or_sleep(slot, word, deadline_ns, spin_ns);
    slept = true;
  }
}

void ClientLane::receive_or_sleep(uint32_t slot, uint32_t word, uint64_t until_ns, uint64_t) {
  SlotControl& c = control(slot);
  c.waiting.store(1, std::memory_order_seq_cst);
  if (c.word.load(std::memory_order_seq_cst) == word && !dead()) futex_wait_until(c.word, word, until_ns, waiters_);
  c.waiting.store(0, std::memory_order_relaxed);
}

void ClientLane::mark_done(uint32_t slot, uint32_t done) {
  SlotControl& c = control(slot);
  c.word.store(kSlotDone | done, std::memory_order_seq_cst);
  if (c.waiting.load(std::memory_order_seq_cst) != 0) futex_wake(c.word, 1, waiters_);
}

void ClientLane::kill() {
  dead_.store(true, std::memory_order_seq_cst);
  // Tells the peer, and the client's watcher, which sees the socket's end.
  if (fd() >= 0) shutdown(fd(), SHUT_RDWR);
  for (uint32_t slot = 0; slot < limits_.slots; ++slot) {
    SlotControl& c = control(slot);
    c.word.fetch_or(kSlotDead, std::memory_order_seq_cst);
    futex_wake(c.word, 1, waiters_);
  }
  released_.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(released_, INT32_MAX);
}

}  // namespace sidepool
