// Kernels for any machine: generic vectors of four that the compiler lowers to what the baseline has.
#include "kernels_impl.hpp"

namespace sidepool::kernels {
namespace {

struct Scalar {
  using Float = float __attribute__((vector_size(16)));
  static constexpr int64_t width = 4;
  static constexpr int registers = 16;

  static inline Float broadcast(float x) { return Float{x, x, x, x}; }
  static inline Float load(const std::byte* p) {
    Float x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static inline Float load_part(const std::byte* p, int64_t n) {
    Float x{};
    __builtin_memcpy(&x, p, size_t(n) * 4);
    return x;
  }
  static inline Float load_half(const std::byte* p) { return load_half_part(p, width); }
  static inline Float load_half_part(const std::byte* p, int64_t n) {
    uint16_t halves[4] = {};
    __builtin_memcpy(halves, p, size_t(n) * 2);
    return Float{widen(halves[0]), widen(halves[1]), widen(halves[2]), widen(halves[3])};
  }
  static inline float half(const std::byte* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
  static inline Float load_bfloat(const std::byte* p) { return load_bfloat_part(p, width); }
  static inline Float load_bfloat_part(const std::byte* p, int64_t n) {
    uint16_t upper[4] = {};
    __builtin_memcpy(upper, p, size_t(n) * 2);
    float x[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = uint32_t(upper[i]) << 16;
      __builtin_memcpy(x + i, &bits, sizeof bits);
    }
    return Float{x[0], x[1], x[2], x[3]};
  }
  static inline Float load_bytes(const std::byte* p) { return load_bytes_part(p, width); }
  static inline Float load_bytes_part(const std::byte* p, int64_t n) {
    uint8_t q[4] = {};
    __builtin_memcpy(q, p, size_t(n));
    return Float{float(q[0]), float(q[1]), float(q[2]), float(q[3])};
  }
  static inline Float load_nibbles(const std::byte* p) { return load_nibbles_part(p, width); }
  static inline Float load_nibbles_part(const std::byte* p, int64_t n) {
    uint8_t q[2] = {};
    __builtin_memcpy(q, p, size_t(n + 1) / 2);
    return Float{float(q[0] & 15), float(q[0] >> 4), float(q[1] & 15), float(q[1] >> 4)};
  }
  static inline void store(std::byte* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }
  static inline void stream(std::byte* p, Float x) { store(p, x); }
  static inline void store_part(std::byte* p, Float x, int64_t n) { __builtin_memcpy(p, &x, size_t(n) * 4); }
  static inline void store_half(std::byte* p, Float x) { store_half_part(p, x, width); }
  static inline void store_half_part(std::byte* p, Float x, int64_t n) {
    const uint16_t halves[4] = {narrow_to_half(x[0]), narrow_to_half(x[1]), narrow_to_half(x[2]), narrow_to_half(x[3])};
    __builtin_memcpy(p, halves, size_t(n) * 2);
  }
  static inline void store_bfloat(std::byte* p, Float x) { store_bfloat_part(p, x, width); }
  static inline void store_bfloat_part(std::byte* p, Float x, int64_t n) {
    const uint16_t upper[4] = {narrow_to_bfloat(x[0]), narrow_to_bfloat(x[1]), narrow_to_bfloat(x[2]),
                               narrow_to_bfloat(x[3])};
    __builtin_memcpy(p, upper, size_t(n) * 2);
  }
  static inline Float greater(Float a, Float b) {
    for (int i = 0; i < int(width); ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
  static inline Float multiply_add(Float a, Float b, Float c) { return a * b + c; }

 private:
  // binary32 → binary16, to nearest even; beyond 65,520 infinite. Of NaN the sign and the upper payload stay, quiet, as
  // the hardware conversions do it.
  static inline uint16_t narrow_to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x03ff));
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {
      // The last bit of a sum from 0.5 to 1 is worth 2^-24, a subnormal half's unit: the addition rounds.
      float shifted;
      __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
      shifted += 0.5f;
      __builtin_memcpy(&magnitude, &shifted, sizeof magnitude);
      return uint16_t(sign | (magnitude - 0x3f000000));
    }
    return uint16_t(sign | (magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13);
  }
  // The upper half of a binary32, to nearest even; NaN as above.
  static inline uint16_t narrow_to_bfloat(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  // IEEE 754 binary16 → binary32, exact. A subnormal goes through an integer: correct even where the thread flushes
  // subnormal floats to zero. A signalling NaN becomes quiet, as the hardware conversions do it.
  static inline float widen(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    uint32_t bits;
    if (magnitude < 0x0400) {
      const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
      __builtin_memcpy(&bits, &subnormal, sizeof bits);
    } else if (magnitude < 0x7c00) {
      bits = (magnitude << 13) + (112u << 23);
    } else {
      bits = 0x7f800000 | (magnitude << 13) | (magnitude > 0x7c00 ? 0x00400000 : 0);
    }
    bits |= sign;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace

void pool_scalar(PoolTask& task, Lookahead& ahead) { pool<Scalar>(task, ahead); }

}  // namespace sidepool::kernels
