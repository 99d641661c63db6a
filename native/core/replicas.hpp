// Which sidecar answers: power of two choices among replicas, and who is left alone for a while.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace sidepool {

// A sidecar that failed or was left for its slowness is not chosen for this long where there is another: long enough that
// few lookups meet it again, short enough that it is used again soon after it has recovered.
constexpr uint64_t kShunNs = 500'000'000;

// What rankers' threads know of the sidecars, shared by all of them: relaxed atomics, since it only steers choices.
class Replicas {
 public:
  // hedge_budget: second subrequests sent early, as a share of all subrequests; 0: none.
  Replicas(size_t sidecars, double hedge_budget);

  // A holder to ask: of two taken at random the one with fewer bytes in flight. `usable(sidecar)`: its lane lives.
  template <class Usable>
  int32_t choose(const std::vector<int32_t>& holders, uint64_t now_ns, Usable usable) {
    if (holders.size() == 1) return holders[0];
    const auto good = [&](int32_t s) { return usable(s) && peers_[size_t(s)].shunned_until.load(std::memory_order_relaxed) <= now_ns; };
    const size_t a = random() % holders.size(), step = 1 + random() % (holders.size() - 1);
    const int32_t first = holders[a], second = holders[(a + step) % holders.size()];
    if (good(first) && good(second)) return in_flight(second) < in_flight(first) ? second : first;
    if (good(first)) return first;
    if (good(second)) return second;
    for (const int32_t s : holders)
      if (good(s)) return s;
    return usable(second) ? second : first;  // all are shunned: any may have recovered
  }

  void sent(int32_t sidecar, int64_t bytes) { peers_[size_t(sidecar)].in_flight.fetch_add(bytes, std::memory_order_relaxed); }
  void settled(int32_t sidecar, int64_t bytes) { peers_[size_t(sidecar)].in_flight.fetch_sub(bytes, std::memory_order_relaxed); }
  int64_t in_flight(int32_t sidecar) const { return peers_[size_t(sidecar)].in_flight.load(std::memory_order_relaxed); }
  void shun(int32_t sidecar, uint64_t now_ns) { peers_[size_t(sidecar)].shunned_until.store(now_ns + kShunNs, std::memory_order_relaxed); }

  // An answer came after `ns`: moves the estimate of the sidecar's 95th percentile, and earns budget for hedging.
  void answered(int32_t sidecar, uint64_t ns);
  // When a second subrequest is worth its cost, after that many ns; 0: not known yet, or hedging is off.
  uint64_t hedge_after_ns(int32_t sidecar) const;
  // Takes one from the budget; false where it is spent.
  bool take_hedge();

 private:
  struct alignas(64) Peer {
    std::atomic<int64_t> in_flight{0};
    std::atomic<uint64_t> shunned_until{0};
    std::atomic<int64_t> p95_ns{0};
    std::atomic<int64_t> answers{0};
  };
  static uint64_t random();

  std::unique_ptr<Peer[]> peers_;
  const int64_t earned_;  // millionths of a hedge per answer
  std::atomic<int64_t> budget_{0};
};

}  // namespace sidepool
