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
  static inline void store(std::byte* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }
  static inline void stream(std::byte* p, Float x) { store(p, x); }
  static inline void store_part(std::byte* p, Float x, int64_t n) { __builtin_memcpy(p, &x, size_t(n) * 4); }
  static inline void store_half(std::byte* p, Float x) { store_half_part(p, x, width); }
  static inline void store_half_part(std::byte* p, Float x, int64_t n) {
    const float16x4_t halves = vcvt_f16_f32(x);
    __builtin_memcpy(p, &halves, size_t(n) * 2);
  }
  static inline void store_bfloat(std::byte* p, Float x) { store_bfloat_part(p, x, width); }
  static inline void store_bfloat_part(std::byte* p, Float x, int64_t n) {
    const uint16x4_t bfloats = narrow_to_bfloats(x);
    __builtin_memcpy(p, &bfloats, size_t(n) * 2);
  }
  static inline Float greater(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

 private:
  static inline uint16x4_t narrow_to_bfloats(Float x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
    const uint16x4_t quiet = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
    return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), rounded, quiet);
  }
  static inline const uint8_t* bytes(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }
};

}  // namespace

void pool_neon(PoolTask& task, Lookahead& ahead) { pool<Neon>(task, ahead); }

}  // namespace sidepool::kernels
#endif
