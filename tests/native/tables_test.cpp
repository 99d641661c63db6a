// Tables: set up, far rows, promotion and hostile peers while lookups run; hashes and CRC-32C against their definitions.
#include "tables.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "crc32c.hpp"
#include "rows.hpp"

using namespace sidepool;

namespace {

void a_peer_that_rewrites_ids_and_lengths_cannot_cause_a_bad_access() {
  const Rows rows(64, 64, RowFormat::fp32);
  constexpr int64_t count = 256;
  std::vector<int64_t> values(count, 3);
  std::vector<int32_t> lengths(count, 1);
  std::atomic<bool> stop{false};
  std::thread peer([&] {
    uint64_t state = 1;
    while (!stop.load(std::memory_order_relaxed)) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const size_t i = (state >> 33) % count;
      const bool sane = (state >> 60) != 0;
      __atomic_store_n(&values[i], sane ? int64_t(i % 64) : int64_t(state), __ATOMIC_RELAXED);
      __atomic_store_n(&lengths[i], sane ? 1 : int32_t(state >> 20), __ATOMIC_RELAXED);
      if ((state >> 50) % 64 == 0) {
        for (size_t j = 0; j < count; ++j) {
          __atomic_store_n(&values[j], int64_t(j % 64), __ATOMIC_RELAXED);
          __atomic_store_n(&lengths[j], 1, __ATOMIC_RELAXED);
        }
      }
    }
  });
  std::vector<float> out(count * 64 + 64, kCanary);
  int64_t answered = 0;
  int64_t refused = 0;
  for (int round = 0; round < 20000 && (round < 2000 || answered == 0 || refused == 0); ++round) {
    const BagInput input{values.data(), count, lengths.data(), 1, int32_t(count), nullptr};
    PoolCounts counts;
    PoolTask tasks[] = {pool_task(rows.table, kPoolings[round % 4], input, out.data(), 64),
                        pool_task(rows.table, Pooling::sum, input, out.data(), 64)};
    Lookahead ahead(tasks, 2);
    const Fault fault = pool(tasks[0], ahead, counts);
    (fault.status == Status::ok ? answered : refused) += 1;
    expect(counts.rows_read <= count, "hostile peer: rows_read");
  }
  stop.store(true);
  peer.join();
  expect(answered > 0 && refused > 0, "hostile peer: both outcomes occurred");
  for (size_t i = count * 64; i < out.size(); ++i) expect(out[i] == kCanary, "hostile peer: wrote outside");
}

// A file of rows with `lead` bytes in front, gone when the object goes.
struct RowFile {
  char path[64] = "/tmp/sidepool-pooling-test-XXXXXX";
  RowFile(const Rows& rows, size_t lead) {
    const int fd = mkstemp(path);
    const std::vector<char> front(lead, 'x');
    const size_t bytes = size_t(rows.rows) * row_bytes(rows.format, rows.dim);
    const bool written =
        fd >= 0 && write(fd, front.data(), lead) == ssize_t(lead) && write(fd, rows.data(), bytes) == ssize_t(bytes);
    close(fd);
    if (!written) std::abort();
  }
  ~RowFile() { unlink(path); }
};

