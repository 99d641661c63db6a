// How many bytes of responses a ranker has under way, from all its sidecars together: what keeps them from meeting in a
// switch's queue. docs/decisions/0012-receive-window.md says why so.
//
// A subrequest takes its response's bytes before it is sent, its slot's credit being of no use without them, and gives them
// back when it is over. Where there is no room it waits, the most urgent first. Any thread; no lock, no allocation.
#pragma once
#include <atomic>
#include <cstdint>

namespace sidepool {

struct Urgency {
  int32_t priority = 0;
  uint64_t deadline_ns = 0;
  bool operator>(const Urgency& other) const {
    return priority != other.priority ? priority > other.priority : deadline_ns < other.deadline_ns;
  }
};

class ReceiveWindow {
 public:
  // delay_ns: how much longer than twice its least an answer may be on the way; 0: the window is off, everything is let through.
  explicit ReceiveWindow(uint64_t delay_ns) : delay_ns_(delay_ns) {}

  bool on() const { return delay_ns_ != 0; }
  // Bytes, if there is room for them and nobody more urgent waits. One subrequest alone always has room.
  bool try_take(uint64_t bytes, const Urgency& urgency);
  // Stand in line for bytes; kNoPlace: more stand there than there are places. A place is left by `withdraw`, or with the bytes
  // once `granted` or `wait` has said that they are there. One thread uses a place.
  uint32_t stand(uint64_t bytes, const Urgency& urgency);
  bool granted(uint32_t place);
  bool wait(uint32_t place, uint64_t until_ns);
  void withdraw(uint32_t place);
  void give_back(uint64_t bytes);

  // An answer of `bytes` was on the way for delay_ns; the least of its kind was least_ns. Before its bytes are given back.
  void answered(uint64_t bytes, uint64_t delay_ns, uint64_t least_ns, uint64_t now_ns);
  // The network marked or lost segments of an answer that took so long.
  void marked(uint64_t delay_ns, uint64_t now_ns);

  uint64_t bytes() const { return window_.load(std::memory_order_relaxed); }
  uint64_t used() const { return used_.load(std::memory_order_relaxed); }
  uint32_t waiting() const { return waiting_.load(std::memory_order_relaxed); }
  struct Totals {
    std::atomic<int64_t> waits{0}, shrunk{0}, marks{0};
  };
  const Totals& totals() const { return totals_; }

  // Never limits: more than all slots of all lanes hold.
  static constexpr uint64_t kOpen = 1ull << 48;
  // Below what the shallowest switch ports queue (hundreds of KiB), and some tens of segments, so that acknowledgements flow.
  static constexpr uint64_t kLeast = 64 << 10;
  static constexpr uint32_t kNoPlace = UINT32_MAX;

 private:
  // Threads of a ranker that may wait at once; far more than have processors.
  static constexpr uint32_t kWaiters = 256;
  enum State : uint32_t { kFree = 0, kTaken = 1, kWaits = 2, kGranted = 3, kStates = 4 };
  struct alignas(64) Waiter {
    std::atomic<uint32_t> word{0};  // State, and above it how often the place was taken: a grant is for one waiter only
    std::atomic<int32_t> priority{0};
    std::atomic<uint64_t> deadline_ns{0}, bytes{0};
    Urgency urgency() const { return {priority.load(std::memory_order_relaxed), deadline_ns.load(std::memory_order_relaxed)}; }
  };

  bool reserve(uint64_t bytes);
  void leave(Waiter& waiter);
  const Waiter* most_urgent(uint32_t& word) const;
  void grant();
  void shrink(double factor, uint64_t pause_ns, uint64_t now_ns);

  const uint64_t delay_ns_;
  alignas(64) std::atomic<uint64_t> used_{0};
  alignas(64) std::atomic<uint64_t> window_{kOpen};
  std::atomic<uint32_t> waiting_{0};
  std::atomic<uint32_t> strain_{0};  // smoothed delay over what is allowed, in 256ths
  std::atomic<uint64_t> shrunk_ns_{0};
  Totals totals_;
  Waiter waiters_[kWaiters];
};

}  // namespace sidepool
