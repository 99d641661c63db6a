// A subrequest pooled in pieces by several threads: the same as pooled alone, whatever is in it, and nothing is touched once
// it is answered.
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "memory.hpp"
#include "pieces.hpp"
#include "serve.hpp"

using namespace sidepool;

namespace {

constexpr int64_t kRows = 500;

std::mt19937_64 rng(7);
int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

struct Kind {
  int32_t dim;
  OutOfRange policy;
  Pooling pooling;
  bool weighted;
};
constexpr Kind kKinds[] = {
    {16, OutOfRange::error, Pooling::sum, false}, {7, OutOfRange::error, Pooling::mean, true},
    {32, OutOfRange::zero, Pooling::max, false},  {4, OutOfRange::error, Pooling::none, false},
    {64, OutOfRange::hash, Pooling::mean, false}, {1, OutOfRange::error, Pooling::sum, true},
};
constexpr uint32_t kFeatures = std::size(kKinds);

std::shared_ptr<TableSet> make_tables() {
  auto tables = std::make_shared<TableSet>(1, int32_t(kFeatures), int32_t(kFeatures));
  for (uint32_t f = 0; f < kFeatures; ++f) {
    std::vector<float> rows(size_t(kRows * kKinds[f].dim));
    for (float& x : rows) x = float(random_int(-1'000'000, 1'000'000)) / 999'983.0f;
    tables->add_copy(int32_t(f), rows.data(), kRows, kKinds[f].dim, RowFormat::fp32, kKinds[f].policy, 0);
    tables->add_feature(int32_t(f), int32_t(f), kKinds[f].pooling, kKinds[f].weighted);
  }
  tables->seal();
  return tables;
}

// One request frame in memory of exactly its size, so that AddressSanitizer sees a step outside it, or into it once freed.
struct Frame {
  std::unique_ptr<std::byte, void (*)(void*)> memory{nullptr, std::free};
  size_t bytes = 0;
  RequestLayout layout;
  size_t lengths = 0;
  uint64_t batch = 0;
  std::vector<FeatureEntry> entries;

