// The rdma lane under the sanitizers, and what its steady state must not do. Needs a device: tests/rdma/test_native.py runs it
// in the guest; elsewhere it says that it is skipped (exit status 77).
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "check.hpp"
#include "client.hpp"
#include "clock.hpp"
#include "server.hpp"
#include "verbs.hpp"

// Counts every heap allocation and every mutex taken in the process. Not inlined: the compiler would see free() on what new returned.
static std::atomic<int64_t> allocations{0}, locks{0};
__attribute__((noinline)) void* operator new(size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(n)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void* operator new(size_t n, std::align_val_t alignment) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::aligned_alloc(size_t(alignment), (n + size_t(alignment) - 1) / size_t(alignment) * size_t(alignment))) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

#ifndef __SANITIZE_THREAD__  // which has its own
extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) {
  static const auto real = reinterpret_cast<int (*)(pthread_mutex_t*)>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
  locks.fetch_add(1, std::memory_order_relaxed);
  return real(mutex);
}
#endif

using namespace sidepool;

namespace {

constexpr int64_t kRows = 1000;
constexpr int kDim = 16;
constexpr LaneLimits kLimits{4, 1 << 16, 1 << 18};

RdmaOptions options(const std::string& device) {
  RdmaOptions o;
  o.device = device;
  o.piece_bytes = 16 << 10;
  o.peer_timeout_s = 60;
  return o;
}

struct Pair {
  SidecarServer server;
  LookupClient client;

  explicit Pair(int engines) : server(engines, 5, 64, 1 << 20), client(5, routes(), 20, false) {
    std::vector<float> rows(kRows * kDim);
    for (int64_t r = 0; r < kRows; ++r)
      for (int d = 0; d < kDim; ++d) rows[size_t(r * kDim + d)] = float(r);
    auto tables = std::make_shared<TableSet>(5, 1, 1);
    tables->add_copy(0, rows.data(), kRows, kDim, RowFormat::fp32, OutOfRange::error, 0);
    tables->add_feature(0, 0, Pooling::sum, false);
    tables->seal();
    server.publish(tables);
    server.listen_rdma(options("rxeB"));
    const auto offer = client.rdma(options("rxeA"), 1)->prepare(kLimits);
    client.attach(0, offer->connect(server.connect_rdma(kLimits, offer->end())));
  }
  ~Pair() {
    client.close();
    server.close();
  }

  static Routes routes() {
    Routes routes;
    RoutedFeature feature;
    feature.rows = kRows;
    feature.dim = kDim;
    routes.add_whole(feature, 0);
    return routes;
  }
};

// One thread's lookups, each checked.
struct Looker {
  std::mt19937 rng;
  std::vector<int64_t> ids;
  std::vector<float> out;
  explicit Looker(unsigned seed) : rng(seed), ids(1024), out(1024 * kDim) {}

  bool look(LookupClient& client, int64_t batch) {
    for (int64_t b = 0; b < batch; ++b) ids[size_t(b)] = int64_t(rng() % kRows);
    Part part;
    part.values = ids.data();
    part.value_count = part.fixed_batch = batch;
    part.fixed_width = 1;
    LookupCall call;
    call.parts = &part;
    call.part_count = 1;
    call.out = {reinterpret_cast<std::byte*>(out.data()), kDim, nullptr, OutputFormat::fp32};
    call.budget_ns = 60'000'000'000;
    if (client.lookup(call).status != Status::ok) return false;
    for (int64_t b = 0; b < batch; ++b)
      for (int d = 0; d < kDim; ++d)
        if (out[size_t(b * kDim + d)] != float(ids[size_t(b)])) return false;
    return true;
  }
};

void many_threads_share_a_lane_that_moves() {
  Pair pair(3);
  std::atomic<int> wrong{0}, running{4};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Looker looker(t);
      for (int i = 0; i < 80; ++i) wrong += !looker.look(pair.client, 1 + (i * 37) % 1000);
      --running;
    });
  for (size_t target = 1; running > 0; ++target) {
    for (const LaneStats& lane : pair.server.lane_stats()) {
      if (lane.id == 0) continue;
      try {
        pair.server.migrate(lane.id, target % 3);
      } catch (const Error&) {  // between two engines at this moment
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
  int64_t moved = 0;
  for (const auto& engine : pair.server.engines()) moved += engine->counters().moved.get();
  CHECK(moved > 0);
}

void lanes_come_and_go_under_load() {
  Pair pair(2);
  for (int i = 0; i < 4; ++i) {
    std::atomic<bool> stop{false};
    std::thread caller([&] {
      Looker looker{unsigned(i)};
      while (!stop) looker.look(pair.client, 50);
    });
    // Replaces a live lane: what is under way on it fails, the rest goes on.
    const auto offer = pair.client.rdma(options("rxeA"), 1)->prepare(kLimits);
    pair.client.attach(0, offer->connect(pair.server.connect_rdma(kLimits, offer->end())));
    stop = true;
    caller.join();
    Looker looker(9);
    CHECK(looker.look(pair.client, 300));
  }
}

void steady_state_allocates_nothing_and_takes_no_lock() {
  Pair pair(1);
  Looker looker(1);
  for (int i = 0; i < 200; ++i) CHECK(looker.look(pair.client, 1 + i % 500));
  const int64_t allocated = allocations;
  [[maybe_unused]] const int64_t locked = locks;
  constexpr int kLookups = 1000;
  for (int i = 0; i < kLookups; ++i) CHECK(looker.look(pair.client, 1 + i % 500));
  CHECK(allocations == allocated);
#ifndef __SANITIZE_THREAD__
  // The provider's own, at most: one per thousand events acknowledged, at either end.
  CHECK(locks - locked <= 2 * kLookups / 1024 + 2);
#endif
}

#ifdef SIDEPOOL_VERBS
// Rankers and operators are told why a lane ended: no two ends sound the same, and none like a success.
void every_completion_status_has_a_meaning_of_its_own() {
  std::set<std::string> meanings;
  for (int status = IBV_WC_SUCCESS; status <= IBV_WC_GENERAL_ERR; ++status) {
    const auto s = ibv_wc_status(status);
    // Of end-to-end contexts, reliable datagrams and memory windows, which are not used here.
    if (s == IBV_WC_MW_BIND_ERR || s == IBV_WC_LOC_EEC_OP_ERR || s == IBV_WC_LOC_RDD_VIOL_ERR || s == IBV_WC_REM_INV_RD_REQ_ERR ||
        s == IBV_WC_INV_EECN_ERR || s == IBV_WC_INV_EEC_STATE_ERR)
      continue;
    CHECK(meanings.insert(meaning(s)).second);
  }
  CHECK(meanings.size() == size_t(IBV_WC_GENERAL_ERR) + 1 - 6);
}
#else
void every_completion_status_has_a_meaning_of_its_own() {}
#endif

}  // namespace

int main() {
  try {
    make_rdma_server(options("rxeB"));
  } catch (const Error& e) {
    std::printf("skipped: %s\n", e.what());
    return 77;
  }
  return run_tests({{"many threads share a lane that moves", many_threads_share_a_lane_that_moves},
                    {"lanes come and go under load", lanes_come_and_go_under_load},
                    {"every completion status has a meaning of its own", every_completion_status_has_a_meaning_of_its_own},
                    {"steady state allocates nothing and takes no lock", steady_state_allocates_nothing_and_takes_no_lock}});
}
