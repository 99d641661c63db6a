// Pooling, tables and CRC-32C against naive definitions, at every SIMD level of this machine.
#include "pooling.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "crc32c.hpp"
#include "tables.hpp"

using namespace sidepool;

namespace {

int failures = 0;
std::mt19937_64 rng(20240607);

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
float random_float() { return std::uniform_real_distribution<float>(-2.0f, 2.0f)(rng); }

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// binary16 → double by the definition in IEEE 754.
double half_value(uint16_t half) {
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  if (exponent == 31) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

// A table's rows in plain memory, at an address `misalignment` bytes past a cache line, ending where the memory ends:
// AddressSanitizer sees a read past the last row.
struct Rows {
  int64_t rows;
  int32_t dim;
  RowFormat format;
  size_t misalignment;
  std::unique_ptr<std::byte[]> memory;
  Table table;

  Rows(int64_t rows_, int32_t dim_, RowFormat format_, size_t misalignment_ = 0)
      : rows(rows_), dim(dim_), format(format_), misalignment(misalignment_) {
    memory.reset(new std::byte[misalignment + size_t(rows) * row_bytes(format, dim)]);
    for (int64_t row = 0; row < rows; ++row) fill(row);
    table.base.store(data());
    table.rows = rows;
    table.dim = dim;
    table.format = format;
  }

  std::byte* data() const { return memory.get() + misalignment; }

  std::byte* at_row(int64_t row) const { return data() + size_t(row) * row_bytes(format, dim); }

  // Any bits are a row of int8 or int4; scale and bias are such that scale · q + bias is exact in fp32.
  void fill(int64_t row) const {
    std::byte* const bytes = at_row(row);
    if (format == RowFormat::fp32) {
      for (int32_t c = 0; c < dim; ++c) write(bytes + c * 4, random_float());
    } else if (format == RowFormat::fp16) {
      // Finite halves of every kind, subnormals and both zeros among them.
      for (int32_t c = 0; c < dim; ++c) {
        write(bytes + c * 2, uint16_t((random_int(0, 1) << 15) | random_int(0, 16 * 1024 + 1023)));
      }
    } else if (format == RowFormat::bf16) {
      for (int32_t c = 0; c < dim; ++c) {
        write(bytes + c * 2, uint16_t((random_int(0, 1) << 15) | random_int(60 << 7, 130 << 7)));
      }
    } else {
      const size_t codes = format == RowFormat::int8 ? size_t(dim) : size_t(dim + 1) / 2;
      for (size_t i = 0; i < codes; ++i) bytes[i] = std::byte(random_int(0, 255));
      const auto scale = int(random_int(1, 15)), bias = int(random_int(-100, 100));
      if (format == RowFormat::int8) {
        write(bytes + codes, float(scale) / 64);
        write(bytes + codes + 4, float(bias) / 64);
      } else {
        write(bytes + codes, half_of_64ths(scale));
        write(bytes + codes + 2, half_of_64ths(bias));
      }
    }
  }

  double at(int64_t row, int32_t column) const {
    const std::byte* const bytes = at_row(row);
    switch (format) {
      case RowFormat::fp32:
        return double(read<float>(bytes + column * 4));
      case RowFormat::fp16:
        return half_value(read<uint16_t>(bytes + column * 2));
      case RowFormat::bf16: {
        const int code = read<uint16_t>(bytes + column * 2);
        return ((code & 0x8000) != 0 ? -1 : 1) * std::ldexp(128 + (code & 127), ((code >> 7) & 255) - 127 - 7);
      }
      case RowFormat::int8:
        return double(read<float>(bytes + dim)) * int(bytes[column]) + double(read<float>(bytes + dim + 4));
      case RowFormat::int4: {
        const std::byte* const tail = bytes + (dim + 1) / 2;
        const int pair = int(bytes[column / 2]);
        const int code = column % 2 == 0 ? pair % 16 : pair / 16;
        return half_value(read<uint16_t>(tail)) * code + half_value(read<uint16_t>(tail + 2));
      }
    }
    std::abort();
  }

  template <class T>
  static T read(const std::byte* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  template <class T>
  static void write(std::byte* to, T x) {
    std::memcpy(to, &x, sizeof x);
  }
  // The half that is n / 64, for |n| < 1024.
  static uint16_t half_of_64ths(int n) {
    if (n == 0) return 0;
    const int magnitude = std::abs(n);
    const int exponent = std::ilogb(magnitude);
    return uint16_t((n < 0 ? 0x8000 : 0) | (exponent - 6 + 15) << 10 | ((magnitude << (10 - exponent)) & 1023));
  }
};

const RowFormat kFormats[] = {RowFormat::fp32, RowFormat::fp16, RowFormat::bf16, RowFormat::int8, RowFormat::int4};
const char* const kFormatNames[] = {"fp32", "fp16", "bf16", "int8", "int4"};

RowFormat random_format() { return kFormats[random_int(0, 4)]; }

struct Bags {
  std::vector<int64_t> values;
  std::vector<int32_t> lengths;
  std::vector<float> weights;

  BagInput input(bool weighted) const {
    return {values.data(),           int64_t(values.size()),
            lengths.data(),          1,
            int32_t(lengths.size()), weighted ? weights.data() : nullptr};
  }
};

Bags random_bags(int64_t rows, int32_t batch, int32_t max_length) {
  Bags bags;
  for (int32_t b = 0; b < batch; ++b) {
    bags.lengths.push_back(int32_t(random_int(0, max_length)));
    for (int32_t i = 0; i < bags.lengths.back(); ++i) {
      const int64_t kind = random_int(0, 9);
      bags.values.push_back(kind == 0 ? 0 : kind == 1 ? rows - 1 : random_int(0, rows - 1));
      bags.weights.push_back(random_float());
    }
  }
  return bags;
}

// The row an id reads, -1 for none. `hash` is written out again, not called.
int64_t row_of(int64_t id, int64_t rows, OutOfRange policy, int64_t default_row) {
  if (id >= 0 && id < rows) return id;
  if (policy == OutOfRange::default_row) return default_row;
  if (policy != OutOfRange::hash) return -1;
  unsigned __int128 wide = uint64_t(id);
  wide = uint64_t(wide + 0x9E3779B97F4A7C15ull);
  uint64_t z = uint64_t(wide);
  z ^= z >> 30;
  z *= 0xBF58476D1CE4E5B9ull;
  z ^= z >> 27;
  z *= 0x94D049BB133111EBull;
  z ^= z >> 31;
  return int64_t(z % uint64_t(rows));
}

struct Expected {
  std::vector<double> values;      // [rows of output, dim]
  std::vector<double> magnitudes;  // Σ |w·row|: what rounding errors are relative to
};

Expected naive(const Rows& rows, Pooling pooling, const Bags& bags, bool weighted, int64_t padding = kNoPadding) {
  const size_t out_rows = pooling == Pooling::none ? bags.values.size() : bags.lengths.size();
  Expected expected{std::vector<double>(out_rows * size_t(rows.dim)), std::vector<double>(out_rows * size_t(rows.dim))};
  for (int32_t c = 0; c < rows.dim; ++c) {
    size_t position = 0;
    for (size_t b = 0; b < bags.lengths.size(); ++b) {
      double sum = 0;
      double magnitude = 0;
      double best = -std::numeric_limits<double>::infinity();
      int64_t count = 0;
      for (int32_t i = 0; i < bags.lengths[b]; ++i, ++position) {
        const int64_t id = bags.values[position];
        const bool padded = pooling != Pooling::none && padding != kNoPadding && id == padding;
        const int64_t row = padded ? -1 : row_of(id, rows.rows, rows.table.policy, rows.table.default_row);
        const double x = row < 0 ? 0.0 : rows.at(row, c);
        if (pooling == Pooling::none) expected.values[position * size_t(rows.dim) + size_t(c)] = x;
        if (row < 0) continue;
        const double w = weighted ? double(bags.weights[position]) : 1.0;
        sum += w * x;
        magnitude += std::fabs(w * x);
        best = std::max(best, x);
        ++count;
      }
      if (pooling == Pooling::none) continue;
      const size_t at = b * size_t(rows.dim) + size_t(c);
      if (pooling == Pooling::sum) expected.values[at] = sum;
      if (pooling == Pooling::mean) expected.values[at] = count > 0 ? sum / double(count) : 0.0;
      if (pooling == Pooling::max) expected.values[at] = count > 0 ? best : 0.0;
      expected.magnitudes[at] = magnitude;
    }
  }
  return expected;
}

constexpr float kCanary = 12345.678f;

// Pools, compares with the naive result and checks that nothing between the output rows was touched.
void compare(const Rows& rows, Pooling pooling, const Bags& bags, bool weighted, const std::string& what,
             int64_t padding = kNoPadding) {
  const Expected expected = naive(rows, pooling, bags, weighted, padding);
  const size_t out_rows = expected.values.size() / size_t(rows.dim);
  const size_t stride = size_t(rows.dim) + 3;
  std::vector<float> out(out_rows * stride + 16, kCanary);
  PoolCounts counts;
  const bool applies = weighted && (pooling == Pooling::sum || pooling == Pooling::mean);
  const Expected& want = applies == weighted ? expected : naive(rows, pooling, bags, false, padding);
  const Fault fault =
      pool_feature(rows.table, pooling, bags.input(weighted), out.data(), int64_t(stride), counts, OutputFormat::fp32, padding);
  expect(fault.status == Status::ok && fault.reason == Reason::none, what + ": refused");
  int64_t outside = 0;
  int64_t absent = 0;
  for (const int64_t id : bags.values) {
    const bool padded = pooling != Pooling::none && padding != kNoPadding && id == padding;
    outside += !padded && (id < 0 || id >= rows.rows);  // padding behind the last row is no mistake
    absent += padded || row_of(id, rows.rows, rows.table.policy, rows.table.default_row) < 0;
  }
  expect(counts.out_of_range == outside, what + ": out_of_range");
  expect(counts.rows_read == int64_t(bags.values.size()) - absent, what + ": rows_read");
  bool equal = true;
  bool untouched = true;
  for (size_t r = 0; r < out_rows; ++r) {
    for (size_t c = 0; c < size_t(rows.dim); ++c) {
      const size_t at = r * size_t(rows.dim) + c;
      equal = equal && std::fabs(double(out[r * stride + c]) - want.values[at]) <= 1e-5 * want.magnitudes[at] + 1e-30;
    }
    for (size_t c = size_t(rows.dim); c < stride; ++c) untouched = untouched && out[r * stride + c] == kCanary;
  }
  for (size_t i = out_rows * stride; i < out.size(); ++i) untouched = untouched && out[i] == kCanary;
  expect(equal, what + ": values");
  expect(untouched, what + ": wrote outside its rows");
}

// Each value of a 16-bit output is the one nearest to the fp32 output's, and nothing between the output rows was touched.
void compare_narrow(const Rows& rows, Pooling pooling, const Bags& bags, bool weighted, const std::string& what) {
  const size_t out_rows = pooling == Pooling::none ? bags.values.size() : bags.lengths.size();
  const size_t dim = size_t(rows.dim), stride = dim + 3;
  std::vector<float> exact(out_rows * dim + 1);
  PoolCounts counts;
  pool_feature(rows.table, pooling, bags.input(weighted), exact.data(), rows.dim, counts);
  for (const OutputFormat output : {OutputFormat::fp16, OutputFormat::bf16}) {
    constexpr uint16_t kMark = 0x5a5a;
    // One byte off: a row may begin anywhere.
    std::vector<std::byte> memory(1 + (out_rows * stride + 16) * 2, std::byte(0x5a));
    pool_feature(rows.table, pooling, bags.input(weighted), memory.data() + 1, int64_t(stride), counts, output);
    bool nearest = true, untouched = true;
    for (size_t i = 0; i < out_rows * stride + 16; ++i) {
      const auto found = Rows::read<uint16_t>(memory.data() + 1 + i * 2);
      if (i >= out_rows * stride || i % stride >= dim) {
        untouched = untouched && found == kMark;
        continue;
      }
      const double want = double(exact[i / stride * dim + i % stride]);
      const bool half = output == OutputFormat::fp16;
      const double got = half ? half_value(found) : double(float_of(uint32_t(found) << 16));
      const bool too_large = half && std::fabs(want) >= 65520;
      nearest = nearest && (too_large ? std::isinf(got) && std::signbit(got) == std::signbit(want)
                                      : std::fabs(got - want) <= std::fabs(want) * (half ? 0x1p-11 : 0x1p-8) +
                                                                     (half ? 0x1p-25 : 0x1p-134));
    }
    expect(nearest, what + (output == OutputFormat::fp16 ? ": fp16 values" : ": bf16 values"));
    expect(untouched, what + ": a 16-bit output outside its rows");
  }
}

const Pooling kPoolings[] = {Pooling::sum, Pooling::mean, Pooling::max, Pooling::none};
const char* const kPoolingNames[] = {"sum", "mean", "max", "none"};

void pooling_equals_the_naive_definition_for_any_dim() {
  for (const int32_t dim : {1,  2,  3,   4,   7,   8,   9,   15,  16,  17,  24,  31,  32,  33,   48,  63,
                            64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 511, 513, 1000, 4096}) {
    for (const RowFormat format : kFormats) {
      const Rows rows(37, dim, format, dim % 3 == 0 ? 0 : 2);
      for (const Pooling pooling : kPoolings) {
        for (const bool weighted : {false, true}) {
          const std::string what = std::string(kPoolingNames[int(pooling)]) + " dim " + std::to_string(dim) + " " +
                                   kFormatNames[int(format)] + (weighted ? " weighted" : "");
          const Bags bags = random_bags(rows.rows, dim > 512 ? 5 : 13, dim > 512 ? 12 : 25);
          compare(rows, pooling, bags, weighted, what);
          compare_narrow(rows, pooling, bags, weighted, what);
        }
      }
    }
  }
}

void pooling_equals_the_naive_definition_for_random_shapes() {
  for (int i = 0; i < 500; ++i) {
    const auto dim = int32_t(random_int(1, 150));
    const RowFormat format = random_format();
    const Rows rows(random_int(1, 200), dim, format, size_t(random_int(0, 70)));
    const Pooling pooling = kPoolings[random_int(0, 3)];
    const Bags bags = random_bags(rows.rows, int32_t(random_int(0, 80)), int32_t(random_int(0, 40)));
    const bool weighted = random_int(0, 1) == 1;
    // Row 0 and the last one are ids more often than others (random_bags).
    const int64_t paddings[] = {kNoPadding, 0, rows.rows - 1, random_int(0, rows.rows - 1)};
    compare(rows, pooling, bags, weighted, "random shape " + std::to_string(i), paddings[i % 4]);
    compare_narrow(rows, pooling, bags, weighted, "random shape " + std::to_string(i));
    if (pooling == Pooling::none) continue;  // its padding is a row like any other
    Bags behind = bags;
    for (int64_t& id : behind.values) {
      if (random_int(0, 2) == 0) id = rows.rows;
    }
    compare(rows, pooling, behind, weighted, "padding behind the last row " + std::to_string(i), rows.rows);
  }
}

void ids_outside_a_table_follow_its_policy() {
  const int64_t far[] = {-1,
                         std::numeric_limits<int64_t>::min(),
                         std::numeric_limits<int64_t>::max(),
                         50,
                         51,
                         int64_t(1) << 32,
                         -(int64_t(1) << 40)};
  for (const int32_t dim : {16, 64, 100, 128, 333}) {
    for (const OutOfRange policy : {OutOfRange::zero, OutOfRange::default_row, OutOfRange::hash}) {
      Rows rows(50, dim, random_format());
      rows.table.policy = policy;
      rows.table.default_row = 49;
      for (int round = 0; round < 8; ++round) {
        Bags bags = random_bags(rows.rows, 40, 6);
        const int64_t odds = round == 0 ? 1 : 3;  // the first round has nothing but ids outside
        for (int64_t& id : bags.values) {
          if (random_int(1, odds) == 1) id = far[random_int(0, 6)];
        }
        for (const Pooling pooling : kPoolings) {
          compare(rows, pooling, bags, round % 2 == 1,
                  "policy " + std::to_string(int(policy)) + " dim " + std::to_string(dim),
                  round % 4 < 2 ? kNoPadding : rows.table.default_row);
        }
      }
    }
  }
}

void the_first_bad_id_is_refused_with_its_bag() {
  for (const int32_t dim : {64, 100, 128}) {
    for (const Pooling pooling : kPoolings) {
      Rows rows(1000, dim, RowFormat::fp32);
      for (int round = 0; round < 60; ++round) {
        Bags bags = random_bags(rows.rows, 50, 5);
        if (bags.values.empty()) continue;
        const int64_t bad = random_int(0, int64_t(bags.values.size()) - 1);
        const int64_t id = round % 2 == 0 ? rows.rows + round : -1 - round;
        bags.values[size_t(bad)] = id;
        if (bad + 1 < int64_t(bags.values.size())) bags.values[size_t(bad) + 1] = -77;
        int64_t bag = -1;
        for (int64_t left = bad; left >= 0;) left -= bags.lengths[size_t(++bag)];
        // The walk above stops at the bag whose ids cover `bad`.
        std::vector<float> out(std::max(bags.values.size(), bags.lengths.size()) * size_t(dim) + 8, kCanary);
        PoolCounts counts;
        const int64_t padding = round % 4 < 2 ? kNoPadding : 0;
        const int64_t padded =
            pooling == Pooling::none ? 0 : std::count(bags.values.begin(), bags.values.begin() + bad, padding);
        const Fault fault = pool_feature(rows.table, pooling, bags.input(false), out.data(), dim, counts, OutputFormat::fp32, padding);
        expect(fault.status == Status::rejected && fault.reason == Reason::id_out_of_range, "bad id: reason");
        expect(fault.bag == bag && fault.value == id, "bad id: bag and value");
        expect(counts.out_of_range == 1 && counts.rows_read == bad - padded, "bad id: counts");
        for (size_t i = out.size() - 8; i < out.size(); ++i) expect(out[i] == kCanary, "bad id: wrote outside");
      }
    }
  }
}

void lengths_that_do_not_add_up_are_refused() {
  struct Case {
    std::vector<int32_t> lengths;
    int64_t values;
    Reason reason;
    int64_t bag;
    int64_t value;
  };
  const int32_t huge = std::numeric_limits<int32_t>::max();
  const int32_t lowest = std::numeric_limits<int32_t>::min();
  const std::vector<Case> cases = {
      {{1, 2, -1, 3}, 6, Reason::negative_length, 2, -1},
      {{lowest, 2}, 2, Reason::negative_length, 0, lowest},
      {{2, 2, 3}, 6, Reason::lengths_exceed_values, 2, 6},
      {{huge, huge, huge}, 6, Reason::lengths_exceed_values, 0, 6},
      {{6, huge}, 6, Reason::lengths_exceed_values, 1, 6},
      {{1}, 0, Reason::lengths_exceed_values, 0, 0},
      {{2, 2}, 6, Reason::values_left_over, -1, 2},
      {{}, 3, Reason::values_left_over, -1, 3},
      {{0, 0}, 1, Reason::values_left_over, -1, 1},
      {{0, 0, 0}, 0, Reason::none, -1, 0},
      {{}, 0, Reason::none, -1, 0},
  };
  for (const int32_t dim : {64, 70}) {
    const Rows rows(9, dim, RowFormat::fp32);
    for (const Pooling pooling : kPoolings) {
      for (size_t i = 0; i < cases.size(); ++i) {
        const Case& c = cases[i];
        // Heap arrays of exactly the given length: AddressSanitizer sees a read past either.
        const std::vector<int64_t> values(size_t(c.values), 4);
        const std::vector<int32_t> lengths(c.lengths);
        std::vector<float> out(std::max(values.size(), lengths.size()) * size_t(dim));
        PoolCounts counts;
        const BagInput input{values.data(), c.values, lengths.data(), 1, int32_t(lengths.size()), nullptr};
        const Fault fault = pool_feature(rows.table, pooling, input, out.data(), dim, counts);
        const std::string what = "lengths case " + std::to_string(i) + " " + kPoolingNames[int(pooling)];
        expect(fault.reason == c.reason, what + ": reason");
        expect(fault.status == (c.reason == Reason::none ? Status::ok : Status::rejected), what + ": status");
        if (c.reason != Reason::none) expect(fault.bag == c.bag && fault.value == c.value, what + ": bag, value");
      }
    }
  }
}

// The lookahead crosses features of other row sizes, without ids, with ids outside their table.
void features_pooled_with_one_lookahead_are_those_pooled_alone() {
  for (int round = 0; round < 40; ++round) {
    std::vector<std::unique_ptr<Rows>> tables;
    std::vector<Bags> bags;
    std::vector<std::vector<float>> together, alone;
    std::vector<PoolTask> tasks;
    const auto features = size_t(random_int(1, 30));
    for (size_t f = 0; f < features; ++f) {
      constexpr int32_t dims[] = {1, 8, 64, 128, 300, 4096};
      const int32_t dim = dims[random_int(0, 5)];
      tables.push_back(std::make_unique<Rows>(random_int(1, 40), dim, random_format()));
      tables.back()->table.policy = random_int(0, 1) ? OutOfRange::zero : OutOfRange::hash;
      const int32_t batch = int32_t(random_int(0, 4));
      bags.push_back(random_bags(tables.back()->rows + random_int(0, 2), batch, random_int(0, 3) ? 5 : 80));
      together.emplace_back(size_t(batch * dim), kCanary);
      alone.emplace_back(size_t(batch * dim), kCanary);
    }
    for (size_t f = 0; f < features; ++f)
      tasks.push_back(
          pool_task(tables[f]->table, kPoolings[round % 3], bags[f].input(false), together[f].data(), tables[f]->dim));
    Lookahead ahead(tasks.data(), tasks.size());
    for (size_t f = 0; f < features; ++f) {
      PoolCounts counts, own;
      const Fault fault = pool(tasks[f], ahead, counts);
      pool_feature(tables[f]->table, kPoolings[round % 3], bags[f].input(false), alone[f].data(), tables[f]->dim, own);
      expect(fault.status == Status::ok, "one lookahead: status");
      expect(together[f] == alone[f], "one lookahead: feature " + std::to_string(f));
      expect(counts.rows_read == own.rows_read && counts.out_of_range == own.out_of_range, "one lookahead: counts");
    }
    expect(ahead.in_flight == 0, "one lookahead: every row fetched ahead was pooled");
  }
}

void bags_of_a_fixed_length_need_no_lengths() {
  const Rows rows(100, 64, RowFormat::fp32);
  for (const int32_t length : {0, 1, 2, 20}) {
    Bags bags = random_bags(rows.rows, 0, 0);
    bags.lengths.assign(17, length);
    for (int i = 0; i < 17 * length; ++i) bags.values.push_back(random_int(0, 99));
    std::vector<float> with(17 * 64, 1.0f);
    std::vector<float> without(17 * 64, 2.0f);
    PoolCounts counts;
    pool_feature(rows.table, Pooling::sum, bags.input(false), with.data(), 64, counts);
    const BagInput fixed{bags.values.data(), int64_t(bags.values.size()), nullptr, length, 17, nullptr};
    const Fault fault = pool_feature(rows.table, Pooling::sum, fixed, without.data(), 64, counts);
    expect(fault.status == Status::ok && with == without, "fixed length " + std::to_string(length));
    const BagInput one_more{bags.values.data(), int64_t(bags.values.size()), nullptr, length, 18, nullptr};
    std::vector<float> out(18 * 64);
    const Fault excess = pool_feature(rows.table, Pooling::sum, one_more, out.data(), 64, counts);
    expect(excess.reason == (length == 0 ? Reason::none : Reason::lengths_exceed_values), "fixed length, one bag more");
  }
  const BagInput negative{nullptr, 0, nullptr, -3, 1, nullptr};
  float out[64];
  PoolCounts counts;
  const Fault fault = pool_feature(rows.table, Pooling::sum, negative, out, 64, counts);
  expect(fault.reason == Reason::negative_length && fault.value == -3, "negative fixed length");
}

void a_bag_of_one_id_is_a_bit_exact_copy() {
  for (const int32_t dim : {1, 16, 60, 64, 128, 256, 1000}) {
    const Rows rows(64, dim, RowFormat::fp32, 1);
    for (int64_t i = 0; i < rows.rows * dim; ++i) {  // every bit pattern: NaNs, -0, subnormals, infinities
      const auto bits = uint32_t(rng());
      std::memcpy(rows.data() + i * 4, &bits, 4);
    }
    const uint32_t special[] = {0x80000000, 0x7f800001, 0xffc00000, 0x00000001};  // -0, signalling NaN, -NaN, subnormal
    for (size_t i = 0; i < 4; ++i) std::memcpy(rows.data() + i * size_t(dim) * 4, &special[i], 4);
    for (const Pooling pooling : kPoolings) {
      Bags bags;
      for (int64_t i = 0; i < rows.rows; ++i) bags.values.push_back(i);
      bags.lengths.assign(size_t(rows.rows), 1);
      std::vector<float> out(size_t(rows.rows * dim));
      PoolCounts counts;
      pool_feature(rows.table, pooling, bags.input(false), out.data(), dim, counts);
      expect(std::memcmp(out.data(), rows.data(), out.size() * 4) == 0,
             std::string("exact copy ") + kPoolingNames[int(pooling)] + " dim " + std::to_string(dim));
    }
  }
}

void a_row_takes_the_bytes_its_format_says() {
  const size_t want[5][3] = {{4, 20, 16384}, {2, 10, 8192}, {2, 10, 8192}, {9, 13, 4104}, {5, 7, 2052}};
  for (const RowFormat format : kFormats) {
    const int32_t dims[] = {1, 5, 4096};
    for (int i = 0; i < 3; ++i) {
      expect(row_bytes(format, dims[i]) == want[int(format)][i], std::string("row_bytes ") + kFormatNames[int(format)]);
    }
    expect(parse_row_format(kFormatNames[int(format)]) == format, "row format names");
  }
}

void every_half_widens_exactly() {
  const Rows rows(1024, 64, RowFormat::fp16);
  for (uint32_t half = 0; half < 65536; ++half) {
    const auto bits = uint16_t(half);
    std::memcpy(rows.data() + half * 2, &bits, 2);
  }
  Bags bags;
  for (int64_t i = 0; i < 1024; ++i) bags.values.push_back(i);
  bags.lengths.assign(1024, 1);
  std::vector<float> out(65536);
  PoolCounts counts;
  pool_feature(rows.table, Pooling::sum, bags.input(false), out.data(), 64, counts);
  for (uint32_t half = 0; half < 65536; ++half) {
    const double want = half_value(uint16_t(half));
    const bool same = std::isnan(want) ? std::isnan(out[half])
                                       : double(out[half]) == want && std::signbit(out[half]) == std::signbit(want);
    expect(same, "half " + std::to_string(half));
  }
}

std::vector<float> pooled(const Rows& rows, Pooling pooling, const Bags& bags, size_t cache_bytes, bool& streamed) {
  const size_t out_rows = pooling == Pooling::none ? bags.values.size() : bags.lengths.size();
  const size_t bytes = std::max(out_rows * size_t(rows.dim) * sizeof(float), sizeof(float));
  const std::unique_ptr<void, void (*)(void*)> out(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
  PoolTask task = pool_task(rows.table, pooling, bags.input(false), out.get(), rows.dim);
  stream_results(&task, 1, bytes, cache_bytes);
  streamed = task.streamed;
  Lookahead ahead(&task, 1);
  PoolCounts counts;
  expect(pool(task, ahead, counts).status == Status::ok, "refused");
  const auto* values = static_cast<const float*>(out.get());
  return {values, values + out_rows * size_t(rows.dim)};
}

void results_that_exceed_the_cache_are_the_same() {
  expect(last_level_cache_bytes() >= 64 << 10, "a last-level cache");
  for (const int32_t dim : {15, 16, 32, 48, 64, 100, 128, 256, 400}) {
    for (const RowFormat format : kFormats) {
      for (const Pooling pooling : kPoolings) {
        const Rows rows(41, dim, format);
        const Bags bags = random_bags(rows.rows, 30, 4);
        bool cached = true, past = false;
        const std::vector<float> want = pooled(rows, pooling, bags, size_t(1) << 40, cached);
        expect(pooled(rows, pooling, bags, 1, past) == want, "values");
        expect(!cached && past == (dim % 16 == 0), "streamed where rows fill lines");
      }
    }
  }
}

void rows_are_added_in_the_order_of_their_ids() {
  // 1e8 + 1 - 1e8 depends on the order in fp32: left to right it is 0, any other way it is 1.
  for (const int32_t dim : {3, 64, 72, 1024}) {
    const Rows rows(3, dim, RowFormat::fp32);
    const float values[] = {1e8f, 1.0f, -1e8f};
    for (int64_t i = 0; i < 3 * dim; ++i) std::memcpy(rows.data() + i * 4, &values[i / dim], 4);
    Bags bags;
    bags.values = {0, 1, 2, 0, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 2};
    bags.lengths = {3, 3, 10};
    std::vector<float> out(size_t(3 * dim));
    PoolCounts counts;
    pool_feature(rows.table, Pooling::sum, bags.input(false), out.data(), dim, counts);
    for (int32_t c = 0; c < dim; ++c) {
      expect(out[size_t(c)] == 0.0f && out[size_t(dim + c)] == 1.0f && out[size_t(2 * dim + c)] == 8.0f, "order");
    }
  }
}

void max_treats_nan_as_torch_does() {
  const Rows rows(3, 64, RowFormat::fp32);
  const float values[] = {std::nanf(""), 1.0f, -1.0f};
  for (int64_t i = 0; i < 3 * 64; ++i) std::memcpy(rows.data() + i * 4, &values[i / 64], 4);
  Bags bags;
  bags.values = {0, 1, 2, 0, 1};
  bags.lengths = {2, 3};
  std::vector<float> out(128);
  PoolCounts counts;
  pool_feature(rows.table, Pooling::max, bags.input(false), out.data(), 64, counts);
  for (size_t c = 0; c < 64; ++c) expect(std::isnan(out[c]) && out[64 + c] == 1.0f, "max of NaN");
}

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
  expect(set.promote() == bytes * 3 / 2, "bytes promoted");
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

void the_best_simd_level_is_in_use_at_first() {
  expect(simd_level() == simd_levels().front(), "level in use");
  expect(simd_levels().back() == "scalar", "scalar runs anywhere");
  for (const std::string& level : simd_levels()) {
    force_simd_level(level);
    expect(simd_level() == level, "level " + level);
  }
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

int passed = 0;
int failed = 0;

void run(const std::string& name, void (*test)()) {
  failures = 0;
  test();
  std::printf("%s %s\n", failures == 0 ? "ok" : "FAILED", name.c_str());
  std::fflush(stdout);
  ++(failures == 0 ? passed : failed);
}

}  // namespace

#define RUN(test) run(#test, test)
#define RUN_AT(level, test) run(std::string(#test) + " [" + (level) + "]", test)

int main() {
  RUN(the_best_simd_level_is_in_use_at_first);
  RUN(crc32c_equals_its_definition);
  RUN(the_hash_of_an_id_never_changes);
  RUN(set_up_refuses_what_cannot_work);
  RUN(a_row_takes_the_bytes_its_format_says);
  for (const std::string& level : simd_levels()) {
    force_simd_level(level);
    RUN_AT(level, pooling_equals_the_naive_definition_for_any_dim);
    RUN_AT(level, pooling_equals_the_naive_definition_for_random_shapes);
    RUN_AT(level, ids_outside_a_table_follow_its_policy);
    RUN_AT(level, the_first_bad_id_is_refused_with_its_bag);
    RUN_AT(level, lengths_that_do_not_add_up_are_refused);
    RUN_AT(level, bags_of_a_fixed_length_need_no_lengths);
    RUN_AT(level, features_pooled_with_one_lookahead_are_those_pooled_alone);
    RUN_AT(level, a_bag_of_one_id_is_a_bit_exact_copy);
    RUN_AT(level, rows_past_2_31_of_tables_past_2_32_elements_are_found);
    RUN_AT(level, every_half_widens_exactly);
    RUN_AT(level, rows_are_added_in_the_order_of_their_ids);
    RUN_AT(level, results_that_exceed_the_cache_are_the_same);
    RUN_AT(level, max_treats_nan_as_torch_does);
    RUN_AT(level, a_peer_that_rewrites_ids_and_lengths_cannot_cause_a_bad_access);
    RUN_AT(level, promotion_changes_no_answer_while_lookups_run);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
