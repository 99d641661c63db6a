// Frames: what is encoded is parsed back; whatever else arrives is refused without a read out of bounds.
//
// FRAME_FUZZ_CASES sets the number of mutated frames (default 200,000; the first full run used 2,000,000).
#include <cstdlib>
#include <memory>
#include <random>

#include "check.hpp"
#include "frames.hpp"
#include "router.hpp"
#include "serve.hpp"

using namespace sidepool;

namespace {

std::mt19937_64 rng(7);
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

// A frame in memory that ends exactly where the frame ends, so that the address sanitizer sees every step too far.
struct Bytes {
  std::unique_ptr<std::byte[]> memory;
  std::byte* data = nullptr;
  size_t size = 0;
  explicit Bytes(size_t n) : memory(new std::byte[n + kAlign]), size(n) {
    // Allocations are 16-byte aligned: place the frame at the end, 64-byte aligned, by over-allocating exactly.
    const size_t misfit = reinterpret_cast<uintptr_t>(memory.get()) % kAlign;
    const size_t shift = misfit == 0 ? 0 : kAlign - misfit;
    memory.reset(new std::byte[n + shift]);
    data = memory.get();
  }
  std::vector<std::byte> copy() const { return {data, data + size}; }
};

Routes some_routes(int features) {
  Routes routes;
  for (int f = 0; f < features; ++f) {
    RoutedFeature feature;
    feature.rows = 50 + f;
    feature.dim = 4 * (1 + f % 3);
    feature.pooling = Pooling(f % 3);
    feature.weighted = f % 4 == 0;
    routes.add_whole(feature, 0);
  }
  return routes;
}

std::unique_ptr<TableSet> some_tables(const Routes& routes) {
  auto tables = std::make_unique<TableSet>(3, int32_t(routes.features.size()), int32_t(routes.features.size()));
  for (size_t f = 0; f < routes.features.size(); ++f) {
    const RoutedFeature& feature = routes.features[f];
    std::vector<float> rows(size_t(feature.rows * feature.dim));
    for (float& x : rows) x = float(pick(-100, 100));
    tables->add_copy(int32_t(f), rows.data(), feature.rows, feature.dim, RowFormat::fp32, OutOfRange::error, 0);
    tables->add_feature(int32_t(f), int32_t(f), feature.pooling, feature.weighted);
  }
  tables->seal();
  return tables;
}

// A valid request of random shape, jagged or fixed.
std::vector<std::byte> some_request(const Routes& routes, bool jagged) {
  const int64_t batch = pick(1, 5), features = int64_t(routes.features.size());
  std::vector<int32_t> lengths;
  std::vector<int64_t> values;
  std::vector<float> weights;
  for (int64_t f = 0; f < features; ++f)
    for (int64_t b = 0; b < batch; ++b) {
      lengths.push_back(jagged ? int32_t(pick(0, 4)) : 1);
      for (int32_t k = 0; k < lengths.back(); ++k) {
        values.push_back(pick(0, routes.features[size_t(f)].rows - 1));
        weights.push_back(float(pick(0, 8)) / 4);
      }
    }
  if (!jagged) {
    values.assign(size_t(batch * features), 0);
    for (auto& v : values) v = pick(0, 49);
  }
  const std::vector<int32_t> narrow(values.begin(), values.end());
  Part part;
  part.int32_values = pick(0, 1) == 1;
  part.values = part.int32_values ? static_cast<const void*>(narrow.data()) : values.data();
  part.value_count = int64_t(values.size());
  part.weights = weights.data();
  part.weight_count = part.value_count;
  if (jagged) {
    part.lengths = lengths.data();
    part.length_count = int64_t(lengths.size());
  } else {
    part.fixed_batch = batch;
    part.fixed_width = features;
  }
  RoutedLookup routed;
  std::vector<Fault> faults;
  routed.admit(routes, &part, 1, faults);
  CHECK(faults[0].status == Status::ok);
  routed.assign({0});
  routed.plan({SlotBudget{1 << 20, 1 << 20}}, OutputFormat::fp32, faults);
  CHECK(routed.chunk_count() == 1);
  Asked asked;
  routed.measure(0, routed.legs_of(0), asked);
  Bytes frame(asked.layout.total);
  std::memset(frame.data, 0, frame.size);
  routed.encode(0, asked, frame.data);
  RequestHeader header;
  header.frame_bytes = asked.layout.total;
  header.lookup_id = 1;
  header.epoch = 3;
  header.budget_ns = 1'000'000'000;
  header.batch = uint32_t(batch);
  header.feature_count = uint32_t(features);
  header.value_count = asked.values;
  header.output_format = OutputFormat(pick(0, 2));
  std::memcpy(frame.data, &header, sizeof header);
  return frame.copy();
}

struct NoSink final : ResponseSink {
  void progress(uint32_t, size_t) override {}
};

// Parse and, if it parses, serve: everything a hostile frame can reach.
Status swallow(const std::vector<std::byte>& bytes, const TableSet& tables) {
  Bytes frame(bytes.size());
  if (!bytes.empty()) std::memcpy(frame.data, bytes.data(), bytes.size());
  ParsedRequest request;
  const Status parsed = parse_request(frame.data, frame.size, request);
  if (parsed != Status::ok) return parsed;
  constexpr size_t kCapacity = 1 << 16;
  alignas(64) static std::byte payload[kCapacity];
  NoSink sink;
  const ResponseHeader header = serve(&tables, {&request, 0, payload, kCapacity}, sink, nullptr);
  return Status(header.status);
}

void encoded_requests_parse_back() {
  const Routes routes = some_routes(7);
  const auto tables = some_tables(routes);
  for (int i = 0; i < 200; ++i) CHECK(swallow(some_request(routes, i % 2 == 0), *tables) == Status::ok);
}

void mutated_requests_are_refused_or_served_within_bounds() {
  const char* wanted = std::getenv("FRAME_FUZZ_CASES");
  const int64_t cases = wanted != nullptr ? std::atoll(wanted) : 200'000;
  const Routes routes = some_routes(5);
  const auto tables = some_tables(routes);
  std::vector<std::vector<std::byte>> seeds;
  for (int i = 0; i < 16; ++i) seeds.push_back(some_request(routes, i % 2 == 0));
  int64_t refused = 0;
  for (int64_t i = 0; i < cases; ++i) {
    std::vector<std::byte> bytes = seeds[size_t(pick(0, 15))];
    const int64_t mutations = pick(1, 4);
    for (int64_t m = 0; m < mutations; ++m) {
      // Mostly 4- and 8-byte fields with boundary values, where lengths and counts live; sometimes any byte.
      static const uint64_t edges[] = {0, 1, 2, 0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32, 1ull << 61, 1ull << 63, ~0ull};
      const size_t at = size_t(pick(0, int64_t(bytes.size()) - 8)) & ~size_t(3);
      const uint64_t edge = pick(0, 3) != 0 ? edges[pick(0, 9)] : rng();
      const int64_t how = pick(0, 9);
      if (how < 4) std::memcpy(&bytes[at], &edge, 4);
      else if (how < 7) std::memcpy(&bytes[at], &edge, 8);
      else if (how < 9) bytes[size_t(pick(0, int64_t(bytes.size()) - 1))] ^= std::byte(1 << pick(0, 7));
      else bytes.resize(size_t(pick(8, int64_t(bytes.size()))));
      if (bytes.size() < 16) break;
    }
    refused += swallow(bytes, *tables) != Status::ok;
  }
  std::printf("  %lld of %lld mutated frames were refused\n", static_cast<long long>(refused), static_cast<long long>(cases));
  CHECK(refused > cases / 10);  // a harness that mutates nothing would refuse nothing
}

void random_bytes_are_refused() {
  const Routes routes = some_routes(3);
  const auto tables = some_tables(routes);
  for (int i = 0; i < 20'000; ++i) {
    std::vector<std::byte> bytes(size_t(pick(0, 400)));
    for (auto& b : bytes) b = std::byte(rng());
    CHECK(swallow(bytes, *tables) == Status::frame);
  }
}

void response_headers_beyond_the_request_are_refused() {
  ResponseHeader good;
  good.frame_bytes = sizeof good;
  good.count = 3;
  CHECK(check_response_header(good, 3) == Status::ok);
  for (int i = 0; i < 7; ++i) {
    ResponseHeader bad = good;
    if (i == 0) bad.magic ^= 1;
    if (i == 1) bad.version += 1;
    if (i == 2) bad.count = 4;
    if (i == 3) bad.first = 4;
    if (i == 4) bad.first = 0xffffffff;
    if (i == 5) bad.status = 99;
    if (i == 6) bad.frame_bytes = 5;
    CHECK(check_response_header(bad, 3) == Status::frame);
  }
}

}  // namespace

int main() {
  return run_tests({
      {"encoded requests parse back", encoded_requests_parse_back},
      {"random bytes are refused", random_bytes_are_refused},
      {"response headers beyond the request are refused", response_headers_beyond_the_request_are_refused},
      {"mutated requests are refused or served within bounds", mutated_requests_are_refused_or_served_within_bounds},
  });
}
