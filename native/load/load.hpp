// An open loop: requests leave at scheduled times, whatever has been answered.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace sidepool {

// When each request is due, in nanoseconds from the start and ascending, and which of the target's requests it is.
struct Schedule {
  const int64_t* due_ns = nullptr;
  const int32_t* request = nullptr;
  size_t count = 0;
};

// What became of a request whose target gave no status of its own. Shared with Python (bench/load/result.py).
enum Outcome : int32_t {
  kWaiting = -1,     // not over
  kLost = 100,       // its connection was lost, or none could be made
  kMalformed = 101,  // the reply is not what the protocol allows
  kUnanswered = 102, // no answer by the end of the run
  kNotSent = 103,    // the memory limit was reached, or the run was stopped
};

// Arrays of the schedule's length, owned by the caller, who may read them while the load runs: an entry is final once its
// status is no longer `kWaiting`. Times are nanoseconds from the start.
class Outcomes {
 public:
  Outcomes(int64_t* sent_ns, int64_t* done_ns, int32_t* status) : sent_ns_(sent_ns), done_ns_(done_ns), status_(status) {}
  void sent(size_t i, int64_t ns) const { std::atomic_ref(sent_ns_[i]).store(ns, std::memory_order_relaxed); }
  void done(size_t i, int64_t ns, int32_t status) const {
    std::atomic_ref(done_ns_[i]).store(ns, std::memory_order_relaxed);
    std::atomic_ref(status_[i]).store(status, std::memory_order_release);
  }

 private:
  int64_t* sent_ns_;
  int64_t* done_ns_;
  int32_t* status_;
};

struct LoadTotals {
  uint64_t start_ns = 0;          // monotonic clock
  size_t most_outstanding = 0;
  size_t most_bytes = 0;          // memory that outstanding requests took in this process
  size_t reconnects = 0;
};

class Load {
 public:
  virtual ~Load() = default;
  // Blocks until everything is answered, or until `drain_ns` after the last request was due. Once per object and thread.
  virtual LoadTotals run(const Schedule& schedule, const Outcomes& outcomes, uint64_t drain_ns) = 0;
  // Any thread: `run` returns soon, and what was not over is `kUnanswered` or `kNotSent`.
  virtual void stop() = 0;
  // The first message of each status that came with one.
  virtual std::map<int32_t, std::string> examples() const = 0;
};

// From the call of `run` to the start: threads and connections are ready by then.
inline constexpr uint64_t kLeadNs = 20'000'000;

}  // namespace sidepool