  int32_t* length(size_t i) const { return reinterpret_cast<int32_t*>(memory.get() + layout.lengths) + i; }
  int64_t* value(size_t i) const { return reinterpret_cast<int64_t*>(memory.get() + layout.values) + i; }
};

Frame random_frame() {
  Frame frame;
  frame.batch = uint64_t(random_int(1, 120));
  std::vector<int32_t> lengths;
  uint64_t values = 0, weights = 0;
  for (uint32_t f = 0; f < kFeatures; ++f) {
    FeatureEntry entry;
    entry.feature = f;
    entry.flags = kKinds[f].weighted ? kWeightedEntry : 0;
    if (random_int(0, 2) == 0) entry.fixed_length = int32_t(random_int(0, 12));
    for (uint64_t b = 0; b < frame.batch; ++b) {
      // Mostly short bags, some empty, now and then one that is longer than any piece.
      const int64_t length = entry.fixed_length >= 0 ? entry.fixed_length : random_int(0, random_int(0, 30) == 0 ? 400 : 9);
      if (entry.fixed_length < 0) lengths.push_back(int32_t(length));
      entry.value_count += uint64_t(length);
    }
    values += entry.value_count;
    if (kKinds[f].weighted) weights += entry.value_count;
    frame.entries.push_back(entry);
  }
  frame.lengths = lengths.size();
  frame.layout = request_layout(kFeatures, lengths.size(), values, weights);
  frame.bytes = frame.layout.total;
  frame.memory.reset(static_cast<std::byte*>(std::aligned_alloc(kAlign, frame.bytes)));
  std::memset(frame.memory.get(), 0, frame.bytes);
  RequestHeader header;
  header.frame_bytes = frame.bytes;
  header.epoch = 1;
  header.batch = uint32_t(frame.batch);
  header.feature_count = kFeatures;
  header.value_count = values;
  std::memcpy(frame.memory.get(), &header, sizeof header);
  std::memcpy(frame.memory.get() + frame.layout.entries, frame.entries.data(), kFeatures * sizeof(FeatureEntry));
  if (!lengths.empty()) std::memcpy(frame.length(0), lengths.data(), lengths.size() * sizeof(int32_t));
  for (uint64_t i = 0; i < values; ++i) *frame.value(i) = random_int(0, kRows - 1);
  auto* weight = reinterpret_cast<float*>(frame.memory.get() + frame.layout.weights);
  for (uint64_t i = 0; i < weights; ++i) weight[i] = float(random_int(-100, 100)) / 37.0f;
  return frame;
}

// Up to three things that are wrong, anywhere: which of them is reported is the question.
void spoil(const Frame& frame) {
  size_t values = 0;
  for (const FeatureEntry& entry : frame.entries) values += entry.value_count;
  for (int64_t n = random_int(0, 3); n > 0; --n) {
    const int64_t what = random_int(0, 2);
    if (what == 0 && values > 0) *frame.value(size_t(random_int(0, int64_t(values) - 1))) = random_int(0, 1) ? kRows : -1;
    if (what == 1 && frame.lengths > 0) *frame.length(size_t(random_int(0, int64_t(frame.lengths) - 1))) -= 1;
    if (what == 2 && frame.lengths > 0) *frame.length(size_t(random_int(0, int64_t(frame.lengths) - 1))) += int32_t(random_int(1, 500));
  }
}

struct Steps final : ResponseSink {
  std::vector<std::pair<uint32_t, size_t>> seen;
  void progress(uint32_t done, size_t bytes) override { seen.emplace_back(done, bytes); }
};

struct Answer {
  ResponseHeader header;
  Steps steps;
  std::unique_ptr<std::byte, void (*)(void*)> payload{nullptr, std::free};
  TableCounters counters[kFeatures];

};

size_t payload_bytes(const Frame& frame, const TableSet& tables) {
  size_t bytes = 0;
  for (const FeatureEntry& entry : frame.entries) {
    const Feature& feature = tables.feature(int32_t(entry.feature));
    bytes += block_bytes(entry, feature.pooling, kKinds[entry.feature].dim, frame.batch, OutputFormat::fp32);
  }
  return std::max(bytes, kAlign);
}

void answer(const Frame& frame, const TableSet& tables, Answer& to, Sharing* sharing) {
  ParsedRequest parsed;
  CHECK(parse_request(frame.memory.get(), frame.bytes, parsed) == Status::ok);
  const size_t capacity = payload_bytes(frame, tables);
  to.payload.reset(static_cast<std::byte*>(std::aligned_alloc(kAlign, capacity)));
  to.header = serve(&tables, {&parsed, 1, to.payload.get(), capacity}, to.steps, to.counters, sharing);
}

// Threads at the other seats that take every piece they can get.
struct Helpers {
  Board board{3};
  std::atomic<bool> stop{false};
  std::atomic<uint32_t> awake{0};
  std::atomic<int64_t> pooled{0};
  std::vector<std::thread> threads;

