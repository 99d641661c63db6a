// The operators of programs, once for every SIMD level: a level's file sets SIDEPOOL_VECTOR_BYTES. Everything here has
// internal linkage, and no function of the standard library is used, see kernels.hpp.
#pragma once
#include "program_kernels.hpp"

namespace sidepool::kernels {
namespace {

using Vector = float __attribute__((vector_size(SIDEPOOL_VECTOR_BYTES)));
constexpr int64_t kWidth = SIDEPOOL_VECTOR_BYTES / 4;

inline Vector load(const float* p) {
  Vector x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline Vector load_part(const float* p, int64_t n) {
  Vector x{};
  __builtin_memcpy(&x, p, size_t(n) * sizeof(float));
  return x;
}
inline void store(float* p, Vector x) { __builtin_memcpy(p, &x, sizeof x); }
inline void store_part(float* p, Vector x, int64_t n) { __builtin_memcpy(p, &x, size_t(n) * sizeof(float)); }
inline Vector broadcast(float x) { return Vector{} + x; }

// e^x = 2^n · e^r with |r| <= ln 2 / 2, and for e^r a polynomial of degree 7 (Taylor; its remainder is below 6e-9 there).
// Branch-free, so that loops over it vectorise. n by rounding in the addition of 1.5 · 2^23.
inline float exp_of(float x) {
  constexpr float kLow = -87.3f, kHigh = 88.72284f, kRound = 12582912.0f;
  const float within = x > kLow ? (x < kHigh ? x : kHigh) : kLow;  // NaN too lies within, and is put back below
  const float n = (within * 1.44269504f + kRound) - kRound;
  const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // In two factors: 2^128 has no float, e^88.7 has.
  const int32_t whole = int32_t(n), half = whole >> 1, rest = whole - half;
  const int32_t first_bits = (half + 127) << 23, second_bits = (rest + 127) << 23;
  float first, second;
  __builtin_memcpy(&first, &first_bits, sizeof first);
  __builtin_memcpy(&second, &second_bits, sizeof second);
  const float result = p * first * second;
  return x > kHigh ? __builtin_inff() : (x < kLow ? 0.0f : (x == x ? result : x));
}

inline float tanh_of(float x) {
  const float square = x * x;
  // Near zero the quotient below loses what matters; the series' next term is below 1e-8 of it there.
  const float series =
      x * (1 + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
  const float quotient = 1 - 2 / (exp_of(2 * x) + 1);
  return square < 0.04f ? series : quotient;
}

struct Copy { static inline float of(float a, float, float) { return a; } };
struct Negate { static inline float of(float a, float, float) { return -a; } };
struct Absolute { static inline float of(float a, float, float) { return __builtin_fabsf(a); } };
struct Exp { static inline float of(float a, float, float) { return exp_of(a); } };
struct Log { static inline float of(float a, float, float) { return __builtin_logf(a); } };
struct Sqrt { static inline float of(float a, float, float) { return __builtin_sqrtf(a); } };
struct Reciprocal { static inline float of(float a, float, float) { return 1 / a; } };
struct Sigmoid { static inline float of(float a, float, float) { return 1 / (1 + exp_of(-a)); } };
struct Tanh { static inline float of(float a, float, float) { return tanh_of(a); } };
// NaN stays NaN, as in torch.
struct Relu { static inline float of(float a, float, float) { return a < 0 ? 0.0f : a; } };
struct Not { static inline float of(float a, float, float) { return a == 0 ? 1.0f : 0.0f; } };
struct Add { static inline float of(float a, float b, float) { return a + b; } };
struct Subtract { static inline float of(float a, float b, float) { return a - b; } };
struct Multiply { static inline float of(float a, float b, float) { return a * b; } };
struct Divide { static inline float of(float a, float b, float) { return a / b; } };
struct Maximum { static inline float of(float a, float b, float) { return a != a || a > b ? a : b; } };
struct Minimum { static inline float of(float a, float b, float) { return a != a || a < b ? a : b; } };
struct Less { static inline float of(float a, float b, float) { return a < b ? 1.0f : 0.0f; } };
struct LessEqual { static inline float of(float a, float b, float) { return a <= b ? 1.0f : 0.0f; } };
struct Equal { static inline float of(float a, float b, float) { return a == b ? 1.0f : 0.0f; } };
struct NotEqual { static inline float of(float a, float b, float) { return a != b ? 1.0f : 0.0f; } };
struct And { static inline float of(float a, float b, float) { return a != 0 && b != 0 ? 1.0f : 0.0f; } };
struct Or { static inline float of(float a, float b, float) { return a != 0 || b != 0 ? 1.0f : 0.0f; } };
struct Where { static inline float of(float a, float b, float c) { return a != 0 ? b : c; } };

// Walks all indices of the first `rank` sizes, keeping the first elements of `count` operands.
struct Walk {
  const Step& step;
  int32_t rank;
  float* at[4];  // out, then the operands
  int64_t index[kMaxRank] = {};

  Walk(const Step& of, int32_t dims, float* const* spaces) : step(of), rank(dims) {
    for (int32_t i = 0; i < 4; ++i) at[i] = spaces[operand(i).space] + operand(i).offset;
  }
  // An operand that is not there is the first one once more.
  const Operand& operand(int32_t i) const { return i == 0 ? step.out : step.in[i - 1 < step.operands ? i - 1 : 0]; }

  // False at the end.
  inline bool next() {
    for (int32_t d = rank - 1; d >= 0; --d) {
      if (++index[d] < step.sizes[d]) {
        for (int32_t i = 0; i < 4; ++i) at[i] += operand(i).strides[d];
        return true;
      }
      for (int32_t i = 0; i < 4; ++i) at[i] -= operand(i).strides[d] * (step.sizes[d] - 1);
      index[d] = 0;
    }
    return false;
  }
};

template <class F>
inline void map_line(float* out, int64_t so, const float* a, int64_t sa, const float* b, int64_t sb, const float* c, int64_t sc,
                     int64_t n) {
  // Outputs never overlap what they are made from: steps write where nothing was before.
  if (so == 1 && sa == 1 && sb == 1 && sc == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = F::of(a[i], b[i], c[i]);
  } else if (so == 1 && sa == 1 && sb == 0) {
    const float one = *b, other = *c;
    if (sc == 0) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = F::of(a[i], one, other);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = F::of(a[i], one, c[i * sc]);
    }
  } else if (so == 1 && sa == 0 && sb == 1) {
    const float one = *a;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = F::of(one, b[i], c[i * sc]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * so] = F::of(a[i * sa], b[i * sb], c[i * sc]);
  }
}

template <class F>
void map(const Step& step, float* const* spaces) {
  const int32_t last = step.rank - 1;
  Walk walk(step, last, spaces);
  const int64_t n = step.sizes[last];
  const int64_t so = step.out.strides[last], sa = walk.operand(1).strides[last], sb = walk.operand(2).strides[last],
                sc = walk.operand(3).strides[last];
  do {
    map_line<F>(walk.at[0], so, walk.at[1], sa, walk.at[2], sb, walk.at[3], sc, n);
  } while (walk.next());
}

// Over the last size; where the size before it lies side by side, as a run of sums at once.
template <class F>
void reduce(const Step& step, float* const* spaces) {
  const int32_t last = step.rank - 1;
  const int64_t n = step.sizes[last], stride = step.in[0].strides[last];
  if (step.rank > 1 && step.in[0].strides[last - 1] == 1 && step.out.strides[last - 1] == 1) {
    Walk walk(step, last - 1, spaces);
    const int64_t run = step.sizes[last - 1];
    do {
      float* out = walk.at[0];
      const float* in = walk.at[1];
      __builtin_memmove(out, in, size_t(run) * sizeof(float));  // a program may let them overlap, for what it is worth
      for (int64_t k = 1; k < n; ++k) {
        in += stride;
#pragma GCC ivdep
        for (int64_t i = 0; i < run; ++i) out[i] = F::of(out[i], in[i], 0);
      }
    } while (walk.next());
    return;
  }
  Walk walk(step, last, spaces);
  do {
    const float* in = walk.at[1];
    float found = *in;
    for (int64_t k = 1; k < n; ++k) found = F::of(found, in[k * stride], 0);
    *walk.at[0] = found;
  } while (walk.next());
}

void softmax(const Step& step, float* const* spaces) {
  const int32_t last = step.rank - 1;
  const int64_t n = step.sizes[last], si = step.in[0].strides[last], so = step.out.strides[last];
  Walk walk(step, last, spaces);
  do {
    const float* in = walk.at[1];
    float* out = walk.at[0];
    float largest = *in;
    for (int64_t k = 1; k < n; ++k) largest = Maximum::of(largest, in[k * si], 0);
    for (int64_t k = 0; k < n; ++k) out[k * so] = in[k * si] - largest;
    if (so == 1) {
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) out[k] = exp_of(out[k]);
    } else {
      for (int64_t k = 0; k < n; ++k) out[k * so] = exp_of(out[k * so]);
    }
    float total = 0;
    for (int64_t k = 0; k < n; ++k) total += out[k * so];
    for (int64_t k = 0; k < n; ++k) out[k * so] /= total;
  } while (walk.next());
}

// One product of matrices: strides of its operands within it.
struct Product {
  const float* a;
  const float* b;
  const float* c;  // what is added, or null
  float* out;
  int64_t a_row, a_depth, b_depth, c_row, c_column, out_row;
  int64_t depth;
};

inline float added(const Product& p, int64_t row, int64_t column) {
  return p.c == nullptr ? 0.0f : p.c[row * p.c_row + column * p.c_column];
}

// kRows rows times kVectors whole vectors of columns, held in registers.
template <int kRows, int kVectors>
inline void block(const Product& p, int64_t row, int64_t column) {
  Vector sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k) {
    Vector of_b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) of_b[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector of_a = broadcast(a[r * p.a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += of_a * of_b[v];
    }
    a += p.a_depth;
    b += p.b_depth;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = column + v * kWidth;
      Vector sum = sums[r][v];
      if (p.c != nullptr && p.c_column == 1) {
        sum += load(p.c + (row + r) * p.c_row + first);
      } else if (p.c != nullptr) {
        for (int64_t i = 0; i < kWidth; ++i) sum[i] += added(p, row + r, first + i);
      }
      store(p.out + (row + r) * p.out_row + first, sum);
    }
  }
}

// Columns `column` and the `count` - 1 after it, fewer than a vector.
inline void few_columns(const Product& p, int64_t row, int64_t column, int64_t count) {
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  Vector sum{};
  if (count == 1 && p.a_depth == 1 && p.b_depth == 1) {  // both lie along the sum
    int64_t k = 0;
    for (; k + kWidth <= p.depth; k += kWidth) sum += load(a + k) * load(b + k);
    if (k < p.depth) sum += load_part(a + k, p.depth - k) * load_part(b + k, p.depth - k);
    float total = 0;
    for (int64_t i = 0; i < kWidth; ++i) total += sum[i];
    p.out[row * p.out_row + column] = total + added(p, row, column);
    return;
  }
  if (count == 1) {
    float total = 0;
    for (int64_t k = 0; k < p.depth; ++k) total += a[k * p.a_depth] * b[k * p.b_depth];
    p.out[row * p.out_row + column] = total + added(p, row, column);
    return;
  }
  for (int64_t k = 0; k < p.depth; ++k) sum += broadcast(a[k * p.a_depth]) * load_part(b + k * p.b_depth, count);
  for (int64_t i = 0; i < count; ++i) sum[i] += added(p, row, column + i);
  store_part(p.out + row * p.out_row + column, sum, count);
}

template <int kRows>
inline void rows_of(const Product& p, int64_t row, int64_t columns) {
  int64_t column = 0;
  for (; column + 2 * kWidth <= columns; column += 2 * kWidth) block<kRows, 2>(p, row, column);
  for (; column + kWidth <= columns; column += kWidth) block<kRows, 1>(p, row, column);
  if (column < columns)
    for (int r = 0; r < kRows; ++r) few_columns(p, row + r, column, columns - column);
}

void matmul(const Step& step, float* const* spaces) {
  const int32_t row = step.rank - 2, column = step.rank - 1;
  Walk walk(step, row, spaces);
  Product p;
  p.a_row = step.in[0].strides[row];
  p.a_depth = step.in[0].strides[column];
  p.b_depth = step.in[1].strides[row];
  p.c_row = step.operands > 2 ? step.in[2].strides[row] : 0;
  p.c_column = step.operands > 2 ? step.in[2].strides[column] : 0;
  p.out_row = step.out.strides[row];
  p.depth = step.depth;
  do {
    p.out = walk.at[0];
    p.a = walk.at[1];
    p.b = walk.at[2];
    p.c = step.operands > 2 ? walk.at[3] : nullptr;
    int64_t r = 0;
    for (; r + 4 <= step.sizes[row]; r += 4) rows_of<4>(p, r, step.sizes[column]);
    for (; r < step.sizes[row]; ++r) rows_of<1>(p, r, step.sizes[column]);
  } while (walk.next());
}

inline void run_step(const Step& step, float* const* spaces) {
  switch (step.op) {
    case StepOp::copy: return map<Copy>(step, spaces);
    case StepOp::negate: return map<Negate>(step, spaces);
    case StepOp::absolute: return map<Absolute>(step, spaces);
    case StepOp::exp: return map<Exp>(step, spaces);
    case StepOp::log: return map<Log>(step, spaces);
    case StepOp::sqrt: return map<Sqrt>(step, spaces);
    case StepOp::reciprocal: return map<Reciprocal>(step, spaces);
    case StepOp::sigmoid: return map<Sigmoid>(step, spaces);
    case StepOp::tanh: return map<Tanh>(step, spaces);
    case StepOp::relu: return map<Relu>(step, spaces);
    case StepOp::logical_not: return map<Not>(step, spaces);
    case StepOp::add: return map<Add>(step, spaces);
    case StepOp::subtract: return map<Subtract>(step, spaces);
    case StepOp::multiply: return map<Multiply>(step, spaces);
    case StepOp::divide: return map<Divide>(step, spaces);
    case StepOp::maximum: return map<Maximum>(step, spaces);
    case StepOp::minimum: return map<Minimum>(step, spaces);
    case StepOp::less: return map<Less>(step, spaces);
    case StepOp::less_equal: return map<LessEqual>(step, spaces);
    case StepOp::equal: return map<Equal>(step, spaces);
    case StepOp::not_equal: return map<NotEqual>(step, spaces);
    case StepOp::logical_and: return map<And>(step, spaces);
    case StepOp::logical_or: return map<Or>(step, spaces);
    case StepOp::where: return map<Where>(step, spaces);
    case StepOp::sum: return reduce<Add>(step, spaces);
    case StepOp::largest: return reduce<Maximum>(step, spaces);
    case StepOp::smallest: return reduce<Minimum>(step, spaces);
    case StepOp::softmax: return softmax(step, spaces);
    case StepOp::matmul: return matmul(step, spaces);
  }
}

}  // namespace
}  // namespace sidepool::kernels
