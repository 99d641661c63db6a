// Pooling against its naive definition, at every SIMD level of this machine.
#include <functional>

#include "rows.hpp"

using namespace sidepool;

namespace {

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

void the_best_simd_level_is_in_use_at_first() {
  expect(simd_level() == simd_levels().front(), "level in use");
  expect(simd_levels().back() == "scalar", "scalar runs anywhere");
  for (const std::string& level : simd_levels()) {
    force_simd_level(level);
    expect(simd_level() == level, "level " + level);
  }
}

}  // namespace

int main() {
  std::vector<TestCase> tests = {
      {"the_best_simd_level_is_in_use_at_first", the_best_simd_level_is_in_use_at_first},
      {"a_row_takes_the_bytes_its_format_says", a_row_takes_the_bytes_its_format_says},
  };
  for_every_level(tests, {
      {"pooling_equals_the_naive_definition_for_any_dim", pooling_equals_the_naive_definition_for_any_dim},
      {"pooling_equals_the_naive_definition_for_random_shapes", pooling_equals_the_naive_definition_for_random_shapes},
      {"ids_outside_a_table_follow_its_policy", ids_outside_a_table_follow_its_policy},
      {"the_first_bad_id_is_refused_with_its_bag", the_first_bad_id_is_refused_with_its_bag},
      {"lengths_that_do_not_add_up_are_refused", lengths_that_do_not_add_up_are_refused},
      {"bags_of_a_fixed_length_need_no_lengths", bags_of_a_fixed_length_need_no_lengths},
      {"features_pooled_with_one_lookahead_are_those_pooled_alone", features_pooled_with_one_lookahead_are_those_pooled_alone},
      {"a_bag_of_one_id_is_a_bit_exact_copy", a_bag_of_one_id_is_a_bit_exact_copy},
      {"every_half_widens_exactly", every_half_widens_exactly},
      {"rows_are_added_in_the_order_of_their_ids", rows_are_added_in_the_order_of_their_ids},
      {"results_that_exceed_the_cache_are_the_same", results_that_exceed_the_cache_are_the_same},
      {"max_treats_nan_as_torch_does", max_treats_nan_as_torch_does},
  });
  return run_tests(tests);
}
