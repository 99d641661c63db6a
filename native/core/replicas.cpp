#include "replicas.hpp"

#include <algorithm>

#include "clock.hpp"

namespace sidepool {
namespace {

constexpr int64_t kOne = 1'000'000;
// What may be saved up: a burst of slow answers is hedged, a lasting overload is not doubled.
constexpr int64_t kMostSaved = 10 * kOne;
// Answers before the estimate of the percentile means something.
constexpr int64_t kWarm = 100;

}  // namespace

Replicas::Replicas(size_t sidecars, double hedge_budget) : peers_(new Peer[sidecars]), earned_(int64_t(hedge_budget * double(kOne))) {}

// Stochastic approximation of a quantile: 19 steps up for one answer above it, one down for each below, balance at 95 %.
void Replicas::answered(int32_t sidecar, uint64_t ns) {
  if (earned_ == 0) return;
  Peer& peer = peers_[size_t(sidecar)];
  const int64_t at = peer.p95_ns.load(std::memory_order_relaxed), seen = int64_t(ns);
  const int64_t answers = peer.answers.fetch_add(1, std::memory_order_relaxed);
  // Steps of 1/512 follow a change of load within some hundred answers; while cold, the largest answer stands in.
  const int64_t step = at / 512 + 1;
  peer.p95_ns.store(answers < kWarm ? std::max(at, seen) : seen > at ? at + 19 * step : at - step, std::memory_order_relaxed);
  const int64_t saved = budget_.load(std::memory_order_relaxed);
  if (saved < kMostSaved) budget_.fetch_add(earned_, std::memory_order_relaxed);
}

uint64_t Replicas::hedge_after_ns(int32_t sidecar) const {
  const Peer& peer = peers_[size_t(sidecar)];
  if (earned_ == 0 || peer.answers.load(std::memory_order_relaxed) < kWarm) return 0;
  return uint64_t(std::max<int64_t>(1, peer.p95_ns.load(std::memory_order_relaxed)));
}

bool Replicas::take_hedge() {
  int64_t saved = budget_.load(std::memory_order_relaxed);
  while (saved >= kOne)
    if (budget_.compare_exchange_weak(saved, saved - kOne, std::memory_order_relaxed)) return true;
  return false;
}

uint64_t Replicas::random() {
  // xorshift64* (Vigna 2014), seeded per thread.
  static thread_local uint64_t state = (now_ns() ^ reinterpret_cast<uintptr_t>(&state)) | 1;
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1dull >> 16;
}

}  // namespace sidepool