void promotion_changes_no_answer_while_lookups_run() {
  const Rows rows(20000, 48, RowFormat::fp32);
  const RowFile file(rows, 72);
  TableSet set(7, 3, 3);
  set.add_file(0, file.path, 72, rows.rows, 48, RowFormat::fp32, OutOfRange::error, 0);
  set.add_file(1, file.path, 72, rows.rows / 2, 48, RowFormat::fp32, OutOfRange::error, 0);
  set.add_copy(2, rows.data(), rows.rows, 48, RowFormat::fp32, OutOfRange::error, 0);
  for (int32_t f = 0; f < 3; ++f) set.add_feature(f, f, Pooling::sum, false);
  set.seal();
  const int64_t bytes = rows.rows * 48 * 4;
  expect(set.epoch() == 7 && set.bytes() == bytes * 5 / 2 && set.huge_bytes() == bytes, "bytes before promotion");

  const Bags bags = random_bags(rows.rows / 2, 64, 9);
  std::vector<float> want(64 * 48);
  PoolCounts counts;
  pool_feature(set.table(2), Pooling::sum, bags.input(false), want.data(), 48, counts);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> rounds{0};
  std::atomic<int64_t> differing{0};
  std::thread lookups([&] {
    std::vector<float> out(64 * 48);
    PoolCounts own;
    while (!stop.load(std::memory_order_relaxed)) {
      for (int32_t t = 0; t < 2; ++t) {
        pool_feature(set.table(t), Pooling::sum, bags.input(false), out.data(), 48, own);
        if (out != want) differing.fetch_add(1);
      }
      rounds.fetch_add(1);
    }
  });
  while (rounds.load() < 3) std::this_thread::yield();
  const std::byte* mapped = set.table(0).base.load();
  int64_t promoted = 0;
  while (const int64_t step = set.promote(1)) promoted += step;
  expect(promoted == bytes * 3 / 2, "bytes promoted, step by step");
  const int64_t promoted_at = rounds.load();
  while (rounds.load() < promoted_at + 3) std::this_thread::yield();
  stop.store(true);
  lookups.join();
  expect(differing.load() == 0, "answers while promoting");
  expect(set.table(0).base.load() != mapped, "base was replaced");
  expect(std::memcmp(mapped, rows.data(), size_t(bytes)) == 0, "the old mapping stays readable");
  expect(set.huge_bytes() == set.bytes(), "bytes after promotion");
  expect(uintptr_t(set.table(0).base.load()) % (size_t(2) << 20) == 0, "2 MiB alignment");
  expect(set.promote() == 0, "a second promotion copies nothing");
}

bool refuses(Status status, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.status == status && error.what()[0] != '\0';
  }
  return false;
}

void rows_shared_with_another_set_outlive_it() {
  const Rows rows(20000, 48, RowFormat::fp32);
  const RowFile file(rows, 72);
  const auto open = [&](int32_t tables) {
    auto set = std::make_unique<TableSet>(7, tables, 1);
    for (int32_t t = 0; t < tables; ++t) set->add_file(t, file.path, 72, rows.rows / (t + 1), 48, RowFormat::fp32, OutOfRange::error, 0);
    set->add_feature(0, 0, Pooling::sum, false);
    set->seal();
    return set;
  };
  auto old = open(1);
  const auto next = open(2);
  std::thread promoting([&] { old->promote(); });
  while (!next->share(0, *old, 0)) std::this_thread::yield();
  promoting.join();
  expect(next->table(0).base.load() == old->table(0).base.load(), "one copy of the rows");
  expect(next->huge_bytes() == old->bytes(), "shared bytes count");
  expect(!next->share(0, *old, 0), "what is shared is not shared again");
  old.reset();
  expect(std::memcmp(next->table(0).base.load(), rows.data(), size_t(next->table(0).rows) * 48 * 4) == 0, "rows outlive their first set");
  expect(next->promote() == int64_t(rows.rows / 2) * 48 * 4, "the rest is promoted");
  const auto third = open(2);
  expect(refuses(Status::plan, [&] { third->share(1, *next, 0); }), "rows of another shape");
  expect(refuses(Status::plan, [&] { third->share(2, *next, 0); }), "a table that is not there");
}

