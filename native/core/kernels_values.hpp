// How rows are read, combined and stored, once for every SIMD level: parts of kernels_impl.hpp, with internal linkage too.
#pragma once
#include "kernels.hpp"

namespace sidepool::kernels {
namespace {

// How rows are stored: `open` reads what a row says about itself, `load` gives its columns.
template <class Vector>
struct Fp32 {
  using Row = const std::byte*;
  static constexpr bool converts = false;
  static constexpr int64_t row_bytes(int64_t dim) { return dim * 4; }
  static inline Row open(const std::byte* row, int64_t) { return row; }
  static inline auto load(Row row, int64_t column) { return Vector::load(row + column * 4); }
  static inline auto load_part(Row row, int64_t column, int64_t n) { return Vector::load_part(row + column * 4, n); }
};

template <class Vector>
struct Fp16 {
  using Row = const std::byte*;
  static constexpr bool converts = true;
  static constexpr int64_t row_bytes(int64_t dim) { return dim * 2; }
  static inline Row open(const std::byte* row, int64_t) { return row; }
  static inline auto load(Row row, int64_t column) { return Vector::load_half(row + column * 2); }
  static inline auto load_part(Row row, int64_t column, int64_t n) {
    return Vector::load_half_part(row + column * 2, n);
  }
};

template <class Vector>
struct Bf16 {
  using Row = const std::byte*;
  static constexpr bool converts = true;
  static constexpr int64_t row_bytes(int64_t dim) { return dim * 2; }
  static inline Row open(const std::byte* row, int64_t) { return row; }
  static inline auto load(Row row, int64_t column) { return Vector::load_bfloat(row + column * 2); }
  static inline auto load_part(Row row, int64_t column, int64_t n) {
    return Vector::load_bfloat_part(row + column * 2, n);
  }
};

template <class Vector>
struct QuantisedRow {
  const std::byte* data;
  typename Vector::Float scale;
  typename Vector::Float bias;

  inline auto value(typename Vector::Float q) const { return Vector::multiply_add(q, scale, bias); }
};

template <class Vector>
struct Int8 {
  using Row = QuantisedRow<Vector>;
  static constexpr bool converts = true;
  static constexpr int64_t row_bytes(int64_t dim) { return dim + 8; }
  static inline Row open(const std::byte* row, int64_t dim) {
    float scale, bias;
    __builtin_memcpy(&scale, row + dim, sizeof scale);
    __builtin_memcpy(&bias, row + dim + sizeof scale, sizeof bias);
    return {row, Vector::broadcast(scale), Vector::broadcast(bias)};
  }
  static inline auto load(const Row& row, int64_t column) { return row.value(Vector::load_bytes(row.data + column)); }
  static inline auto load_part(const Row& row, int64_t column, int64_t n) {
    return row.value(Vector::load_bytes_part(row.data + column, n));
  }
};

template <class Vector>
struct Int4 {
  using Row = QuantisedRow<Vector>;
  static constexpr bool converts = true;
  static constexpr int64_t row_bytes(int64_t dim) { return (dim + 1) / 2 + 4; }
  static inline Row open(const std::byte* row, int64_t dim) {
    const std::byte* scale_bias = row + (dim + 1) / 2;
    return {row, Vector::broadcast(Vector::half(scale_bias)), Vector::broadcast(Vector::half(scale_bias + 2))};
  }
  static inline auto load(const Row& row, int64_t column) {
    return row.value(Vector::load_nibbles(row.data + column / 2));
  }
  static inline auto load_part(const Row& row, int64_t column, int64_t n) {
    return row.value(Vector::load_nibbles_part(row.data + column / 2, n));
  }
};

// How rows are combined. Where a bag has several rows, `next` may take the first like any other, if `start` allows it:
// adding to -0 changes no number. Of a bag of one row the bits are kept, even of a signalling NaN.
template <class Vector>
struct Sum {
  using Float = typename Vector::Float;
  static constexpr bool weighted = false;
  static constexpr bool starts = true;
  static inline Float start() { return Vector::broadcast(-0.0f); }
  static inline Float next(Float sum, Float row, float, bool first) { return first ? row : sum + row; }
};

template <class Vector>
struct WeightedSum {
  using Float = typename Vector::Float;
  static constexpr bool weighted = true;
  static constexpr bool starts = true;
  static inline Float start() { return Vector::broadcast(-0.0f); }
  static inline Float next(Float sum, Float row, float weight, bool) {
    return Vector::multiply_add(row, Vector::broadcast(weight), sum);
  }
};

// As torch: `row > best ? row : best`, so a NaN in the first row stays and a later one is passed over.
template <class Vector>
struct Max {
  using Float = typename Vector::Float;
  static constexpr bool weighted = false;
  static constexpr bool starts = false;
  static inline Float start() { return Vector::broadcast(0.0f); }
  static inline Float next(Float best, Float row, float, bool first) {
    return first ? row : Vector::greater(row, best);
  }
};

// How results are stored: the only place where they are rounded.
template <class Vector>
struct ToFp32 {
  using Float = typename Vector::Float;
  static constexpr int64_t bytes = 4;
  static inline void store(std::byte* out, Float x) { Vector::store(out, x); }
  static inline void store_part(std::byte* out, Float x, int64_t n) { Vector::store_part(out, x, n); }
};

// Past the caches, to an aligned address: see stream_results.
template <class Vector>
struct ToMemory {
  using Float = typename Vector::Float;
  static constexpr int64_t bytes = 4;
  static inline void store(std::byte* out, Float x) { Vector::stream(out, x); }
  static inline void store_part(std::byte* out, Float x, int64_t n) { Vector::store_part(out, x, n); }
};

template <class Vector>
struct ToFp16 {
  using Float = typename Vector::Float;
  static constexpr int64_t bytes = 2;
  static inline void store(std::byte* out, Float x) { Vector::store_half(out, x); }
  static inline void store_part(std::byte* out, Float x, int64_t n) { Vector::store_half_part(out, x, n); }
};

template <class Vector>
struct ToBf16 {
  using Float = typename Vector::Float;
  static constexpr int64_t bytes = 2;
  static inline void store(std::byte* out, Float x) { Vector::store_bfloat(out, x); }
  static inline void store_part(std::byte* out, Float x, int64_t n) { Vector::store_bfloat_part(out, x, n); }
};

struct Output {
  explicit Output(const PoolTask& task) : format(task.output), streamed(task.streamed) {}
  OutputFormat format;
  bool streamed;
};

// Chosen where a result is stored and not per feature: a branch that is always predicted costs less than three times the
// code.
template <class Vector, class Use>
[[gnu::always_inline]] inline void with_output(Output output, Use use) {
  switch (output.format) {
    case OutputFormat::fp32:
      return output.streamed ? use(ToMemory<Vector>()) : use(ToFp32<Vector>());
    case OutputFormat::fp16:
      return use(ToFp16<Vector>());
    case OutputFormat::bf16:
      return use(ToBf16<Vector>());
  }
}

}  // namespace
}  // namespace sidepool::kernels
