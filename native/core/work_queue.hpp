// What an engine has still to answer, in the order in which it will. Owned by the engine thread; no clock of its own.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "lines.hpp"
#include "status.hpp"

namespace sidepool {

struct EngineLane;

// edf: highest priority first, then earliest deadline, then first come. fcfs: first come.
enum class Order : uint8_t { edf, fcfs };

inline Order parse_order(const std::string& name) {
  if (name == "edf") return Order::edf;
  if (name == "fcfs") return Order::fcfs;
  throw Error(Status::rejected, "order: found " + name + "; allowed: edf, fcfs");
}

struct Work {
  uint64_t deadline_ns = 0;
  uint64_t received_ns = 0;
  uint64_t cost_ns = 0;  // of answering it, estimated when it came
  int32_t priority = 0;
  uint32_t slot = 0;
  EngineLane* owner = nullptr;
  uint64_t arrival = 0;  // number, given by the queue
};

class WorkQueue {
 public:
  explicit WorkQueue(Order order) : order_(order) {}

  // Room for so many; the request path never grows it.
  void reserve(size_t works) { works_.reserve(works); }
  bool empty() const { return works_.empty(); }
  size_t size() const { return works_.size(); }

  void push(Work work) {
    work.arrival = ++arrivals_;
    cost_ns_ += work.cost_ns;
    works_.push_back(work);
    std::push_heap(works_.begin(), works_.end(), [this](const Work& a, const Work& b) { return before(b, a); });
  }

  Work pop() {
    std::pop_heap(works_.begin(), works_.end(), [this](const Work& a, const Work& b) { return before(b, a); });
    const Work work = works_.back();
    works_.pop_back();
    cost_ns_ -= work.cost_ns;
    return work;
  }

  // Whether `work`, come now, would end too late even if nothing more urgent came after it. What goes before it is summed up
  // only where the whole queue would make it late, and only until that is sure.
  bool hopeless(const Work& work, uint64_t now_ns) const {
    if (now_ns + work.cost_ns >= work.deadline_ns) return true;
    const uint64_t slack_ns = work.deadline_ns - now_ns - work.cost_ns;
    if (cost_ns_ < slack_ns) return false;
    uint64_t ahead_ns = 0;
    for (size_t i = 0; i < works_.size() && ahead_ns < slack_ns; ++i)
      if (order_ == Order::fcfs || !more_urgent(work, works_[i])) ahead_ns += works_[i].cost_ns;
    return ahead_ns >= slack_ns;
  }

  // Takes out what belongs to `owner`.
  std::vector<Work> take(const EngineLane* owner) {
    const auto kept = std::partition(works_.begin(), works_.end(), [owner](const Work& work) { return work.owner != owner; });
    std::vector<Work> taken(kept, works_.end());
    works_.erase(kept, works_.end());
    for (const Work& work : taken) cost_ns_ -= work.cost_ns;
    std::make_heap(works_.begin(), works_.end(), [this](const Work& a, const Work& b) { return before(b, a); });
    return taken;
  }

 private:
  static bool more_urgent(const Work& a, const Work& b) {
    return a.priority != b.priority ? a.priority > b.priority : a.deadline_ns < b.deadline_ns;
  }

  bool before(const Work& a, const Work& b) const {
    if (order_ == Order::edf && (more_urgent(a, b) || more_urgent(b, a))) return more_urgent(a, b);
    // A lane may have come from another engine with what it had received there.
    return a.received_ns != b.received_ns ? a.received_ns < b.received_ns : a.arrival < b.arrival;
  }

  const Order order_;
  uint64_t arrivals_ = 0, cost_ns_ = 0;
  LineVector<Work> works_;  // heap
};

// How long a subrequest takes, learnt from what was answered: a fixed part, and one for every id (its row is read and added).
class ServiceTime {
 public:
  uint64_t of(uint64_t values) const { return uint64_t(fixed_ns_ + ns_per_value_ * double(values)); }

  void learn(uint64_t ns, uint64_t values) {
    refused_ = 0;
    // Short subrequests say what is fixed, the others what an id costs; stalls say little about either.
    if (values >= kManyValues) {
      ns_per_value_ += (std::min(double(ns) / double(values), 4 * ns_per_value_ + 1) - ns_per_value_) * kGain;
    } else {
      const double fixed = std::max(0.0, double(ns) - ns_per_value_ * double(values));
      fixed_ns_ += (std::min(fixed, 4 * fixed_ns_ + kFirstNs) - fixed_ns_) * kGain;
    }
  }

  // Something was refused because of this estimate. Were it wrong and everything refused, nothing would say so: after some
  // refusals in a row it sinks until something is tried again.
  void doubt() {
    if (++refused_ <= kPatience) return;
    fixed_ns_ *= 1 - kDoubt;
    ns_per_value_ *= 1 - kDoubt;
  }

 private:
  static constexpr uint64_t kManyValues = 256;
  static constexpr uint32_t kPatience = 16;
  static constexpr double kFirstNs = 20'000;  // what a short one takes at most on a machine that is not stalled
  static constexpr double kGain = 0.05, kDoubt = 1.0 / 64;
  uint32_t refused_ = 0;  // since something was answered
  double fixed_ns_ = 0, ns_per_value_ = 10;
};

}  // namespace sidepool