  Helpers() {
    for (size_t seat = 0; seat < 3; ++seat) board.sit(seat, &awake, -1);
    for (const size_t seat : {size_t(1), size_t(2)}) {
      threads.emplace_back([this, seat] {
        while (!stop.load()) {
          Offer* offer = board.enter(seat);
          if (offer == nullptr) {
            std::this_thread::yield();
            continue;
          }
          while (offer->pool_next() != nullptr) pooled.fetch_add(1, std::memory_order_relaxed);
          offer->leave();
        }
      });
    }
  }
  ~Helpers() {
    stop.store(true);
    for (auto& thread : threads) thread.join();
  }
};

void shared_is_the_same_as_alone() {
  const auto tables = make_tables();
  Helpers helpers;
  int refused = 0;
  int rounds = 0;
  for (; rounds < 600 || (helpers.pooled.load() == 0 && rounds < 100'000); ++rounds) {
    const Frame frame = random_frame();
    spoil(frame);
    Answer alone, shared;
    answer(frame, *tables, alone, nullptr);
    Sharing sharing{&helpers.board, 0, 0, random_int(1, 300), 0, 0};
    answer(frame, *tables, shared, &sharing);
    CHECK(shared.header.status == alone.header.status && shared.header.reason == alone.header.reason);
    CHECK(shared.header.fault_feature == alone.header.fault_feature && shared.header.fault_bag == alone.header.fault_bag);
    CHECK(shared.header.fault_value == alone.header.fault_value);
    CHECK(shared.steps.seen == alone.steps.seen);
    for (uint32_t f = 0; f < kFeatures; ++f) {
      TableSums ours{}, wanted{};
      shared.counters[f].add_to(ours);
      alone.counters[f].add_to(wanted);
      CHECK(ours == wanted);
    }
    size_t from = 0;
    for (const auto& [done, end] : alone.steps.seen) {
      const FeatureEntry& entry = frame.entries[done - 1];
      const Kind& kind = kKinds[entry.feature];
      const size_t rows = kind.pooling == Pooling::none ? entry.value_count : frame.batch;
      CHECK(std::memcmp(shared.payload.get() + from, alone.payload.get() + from, rows * size_t(kind.dim) * sizeof(float)) == 0);
      from = end;
    }
    refused += alone.header.status != 0;
  }
  CHECK(refused > 100 && refused < rounds - 100);
  CHECK(helpers.pooled.load() > 0);
}

// A peer may rewrite lengths and ids between their reading for the cut and their reading for pooling.
void changing_lengths_never_lead_outside() {
  const auto tables = make_tables();
  Helpers helpers;
  for (int round = 0; round < 150; ++round) {
    const Frame frame = random_frame();
    if (frame.lengths == 0) continue;
    std::atomic<bool> stop{false};
    std::thread peer([&, seed = uint64_t(round)] {
      std::mt19937_64 own(seed);
      while (!stop.load(std::memory_order_relaxed)) {
        int32_t* length = frame.length(own() % frame.lengths);
        __atomic_store_n(length, int32_t(own() % 3 == 0 ? own() : own() % 40), __ATOMIC_RELAXED);
      }
    });
    for (int i = 0; i < 5; ++i) {
      Answer shared;
      Sharing sharing{&helpers.board, 0, 0, random_int(1, 300), 0, 0};
      answer(frame, *tables, shared, &sharing);
      CHECK(shared.header.status == int32_t(Status::ok) || shared.header.status == int32_t(Status::rejected));
    }
    stop.store(true);
    peer.join();
  }
}

void pieces_are_about_equal_and_cover_everything() {
  PoolTask whole{};
  std::vector<int32_t> lengths;
  int64_t longest = 0;
  for (int bag = 0; bag < 1000; ++bag) {
    lengths.push_back(int32_t(random_int(0, 60)));
    whole.value_count += lengths.back();
    longest = std::max<int64_t>(longest, lengths.back());
  }
  whole.lengths = lengths.data();
  whole.batch = 1000;
  LineVector<PoolTask> tasks;
  LineVector<TaskPart> parts;
  LineVector<Piece> pieces;
  const int64_t wanted = 1500;
  cut(whole, 3, wanted, tasks, parts);
  group(tasks, wanted, pieces);
  int64_t bags = 0, values = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    CHECK(parts[i].first_bag == bags && parts[i].entry == 3 && parts[i].last == (i + 1 == tasks.size()));
    CHECK(tasks[i].value_count >= wanted / 2 && tasks[i].value_count < wanted * 3 / 2 + longest);
    bags += tasks[i].batch;
    values += tasks[i].value_count;
  }
  CHECK(bags == whole.batch && values == whole.value_count);
  CHECK(pieces.size() > 10 && pieces.back().end == tasks.size());
}

}  // namespace

int main() {
  return run_tests({{"pieces are about equal and cover everything", pieces_are_about_equal_and_cover_everything},
                    {"shared is the same as alone", shared_is_the_same_as_alone},
                    {"changing lengths never lead outside", changing_lengths_never_lead_outside}});
}
