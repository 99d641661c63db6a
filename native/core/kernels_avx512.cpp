// AVX-512 kernels: 16 floats a vector, 32 registers, masked tails.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_impl.hpp"

namespace sidepool::kernels {
namespace {

struct Avx512 {
  using Float = __m512;
  static constexpr int64_t width = 16;
  static constexpr int registers = 32;
  // The unmasked intrinsics start from an undefined vector, which GCC 12 warns of; a full mask costs nothing.
  static constexpr __mmask16 kAll = 0xffff;

  static inline __mmask16 lanes(int64_t n) { return __mmask16((1u << n) - 1); }
  static inline Float broadcast(float x) { return _mm512_set1_ps(x); }
  static inline Float load(const std::byte* p) { return _mm512_loadu_ps(p); }
  static inline Float load_part(const std::byte* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
  static inline Float load_half(const std::byte* p) {
    return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Float load_half_part(const std::byte* p, int64_t n) {
    return _mm512_maskz_cvtph_ps(kAll, _mm256_maskz_loadu_epi16(lanes(n), p));
  }
  static inline float half(const std::byte* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _cvtsh_ss(bits);
  }
  static inline Float load_bfloat(const std::byte* p) {
    return widen_bfloats(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Float load_bfloat_part(const std::byte* p, int64_t n) {
    return widen_bfloats(_mm256_maskz_loadu_epi16(lanes(n), p));
  }
  static inline Float load_bytes(const std::byte* p) {
    return widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load_bytes_part(const std::byte* p, int64_t n) {
    return widen_bytes(_mm_maskz_loadu_epi8(lanes(n), p));
  }
  static inline Float load_nibbles(const std::byte* p) {
    return widen_nibbles(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load_nibbles_part(const std::byte* p, int64_t n) {
    return widen_nibbles(_mm_maskz_loadu_epi8(lanes((n + 1) / 2), p));
  }
  static inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static inline void store_part(float* p, Float x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
  static inline Float greater(Float a, Float b) { return _mm512_maskz_max_ps(kAll, a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

 private:
  static inline Float widen_bfloats(__m256i x) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, x), 16));
  }
  static inline Float widen_bytes(__m128i x) {
    return _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, x));
  }
  static inline Float widen_nibbles(__m128i x) {
    const __m128i low = _mm_set1_epi8(15);
    return widen_bytes(_mm_unpacklo_epi8(_mm_and_si128(x, low), _mm_and_si128(_mm_srli_epi16(x, 4), low)));
  }
};

}  // namespace

void pool_avx512(PoolTask& task, Lookahead& ahead) { pool<Avx512>(task, ahead); }

}  // namespace sidepool::kernels
#endif
