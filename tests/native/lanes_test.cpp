// Lanes and engines under concurrency and loss: one server, real sockets and shared memory, in one process so that
// the sanitizers see both ends.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <random>
#include <thread>

#include "check.hpp"
#include "client.hpp"
#include "cluster.hpp"
#include "connect.hpp"
#include "server.hpp"

// Counts every heap allocation of the process. Not inlined: the compiler would see free() on what new returned.
static std::atomic<int64_t> allocations{0};
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

using namespace sidepool;

namespace {

// The same tables with their rows cut in the middle: each of two sidecars holds one half, or, with `copies`, both.
std::shared_ptr<TableSet> make_halves(int sidecar, bool copies) {
  auto tables = std::make_shared<TableSet>(5, 2 * kFeatures, kFeatures);
  std::vector<float> rows(kRows / 2 * kDim);
  for (int f = 0; f < kFeatures; ++f) {
    for (int half = 0; half < 2; ++half) {
      if (half != sidecar && !copies) continue;
      for (int64_t r = 0; r < kRows / 2; ++r)
        for (int d = 0; d < kDim; ++d) rows[size_t(r * kDim + d)] = float(f * 10000 + half * kRows / 2 + r);
      tables->add_copy(2 * f + half, rows.data(), kRows / 2, kDim, RowFormat::fp32, OutOfRange::error, 0);
    }
    tables->add_feature(f, 2 * f, Pooling::sum, false, kNoPadding, 2);
  }
  tables->seal();
  return tables;
}

Routes halves(bool copies) {
  Routes routes;
  routes.sidecars = 2;
  for (int f = 0; f < kFeatures; ++f) {
    RoutedFeature feature;
    feature.rows = kRows;
    feature.dim = kDim;
    routes.add_feature(feature);
    for (int half = 0; half < 2; ++half)
      routes.add_leg(0, kDim, half * kRows / 2, uint16_t(half), copies ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{half}, true);
  }
  return routes;
}

void publish_halves(const Cluster& cluster, bool copies) {
  for (size_t s = 0; s < cluster.servers.size(); ++s) cluster.servers[s]->publish(make_halves(int(s), copies));
}

void many_threads_share_a_lane(const std::string& kind) {
  Cluster cluster(2, 2, kind);
  LookupClient client(5, make_routes(2), 5, false);
  cluster.attach(client, kind);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t)  // more threads than slots: credits are waited for
    threads.emplace_back([&, t] {
      Looker looker(t);
      for (int i = 0; i < 300; ++i) {
        // Now and then more than a slot holds, so that it travels in chunks.
        const int64_t batch = i % 37 == 0 ? 1500 : 1 + i % 50;
        if (looker.look(client, batch).status != Status::ok || !looker.right(batch)) wrong.fetch_add(1);
      }
    });
  for (auto& t : threads) t.join();
  CHECK(wrong.load() == 0);
}

void lanes_lost_under_load_fail_cleanly_and_come_back(const std::string& kind) {
  Cluster cluster(2, 1, kind);
  LookupClient client(5, make_routes(2), 5, false);
  cluster.attach(client, kind);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> good{0}, lost{0}, bad{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      Looker looker(t);
      while (!stop.load()) {
        const LookupResult result = looker.look(client, 20);
        if (result.status == Status::ok && looker.right(20)) good.fetch_add(1);
        else if (result.status == Status::transport && result.sidecar >= 0) lost.fetch_add(1), std::this_thread::yield();
        else bad.fetch_add(1);
      }
    });
  for (int round = 0; round < 15; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    client.lane(round % 2)->kill();
    CHECK(client.wait_lane_lost(5) == round % 2);
    client.attach(round % 2, cluster.connect(round % 2, kind));
  }
  stop.store(true);
  for (auto& t : threads) t.join();
  CHECK(good.load() > 0);
  CHECK(bad.load() == 0);
}

