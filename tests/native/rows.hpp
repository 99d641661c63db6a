// Tables of random rows and batches of random bags, with what pooling them gives by the naive definition.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "pooling.hpp"

namespace sidepool {

inline std::mt19937_64 rng(20240607);

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (++check_failures() <= 20) std::printf("FAILED %s\n", what.c_str());
}

inline int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
inline float random_float() { return std::uniform_real_distribution<float>(-2.0f, 2.0f)(rng); }

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// binary16 → double by the definition in IEEE 754.
inline double half_value(uint16_t half) {
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

const Pooling kPoolings[] = {Pooling::sum, Pooling::mean, Pooling::max, Pooling::none};
const char* const kPoolingNames[] = {"sum", "mean", "max", "none"};
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

inline Bags random_bags(int64_t rows, int32_t batch, int32_t max_length) {
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
inline int64_t row_of(int64_t id, int64_t rows, OutOfRange policy, int64_t default_row) {
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

inline Expected naive(const Rows& rows, Pooling pooling, const Bags& bags, bool weighted, int64_t padding = kNoPadding) {
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

// `more`, once at every SIMD level of this machine, after `tests`.
inline void for_every_level(std::vector<TestCase>& tests, const std::vector<TestCase>& more) {
  for (const std::string& level : simd_levels()) {
    for (const TestCase& test : more) {
      tests.push_back({test.name + " [" + level + "]", [level, body = test.body] {
                         force_simd_level(level);
                         body();
                       }});
    }
  }
}

}  // namespace sidepool
