// Sidecars and a client of theirs in one process, with tables whose values are known in closed form.
#pragma once
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "client.hpp"
#include "server.hpp"

namespace sidepool {

// tcp with credits on a connection of their own. Windows are as small as they get, so that both ends wait for credit.
inline const std::string kApart = "tcp, credits apart";
constexpr uint64_t kSmallest = 1;

constexpr int kFeatures = 6;
constexpr int64_t kRows = 1000;
constexpr int kDim = 16;

inline std::shared_ptr<TableSet> make_tables(int sidecar, int sidecars) {
  auto tables = std::make_shared<TableSet>(5, kFeatures, kFeatures);
  std::vector<float> rows(kRows * kDim);
  for (int f = 0; f < kFeatures; ++f) {
    if (f % sidecars != sidecar) continue;
    for (int64_t r = 0; r < kRows; ++r)
      for (int d = 0; d < kDim; ++d) rows[size_t(r * kDim + d)] = float(f * 10000 + r);
    tables->add_copy(f, rows.data(), kRows, kDim, RowFormat::fp32, OutOfRange::error, 0);
    tables->add_feature(f, f, Pooling::sum, false);
  }
  tables->seal();
  return tables;
}

inline Routes make_routes(int sidecars) {
  Routes routes;
  routes.sidecars = sidecars;
  for (int f = 0; f < kFeatures; ++f) {
    RoutedFeature feature;
    feature.rows = kRows;
    feature.dim = kDim;
    routes.add_whole(feature, f % sidecars);
  }
  return routes;
}

inline std::string socket_path(int i) { return "/tmp/sidepool-native-test-" + std::to_string(getpid()) + "-" + std::to_string(i); }

inline std::string fresh_token() {
  static std::atomic<uint64_t> next{1};
  std::string token(16, '\0');
  const uint64_t n = next.fetch_add(1);
  std::memcpy(token.data(), &n, sizeof n);
  return token;
}

struct Cluster {
  std::vector<std::unique_ptr<SidecarServer>> servers;
  std::vector<int> ports;
  explicit Cluster(int sidecars, int engines = 1, const std::string& kind = "tcp", Order order = Order::edf) {
    for (int s = 0; s < sidecars; ++s) {
      servers.push_back(std::make_unique<SidecarServer>(engines, 5, 64, 64 << 20, std::vector<std::vector<int>>{}, order));
      servers.back()->publish(make_tables(s, sidecars));
      servers.back()->listen_unix(socket_path(s));
      ports.push_back(servers.back()->listen_tcp("127.0.0.1", 0, {kind == kApart, kSmallest, 0, 192}));
    }
  }
  std::shared_ptr<ClientLane> connect(int s, const std::string& kind, uint32_t slots = 4, uint64_t request = 1 << 16, uint64_t response = 1 << 18) {
    const std::string token = fresh_token();
    servers[size_t(s)]->expect(token, kind == kApart ? "tcp" : kind, {slots, request, response}, 5);
    return kind == "shm" ? connect_shm(socket_path(s), token, 5) : connect_tcp("127.0.0.1", ports[size_t(s)], token, 5, kSmallest);
  }
  void attach(LookupClient& client, const std::string& kind) {
    for (size_t s = 0; s < servers.size(); ++s) client.attach(int32_t(s), connect(int(s), kind));
  }
};

// One thread's lookups, each checked: ids and batch random, values known in closed form.
struct Looker {
  std::mt19937 rng;
  std::vector<int64_t> ids;
  std::vector<float> out;
  explicit Looker(unsigned seed) : rng(seed) {}

  LookupResult look(LookupClient& client, int64_t batch, uint64_t budget_ns = 5'000'000'000, int32_t priority = 0) {
    ids.resize(size_t(batch * kFeatures));
    for (auto& id : ids) id = int64_t(rng() % kRows);
    out.assign(size_t(batch * kFeatures * kDim), -1.f);
    Part part;
    part.values = ids.data();
    part.value_count = int64_t(ids.size());
    part.fixed_batch = batch;
    part.fixed_width = kFeatures;
    LookupCall call;
    call.parts = &part;
    call.part_count = 1;
    call.out = {reinterpret_cast<std::byte*>(out.data()), kFeatures * kDim, nullptr, OutputFormat::fp32};
    call.budget_ns = budget_ns;
    call.priority = priority;
    return client.lookup(call);
  }

  bool right(int64_t batch) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int f = 0; f < kFeatures; ++f)
        for (int d = 0; d < kDim; ++d)
          if (out[size_t((b * kFeatures + f) * kDim + d)] != float(f * 10000 + ids[size_t(b * kFeatures + f)])) return false;
    return true;
  }
};

}  // namespace sidepool