void rows_past_2_31_of_tables_past_2_32_elements_are_found() {
  constexpr int64_t count = (int64_t(1) << 31) + 5;
  for (const int32_t dim : {3, 16}) {  // in memory and in registers, at every level
    for (const RowFormat format : kFormats) {
      const std::string what = std::string("far rows, ") + kFormatNames[int(format)] + " dim " + std::to_string(dim);
      const Rows last(1, dim, format);
      const size_t bytes = row_bytes(format, dim);
      const RowFile file(last, 0);  // grows into holes: up to 137 GB, of which the disk holds a few kilobytes
      expect(truncate(file.path, off_t(count * int64_t(bytes))) == 0, what + ": a sparse file");
      const int fd = open(file.path, O_WRONLY | O_CLOEXEC);
      expect(pwrite(fd, last.data(), bytes, off_t((count - 1) * int64_t(bytes))) == ssize_t(bytes), what + ": last row");
      close(fd);
      TableSet set(1, 1, 1);
      set.add_file(0, file.path, 0, count, dim, format, OutOfRange::zero, 0);
      // Alone and in a bag of many, whose rows are fetched ahead: the holes add nothing.
      const Bags bags{{count - 1, count, count / 2, -count, count - 2, count - 1, count - 3, count - 4}, {1, 1, 1, 5}, {}};
      std::vector<float> out(size_t(4 * dim), kCanary);
      PoolCounts counts;
      expect(pool_feature(set.table(0), Pooling::sum, bags.input(false), out.data(), dim, counts).status == Status::ok, what);
      for (int32_t c = 0; c < dim; ++c) {
        const auto want = float(last.at(0, c));
        const float found[] = {out[size_t(c)], out[size_t(dim + c)], out[size_t(2 * dim + c)], out[size_t(3 * dim + c)]};
        expect(found[0] == want && found[1] == 0 && found[2] == 0 && found[3] == want, what + ": values");
      }
      expect(counts.out_of_range == 2 && counts.rows_read == 6, what + ": counts");
    }
  }
}

void set_up_refuses_what_cannot_work() {
  const Rows rows(10, 8, RowFormat::fp32);
  const RowFile file(rows, 0);
  TableSet set(1, 2, 2);
  const auto copy = [&](int32_t t, int64_t n, int32_t dim, int64_t default_row) {
    return [&set, &rows, t, n, dim, default_row] {
      set.add_copy(t, rows.data(), n, dim, RowFormat::fp32, OutOfRange::error, default_row);
    };
  };
  const auto map = [&](const char* path, int64_t offset, int64_t n) {
    return [&set, path, offset, n] { set.add_file(0, path, offset, n, 8, RowFormat::fp32, OutOfRange::error, 0); };
  };
  expect(refuses(Status::plan, copy(2, 10, 8, 0)), "table index");
  expect(refuses(Status::plan, copy(-1, 10, 8, 0)), "negative table index");
  expect(refuses(Status::plan, copy(0, 0, 8, 0)), "no rows");
  expect(refuses(Status::plan, copy(0, 10, 0, 0)), "no columns");
  expect(refuses(Status::plan, copy(0, 1, 4097, 0)), "too many columns");
  expect(refuses(Status::plan, copy(0, 10, 8, 10)), "default_row");
  expect(refuses(Status::shard, map("/nonexistent/rows", 0, 10)), "missing file");
  expect(refuses(Status::shard, map(file.path, 0, 11)), "file too short");
  expect(refuses(Status::shard, map(file.path, 4, 10)), "file too short past the offset");
  expect(refuses(Status::shard, map(file.path, -32, 1)), "negative offset");
  expect(refuses(Status::shard, map(file.path, 0, int64_t(1) << 48)), "far too short");
  map(file.path, 32, 9)();
  expect(refuses(Status::plan, copy(0, 10, 8, 0)), "a table twice");
  expect(refuses(Status::plan, [&] { set.add_feature(2, 0, Pooling::sum, false); }), "feature index");
  expect(refuses(Status::plan, [&] { set.add_feature(0, 2, Pooling::sum, false); }), "feature's table");
  expect(refuses(Status::plan, [&] { set.add_feature(0, 0, Pooling::max, true); }), "weighted max");
  set.add_feature(0, 1, Pooling::sum, false);
  expect(refuses(Status::plan, [&] { set.seal(); }), "seal without the table");
  float out[8];
  PoolCounts counts;
  expect(pool_feature(set.table(1), Pooling::sum, {}, out, 8, counts).status == Status::internal, "no such table");
  copy(1, 10, 8, 9)();
  for (const int64_t padding : {-2, 11}) {
    set.add_feature(0, 1, Pooling::sum, false, padding);
    expect(refuses(Status::plan, [&] { set.seal(); }), "padding index that is neither a row nor their number");
  }
  set.add_feature(0, 1, Pooling::sum, false, 10);
  set.seal();
  expect(set.feature(1).table == -1, "a feature that was not added is not held");
  expect(refuses(Status::plan, [&] { set.add_feature(1, 0, Pooling::sum, false); }), "feature after seal");
  expect(refuses(Status::rejected, [] { parse_pooling("avg"); }), "pooling name");
  expect(refuses(Status::rejected, [] { parse_row_format("fp64"); }), "row format name");
  expect(refuses(Status::rejected, [] { parse_out_of_range(""); }), "policy name");
  expect(parse_pooling("none") == Pooling::none && parse_row_format("fp16") == RowFormat::fp16, "names");
  expect(parse_out_of_range("default_row") == OutOfRange::default_row, "policy names");
  expect(refuses(Status::plan, [] { force_simd_level("sse9"); }), "SIMD level");
}

