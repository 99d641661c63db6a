#include "lookup_load.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "clock.hpp"

namespace sidepool {
namespace {

// How long a sleeping caller may fail to notice `stop`.
constexpr uint64_t kSleepNs = 100'000'000;

class LookupLoad final : public Load {
 public:
  explicit LookupLoad(LookupTarget target) : target_(std::move(target)) {
    const Routes& routes = target_.client->routes();
    const size_t features = routes.features.size();
    sequence_values_.resize(size_t(routes.sequences));
    for (const Part& part : target_.requests) {
      const int64_t batch = part.lengths == nullptr ? part.fixed_batch : part.length_count / int64_t(features);
      pooled_values_ = std::max(pooled_values_, size_t(batch * routes.out_columns));
      for (size_t f = 0; f < features; ++f) {
        const RoutedFeature& feature = routes.features[f];
        if (feature.pooling != Pooling::none) continue;
        size_t& values = sequence_values_[size_t(feature.sequence)];
        values = std::max(values, size_t(routes.sequence_rows(part, f) * feature.dim));
      }
    }
  }

  LoadTotals run(const Schedule& schedule, const Outcomes& outcomes, uint64_t drain_ns) override {
    LoadTotals totals;
    totals.start_ns = now_ns() + kLeadNs;
    start_ = totals.start_ns;
    end_ = start_ + uint64_t(schedule.count ? schedule.due_ns[schedule.count - 1] : 0) + drain_ns;
    std::vector<std::thread> others;
    for (int i = 1; i < target_.callers; ++i) others.emplace_back([&] { call(schedule, outcomes); });
    call(schedule, outcomes);
    for (std::thread& thread : others) thread.join();
    totals.most_outstanding = most_busy_.load();
    totals.most_bytes = size_t(target_.callers) * output_bytes();
    return totals;
  }

  void stop() override { stopped_.store(true, std::memory_order_relaxed); }
  std::map<int32_t, std::string> examples() const override { return {}; }

 private:
  size_t output_bytes() const {
    size_t values = pooled_values_;
    for (const size_t n : sequence_values_) values += n;
    return values * sizeof(float);
  }

  // One caller: takes the next request, waits until it is due, asks.
  void call(const Schedule& schedule, const Outcomes& outcomes) {
    prctl(PR_SET_TIMERSLACK, 1);  // wakes when told, not when convenient
    std::vector<float> pooled(pooled_values_);
    std::vector<std::vector<float>> sequences;
    std::vector<std::byte*> rows;
    for (const size_t n : sequence_values_) rows.push_back(reinterpret_cast<std::byte*>(sequences.emplace_back(n).data()));
    LookupCall lookup;
    lookup.part_count = 1;
    lookup.out = {reinterpret_cast<std::byte*>(pooled.data()), target_.client->routes().out_columns, rows.data(), OutputFormat::fp32};
    lookup.priority = target_.priority;
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < schedule.count;) {
      const uint64_t due = start_ + uint64_t(schedule.due_ns[i]);
      wait_until(due);
      const uint64_t sent = now_ns();
      if (stopped_.load(std::memory_order_relaxed) || sent >= end_) {
        outcomes.done(i, int64_t(sent) - int64_t(start_), kNotSent);
        continue;
      }
      outcomes.sent(i, int64_t(sent) - int64_t(start_));
      lookup.parts = &target_.requests[size_t(schedule.request[i])];
      const uint64_t deadline = std::min(due + target_.budget_ns, end_);
      const int32_t status = sent < deadline ? ask(lookup, deadline - sent) : int32_t(Status::deadline);
      outcomes.done(i, int64_t(now_ns()) - int64_t(start_), status);
    }
  }

  int32_t ask(LookupCall& lookup, uint64_t budget_ns) {
    const size_t busy = busy_.fetch_add(1, std::memory_order_relaxed) + 1;
    for (size_t most = most_busy_.load(); most < busy && !most_busy_.compare_exchange_weak(most, busy);) {
    }
    lookup.budget_ns = budget_ns;
    const LookupResult result = target_.client->lookup(lookup);
    busy_.fetch_sub(1, std::memory_order_relaxed);
    return int32_t(result.status != Status::ok ? result.status : result.faults->front().status);
  }

  void wait_until(uint64_t due) const {
    for (;;) {
      const uint64_t now = now_ns();
      if (now >= due || stopped_.load(std::memory_order_relaxed)) return;
      if (due - now <= target_.spin_ns) {
        cpu_pause();
        continue;
      }
      const uint64_t nap = std::min(due - now - target_.spin_ns, kSleepNs);
      const timespec t{time_t(nap / 1'000'000'000), long(nap % 1'000'000'000)};
      clock_nanosleep(CLOCK_MONOTONIC, 0, &t, nullptr);
    }
  }

  const LookupTarget target_;
  size_t pooled_values_ = 0;              // of the largest request
  std::vector<size_t> sequence_values_;  // likewise, per unpooled feature
  uint64_t start_ = 0, end_ = 0;
  std::atomic<size_t> next_{0}, busy_{0}, most_busy_{0};
  std::atomic<bool> stopped_{false};
};

}  // namespace

std::unique_ptr<Load> make_lookup_load(LookupTarget target) { return std::make_unique<LookupLoad>(std::move(target)); }

}  // namespace sidepool
