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
  static inline void store(std::byte* p, Float x) { _mm512_storeu_ps(p, x); }
  static inline void stream(std::byte* p, Float x) { _mm512_stream_ps(reinterpret_cast<float*>(p), x); }
  static inline void store_part(std::byte* p, Float x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
  static inline void store_half(std::byte* p, Float x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_to_halves(x));
  }
  static inline void store_half_part(std::byte* p, Float x, int64_t n) {
    _mm256_mask_storeu_epi16(p, lanes(n), narrow_to_halves(x));
  }
  static inline void store_bfloat(std::byte* p, Float x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_to_bfloats(x));
  }
  static inline void store_bfloat_part(std::byte* p, Float x, int64_t n) {
    _mm256_mask_storeu_epi16(p, lanes(n), narrow_to_bfloats(x));
  }
  static inline Float greater(Float a, Float b) { return _mm512_maskz_max_ps(kAll, a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

 private:
  static inline __m256i narrow_to_halves(Float x) {
    return _mm512_maskz_cvtps_ph(kAll, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Not every CPU of this level has vcvtneps2bf16, which also flushes subnormals.
  static inline __m256i narrow_to_bfloats(Float x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i upper = _mm512_maskz_srli_epi32(kAll, bits, 16);
    const __m512i odd = _mm512_maskz_and_epi32(kAll, upper, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i rounded = _mm512_maskz_srli_epi32(kAll, sum, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
    return _mm512_maskz_cvtepi32_epi16(kAll, quiet);
  }
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
