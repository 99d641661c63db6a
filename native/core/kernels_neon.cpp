// NEON kernels: 4 floats a vector, 32 registers.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels_impl.hpp"

namespace sidepool::kernels {
namespace {

struct Neon {
  using Float = float32x4_t;
  static constexpr int64_t width = 4;
  static constexpr int registers = 32;

  static inline Float broadcast(float x) { return vdupq_n_f32(x); }
  static inline Float load(const std::byte* p) { return vreinterpretq_f32_u8(vld1q_u8(bytes(p))); }
  static inline Float load_part(const std::byte* p, int64_t n) {
    Float part = vdupq_n_f32(0.0f);
    __builtin_memcpy(&part, p, size_t(n) * 4);
    return part;
  }
  static inline Float load_half(const std::byte* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes(p)))); }
  static inline Float load_half_part(const std::byte* p, int64_t n) {
    uint8_t halves[8] = {};
    __builtin_memcpy(halves, p, size_t(n) * 2);
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves)));
  }
  static inline float half(const std::byte* p) { return vgetq_lane_f32(load_half_part(p, 1), 0); }
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
  static inline void store(float* p, Float x) { vst1q_f32(p, x); }
  static inline void store_part(float* p, Float x, int64_t n) { __builtin_memcpy(p, &x, size_t(n) * 4); }
  static inline Float greater(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

 private:
  static inline const uint8_t* bytes(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }
};

}  // namespace

void pool_neon(PoolTask& task, Lookahead& ahead) { pool<Neon>(task, ahead); }

}  // namespace sidepool::kernels
#endif
