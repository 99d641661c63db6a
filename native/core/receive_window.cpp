#include "receive_window.hpp"

#include <algorithm>

#include "clock.hpp"

namespace sidepool {
namespace {

constexpr uint32_t kOne = 256;
// One answer says at most this much: a sidecar that hangs, among several, must not close the window for all.
constexpr uint32_t kMostStrain = 2 * kOne;
// Per answer, of the difference to what was thought before.
constexpr uint32_t kSmoothing = 8;
// Swift's (Kumar et al., SIGCOMM 2020): how strongly excess delay shrinks the window, and by how much at once.
constexpr double kBeta = 0.8, kMostShrunk = 0.5;
// What a mark or a loss does: as CUBIC's 0.7 (RFC 9438).
constexpr double kMarked = 0.7;
// Growth per window of answers: ten segments, and 1/16, so that a window that is much too small reopens within tens of rounds.
constexpr uint64_t kStep = 16 << 10;
constexpr uint64_t kShare = 16;

}  // namespace

bool ReceiveWindow::reserve(uint64_t bytes) {
  uint64_t used = used_.load(std::memory_order_seq_cst);
  do {
    if (used != 0 && used + bytes > window_.load(std::memory_order_relaxed)) return false;
  } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_seq_cst));
  return true;
}

bool ReceiveWindow::try_take(uint64_t bytes, const Urgency& urgency) {
  if (waiting_.load(std::memory_order_seq_cst) != 0) {
    uint32_t word;
    const Waiter* first = most_urgent(word);
    if (first != nullptr && !(urgency > first->urgency())) return false;
  }
  return reserve(bytes);
}

uint32_t ReceiveWindow::stand(uint64_t bytes, const Urgency& urgency) {
  for (uint32_t i = 0; i < kWaiters; ++i) {
    Waiter& place = waiters_[i];
    uint32_t word = place.word.load(std::memory_order_relaxed);
    if (word % kStates != kFree || !place.word.compare_exchange_strong(word, word + kTaken, std::memory_order_acquire)) continue;
    place.priority.store(urgency.priority, std::memory_order_relaxed);
    place.deadline_ns.store(urgency.deadline_ns, std::memory_order_relaxed);
    place.bytes.store(bytes, std::memory_order_relaxed);
    waiting_.fetch_add(1, std::memory_order_seq_cst);
    place.word.store(word + kWaits, std::memory_order_seq_cst);
    totals_.waits.fetch_add(1, std::memory_order_relaxed);
    grant();  // what was given back before we stood here was offered to nobody
    return i;
  }
  return kNoPlace;
}

bool ReceiveWindow::granted(uint32_t place) {
  if (waiters_[place].word.load(std::memory_order_seq_cst) % kStates != kGranted) return false;
  leave(waiters_[place]);
  return true;
}

bool ReceiveWindow::wait(uint32_t place, uint64_t until_ns) {
  Waiter& mine = waiters_[place];
  for (uint32_t word = mine.word.load(std::memory_order_seq_cst); word % kStates == kWaits && now_ns() < until_ns;
       word = mine.word.load(std::memory_order_seq_cst))
    futex_wait_until(mine.word, word, until_ns);
  return granted(place);
}

void ReceiveWindow::withdraw(uint32_t place) {
  Waiter& mine = waiters_[place];
  uint32_t word = mine.word.load(std::memory_order_seq_cst);
  const uint64_t bytes = mine.bytes.load(std::memory_order_relaxed);
  const bool waits = word % kStates == kWaits && mine.word.compare_exchange_strong(word, word - kWaits + kTaken, std::memory_order_seq_cst);
  leave(mine);
  if (waits)
    grant();  // we may have stood before somebody for whom there is room
  else
    give_back(bytes);
}

void ReceiveWindow::leave(Waiter& waiter) {
  waiting_.fetch_sub(1, std::memory_order_seq_cst);
  const uint32_t word = waiter.word.load(std::memory_order_relaxed);
  waiter.word.store((word / kStates + 1) * kStates, std::memory_order_release);
}

const ReceiveWindow::Waiter* ReceiveWindow::most_urgent(uint32_t& word) const {
  const Waiter* best = nullptr;
  // Whoever comes after this is read grants for itself.
  uint32_t left = waiting_.load(std::memory_order_seq_cst);
  for (uint32_t i = 0; i < kWaiters && left > 0; ++i) {
    const Waiter& each = waiters_[i];
    const uint32_t seen = each.word.load(std::memory_order_seq_cst);
    if (seen % kStates != kWaits) continue;
    --left;
    if (best != nullptr && !(each.urgency() > best->urgency())) continue;
    best = &each;
    word = seen;
  }
  return best;
}

void ReceiveWindow::grant() {
  while (waiting_.load(std::memory_order_seq_cst) != 0) {
    uint32_t word;
    auto* const first = const_cast<Waiter*>(most_urgent(word));
    if (first == nullptr) return;
    const uint64_t bytes = first->bytes.load(std::memory_order_relaxed);
    if (!reserve(bytes)) return;
    // Somebody else may have granted, or it has left; then the word is another.
    if (first->word.compare_exchange_strong(word, word - kWaits + kGranted, std::memory_order_seq_cst))
      futex_wake(first->word, 1);
    else
      used_.fetch_sub(bytes, std::memory_order_seq_cst);
  }
}

void ReceiveWindow::give_back(uint64_t bytes) {
  used_.fetch_sub(bytes, std::memory_order_seq_cst);
  grant();
}

void ReceiveWindow::answered(uint64_t bytes, uint64_t delay_ns, uint64_t least_ns, uint64_t now_ns) {
  const uint64_t allowed = 2 * least_ns + delay_ns_;
  const uint32_t strain = uint32_t(std::min<uint64_t>(kMostStrain, delay_ns * kOne / allowed));
  const uint32_t before = strain_.load(std::memory_order_relaxed);
  const uint32_t smooth = before - before / kSmoothing + strain / kSmoothing;
  strain_.store(smooth, std::memory_order_relaxed);
  if (smooth > kOne && strain > kOne)
    return shrink(std::max(kMostShrunk, 1 - kBeta * (1 - double(kOne) / smooth)), delay_ns, now_ns);
  // Only a window that holds somebody back can be known to be too small.
  const uint64_t window = window_.load(std::memory_order_relaxed);
  if (strain > kOne || window == kOpen || used() * 2 < window) return;
  const double part = std::min(1.0, double(bytes) / double(window));
  window_.store(std::min(kOpen, window + uint64_t(double(std::max(kStep, window / kShare)) * part)), std::memory_order_relaxed);
}

void ReceiveWindow::marked(uint64_t delay_ns, uint64_t now_ns) {
  totals_.marks.fetch_add(1, std::memory_order_relaxed);
  shrink(kMarked, delay_ns, now_ns);
}

// At most once in the time that an answer takes: those under way were asked for before.
void ReceiveWindow::shrink(double factor, uint64_t pause_ns, uint64_t now_ns) {
  uint64_t last = shrunk_ns_.load(std::memory_order_relaxed);
  if (now_ns < last + pause_ns || !shrunk_ns_.compare_exchange_strong(last, now_ns, std::memory_order_relaxed)) return;
  // What is under way is what congested the path, whatever would have been allowed.
  const double from = double(std::min(window_.load(std::memory_order_relaxed), used()));
  window_.store(std::max(kLeast, uint64_t(from * factor)), std::memory_order_relaxed);
  strain_.store(kOne / 2, std::memory_order_relaxed);
  totals_.shrunk.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace sidepool