void the_hash_of_an_id_never_changes() {
  // SplitMix64's published first output for seed 0 is 0xe220a8397b1dcdaf.
  expect(hashed_row(0, std::numeric_limits<int64_t>::max()) ==
             int64_t(0xe220a8397b1dcdafull % uint64_t(std::numeric_limits<int64_t>::max())),
         "hash of 0");
  for (int i = 0; i < 1000; ++i) {
    const auto id = int64_t(rng());
    const int64_t rows = random_int(1, 1000);
    const int64_t row = hashed_row(id, rows);
    expect(row >= 0 && row < rows, "hashed row within the table");
    if (id < 0 || id >= rows) expect(row == row_of(id, rows, OutOfRange::hash, 0), "hashed row");
  }
}

uint32_t crc_bit_by_bit(const unsigned char* p, size_t bytes) {
  uint32_t crc = 0xffffffff;
  for (size_t i = 0; i < bytes; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0x82f63b78 & (0 - (crc & 1)));
  }
  return ~crc;
}

void crc32c_equals_its_definition() {
  expect(crc32c("123456789", 9) == 0xE3069283, "check value");
  expect(crc32c_portable("123456789", 9, 0) == 0xE3069283, "check value, portable");
  expect(crc32c(nullptr, 0) == 0 && crc32c(nullptr, 0, 0xdeadbeef) == 0xdeadbeef, "no bytes");
  std::vector<unsigned char> data(100000);
  for (auto& byte : data) byte = uint8_t(rng());
  for (int i = 0; i < 400; ++i) {
    const auto begin = size_t(random_int(0, 70));
    const auto bytes = size_t(i < 300 ? i * 11 : random_int(0, int64_t(data.size() - begin)));
    const uint32_t want = crc_bit_by_bit(data.data() + begin, bytes);
    expect(crc32c(data.data() + begin, bytes) == want, "crc of " + std::to_string(bytes));
    expect(crc32c_portable(data.data() + begin, bytes, 0) == want, "portable crc of " + std::to_string(bytes));
    if (crc32c_hardware_runs_here()) {
      expect(crc32c_hardware(data.data() + begin, bytes, 0) == want, "hardware crc of " + std::to_string(bytes));
    }
    const auto cut = size_t(random_int(0, int64_t(bytes)));
    const uint32_t first = crc32c(data.data() + begin, cut);
    expect(crc32c(data.data() + begin + cut, bytes - cut, first) == want, "crc continued from a seed");
  }
}

}  // namespace

int main() {
  std::vector<TestCase> tests = {
      {"crc32c_equals_its_definition", crc32c_equals_its_definition},
      {"the_hash_of_an_id_never_changes", the_hash_of_an_id_never_changes},
      {"set_up_refuses_what_cannot_work", set_up_refuses_what_cannot_work},
      {"rows_shared_with_another_set_outlive_it", rows_shared_with_another_set_outlive_it},
  };
  for_every_level(tests, {
      {"rows_past_2_31_of_tables_past_2_32_elements_are_found", rows_past_2_31_of_tables_past_2_32_elements_are_found},
      {"a_peer_that_rewrites_ids_and_lengths_cannot_cause_a_bad_access",
       a_peer_that_rewrites_ids_and_lengths_cannot_cause_a_bad_access},
      {"promotion_changes_no_answer_while_lookups_run", promotion_changes_no_answer_while_lookups_run},
  });
  return run_tests(tests);
}