void a_closing_sidecar_releases_its_waiters(const std::string& kind) {
  Cluster cluster(1, 1, kind);
  LookupClient client(5, make_routes(1), 5, false);
  cluster.attach(client, kind);
  std::atomic<bool> ended{false};
  std::atomic<int> odd{0};
  std::thread thread([&] {
    Looker looker(1);
    for (;;) {
      const LookupResult result = looker.look(client, 5);
      if (result.status == Status::transport) break;
      if (result.status != Status::ok) odd.fetch_add(1);
    }
    ended.store(true);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  cluster.servers[0]->close();
  thread.join();
  CHECK(ended.load());
  CHECK(odd.load() == 0);
}

// Told to stop at any moment, an engine that is about to sleep must not sleep through it.
void engines_stop_whatever_they_are_about_to_do() {
  std::mt19937 rng(11);
  for (int round = 0; round < 400; ++round) {
    SidecarServer server(2, uint32_t(round % 3) * 10, 8, 1 << 20);
    const uint64_t until = now_ns() + rng() % 60'000;
    while (now_ns() < until) cpu_pause();
    server.close();
  }
}

void draining_refuses_new_lookups() {
  Cluster cluster(1);
  LookupClient client(5, make_routes(1), 5, false);
  cluster.attach(client, "shm");
  Looker looker(1);
  CHECK(looker.look(client, 5).status == Status::ok);
  cluster.servers[0]->drain();
  CHECK(looker.look(client, 5).status == Status::draining);
  // The answer is seen a moment before the engine has counted it off.
  const uint64_t until = now_ns() + 5'000'000'000;
  while (cluster.servers[0]->in_flight() != 0 && now_ns() < until) std::this_thread::yield();
  CHECK(cluster.servers[0]->in_flight() == 0);
}

void another_epoch_is_refused(const std::string& kind) {
  Cluster cluster(1, 1, kind);
  LookupClient client(6, make_routes(1), 5, false);
  cluster.attach(client, kind);
  Looker looker(1);
  const LookupResult result = looker.look(client, 5);
  CHECK(result.status == Status::plan);
  CHECK(result.sidecar == 0);
}

std::shared_ptr<TableSet> make_epoch(int64_t epoch) {
  auto tables = std::make_shared<TableSet>(epoch, kFeatures, kFeatures);
  const std::vector<float> rows(kRows * kDim, float(epoch));
  for (int f = 0; f < kFeatures; ++f) {
    tables->add_copy(f, rows.data(), kRows, kDim, RowFormat::fp32, OutOfRange::error, 0);
    tables->add_feature(f, f, Pooling::sum, false);
  }
  tables->seal();
  return tables;
}

// Lookups of two epochs run while the next ones are published: each is answered from its own tables or refused.
void every_lookup_is_answered_under_its_own_epoch(const std::string& kind) {
  Cluster cluster(1, 2);
  cluster.servers[0]->publish(make_epoch(5));
  std::atomic<int64_t> good{0}, refused{0}, wrong{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int64_t epoch : {5, 6, 7})
    threads.emplace_back([&, epoch] {
      LookupClient client(epoch, make_routes(1), 5, false);
      client.attach(0, cluster.connect(0, kind));
      Looker looker{unsigned(epoch)};
      for (int i = 0; !stop.load(); ++i) {
        const LookupResult result = looker.look(client, i % 8 == 0 ? 400 : 3);
        const bool right = std::all_of(looker.out.begin(), looker.out.end(), [epoch](float x) { return x == float(epoch); });
        (result.status == Status::plan ? refused : result.status == Status::ok && right ? good : wrong).fetch_add(1);
      }
    });
  for (int64_t epoch = 6; epoch < 8; ++epoch) {
    const int64_t before = good.load();
    const uint64_t until = now_ns() + 10'000'000'000;
    while (good.load() < before + 50 && now_ns() < until) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    cluster.servers[0]->publish(make_epoch(epoch));
  }
  cluster.servers[0]->retire_previous();
  for (const uint64_t until = now_ns() + 10'000'000'000; refused.load() == 0 && now_ns() < until;)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  stop.store(true);
  for (auto& t : threads) t.join();
  CHECK(good.load() >= 100);
  CHECK(refused.load() > 0);
  CHECK(wrong.load() == 0);
  LookupClient late(6, make_routes(1), 5, false);
  late.attach(0, cluster.connect(0, kind));
  CHECK(Looker(1).look(late, 3).status == Status::plan);
}

void lost_sidecars_degrade_to_zeros_where_asked() {
  Cluster cluster(2);
  LookupClient client(5, make_routes(2), 5, true);
  cluster.attach(client, "shm");
  client.lane(1)->kill();
  Looker looker(1);
  const LookupResult result = looker.look(client, 4);
  CHECK(result.status == Status::ok);
  CHECK((*result.sidecars)[1].degraded && !(*result.sidecars)[0].degraded);
  CHECK(looker.out[0] == float(looker.ids[0]));
  CHECK(looker.out[kDim] == 0.f);
}

void steady_state_allocates_nothing(const std::string& kind) {
  Cluster cluster(2, 2, kind);
  LookupClient client(5, make_routes(2), 5, false, {.window_delay_ns = 1'000'000, .max_ids = 1 << 20});
  for (int s : {0, 1}) client.attach(s, cluster.connect(s, kind, 4, 1 << 18, 2 << 20));
  Looker looker(1);
  for (int i = 0; i < 50; ++i) CHECK(looker.look(client, i % 10 == 0 ? 4000 : 64).status == Status::ok);
  // An engine that helps for the first time takes the tables over then, whenever that is: it spoils one round, not each.
  int64_t allocated = 1;
  for (int round = 0; round < 5 && allocated > 0; ++round) {
    const int64_t before = allocations.load();
    for (int i = 0; i < 500; ++i) CHECK(looker.look(client, i % 50 == 0 ? 4000 : 1 + i % 64).status == Status::ok);
    allocated = allocations.load() - before;
  }
  CHECK(allocated == 0);
}

void cut_tables_allocate_nothing_either(const std::string& kind) {
  Cluster cluster(2, 2);
  publish_halves(cluster, true);
  LookupClient client(5, halves(true), 5, false, {.hedge_budget = 0.05});
  for (int s : {0, 1}) client.attach(s, cluster.connect(s, kind, 4, 1 << 18, 2 << 20));
  Looker looker(1);
  const auto look = [&](int64_t batch) { return looker.look(client, batch).status == Status::ok && looker.right(batch); };
  // Either replica may be asked, alone or with the other: every vector must have met its largest lookup.
  for (int i = 0; i < 200; ++i) CHECK(look(i % 10 == 0 ? 4000 : 64));
  int64_t allocated = 1;
  for (int round = 0; round < 5 && allocated > 0; ++round) {
    const int64_t before = allocations.load();
    for (int i = 0; i < 500; ++i) CHECK(look(i % 50 == 0 ? 4000 : 1 + i % 64));
    allocated = allocations.load() - before;
  }
  CHECK(allocated == 0);
}

// Whatever dies while lookups run, the other replica answers: none fails, none is wrong.
void replicas_take_over_from_lost_lanes(const std::string& kind) {
  Cluster cluster(2);
  publish_halves(cluster, true);
  LookupClient client(5, halves(true), 5, false, {.hedge_budget = 0.05});
  // Fewer slots than threads: whoever takes over has to wait for what others hold, who may be waiting too.
  const auto connect = [&](int s) { return cluster.connect(s, kind, 2); };
  for (const int s : {0, 1}) client.attach(s, connect(s));
  std::atomic<bool> stop{false};
  std::atomic<int64_t> bad{0};
  std::array<std::atomic<int64_t>, 3> looked{};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      Looker looker(t);
      for (int i = 0; !stop.load(); ++i) {
        const int64_t batch = i % 4 == 0 ? 3000 : 20;
        const LookupResult result = looker.look(client, batch);
        if (result.status != Status::ok || !looker.right(batch)) {
          bad.fetch_add(1);
          std::printf("thread %u, %ld samples: status %d\n", t, long(batch), int(result.status));
        }
        looked[t].fetch_add(1);
      }
    });
  for (int round = 0; round < 15; ++round) {
    // No lookup may meet two deaths: there are two replicas.
    for (auto& count : looked) {
      const int64_t before = count.load();
      const uint64_t until = now_ns() + 10'000'000'000;
      while (count.load() < before + 3 && now_ns() < until) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      CHECK(count.load() >= before + 3);
    }
    client.lane(round % 2)->kill();
    CHECK(client.wait_lane_lost(5) == round % 2);
    client.attach(round % 2, connect(round % 2));
  }
  stop.store(true);
  for (auto& t : threads) t.join();
  CHECK(bad.load() == 0);
  for (int s : {0, 1}) CHECK(client.in_flight_bytes(s) == 0);
}

int64_t helped(const Cluster& cluster) {
  int64_t pieces = 0;
  for (const auto& engine : cluster.servers[0]->engines()) pieces += engine->counters().helped.get();
  return pieces;
}

// Large lookups are pooled by all engines together while lanes come and go under them, and their owners are stopped.
void engines_share_large_lookups(const std::string& kind) {
  Cluster cluster(1, 3, kind);
  const auto connect = [&] { return cluster.connect(0, kind, 4, 1 << 18, 2 << 20); };
  std::atomic<int> wrong{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 2; ++t)
    threads.emplace_back([&, t] {
      Looker looker(t);
      LookupClient client(5, make_routes(1), 5, false);
      client.attach(0, connect());
      for (int i = 0; !stop.load(); ++i) {
        const int64_t batch = i % 4 == 3 ? 5 : 4000;
        const LookupResult result = looker.look(client, batch);
        if (result.status == Status::ok ? !looker.right(batch) : !stop.load()) wrong.fetch_add(1);
        if (i % 8 == 7) {
          // The lane dies in the middle of a large lookup.
          std::thread killer([&] { client.lane(0)->kill(); });
          looker.look(client, 4000);
          killer.join();
          if (!stop.load()) client.attach(0, connect());
        }
      }
    });
  const uint64_t until = now_ns() + 20'000'000'000;
  while (helped(cluster) < 200 && now_ns() < until) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(helped(cluster) >= 200);
  stop.store(true);
  for (auto& t : threads) t.join();
  CHECK(wrong.load() == 0);
}

}  // namespace

int main() {
  std::vector<TestCase> tests;
  for (const std::string& kind : {std::string("shm"), std::string("tcp"), kApart}) {
    tests.push_back({kind + ": many threads share a lane", [kind] { many_threads_share_a_lane(kind); }});
    tests.push_back({kind + ": lanes lost under load fail cleanly and come back", [kind] { lanes_lost_under_load_fail_cleanly_and_come_back(kind); }});
    tests.push_back({kind + ": a closing sidecar releases its waiters", [kind] { a_closing_sidecar_releases_its_waiters(kind); }});
    tests.push_back({kind + ": engines share large lookups", [kind] { engines_share_large_lookups(kind); }});
    tests.push_back({kind + ": another epoch is refused", [kind] { another_epoch_is_refused(kind); }});
    tests.push_back({kind + ": steady state allocates nothing", [kind] { steady_state_allocates_nothing(kind); }});
    tests.push_back({kind + ": cut tables allocate nothing either", [kind] { cut_tables_allocate_nothing_either(kind); }});
    tests.push_back({kind + ": every lookup is answered under its own epoch", [kind] { every_lookup_is_answered_under_its_own_epoch(kind); }});
    tests.push_back({kind + ": replicas take over from lost lanes", [kind] { replicas_take_over_from_lost_lanes(kind); }});
  }
  tests.push_back({"engines stop whatever they are about to do", engines_stop_whatever_they_are_about_to_do});
  tests.push_back({"draining refuses new lookups", draining_refuses_new_lookups});
  tests.push_back({"lost sidecars degrade to zeros where asked", lost_sidecars_degrade_to_zeros_where_asked});
  return run_tests(tests);
}
