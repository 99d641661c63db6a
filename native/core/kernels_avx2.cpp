// AVX2 kernels (with FMA and F16C, which every CPU with AVX2 has): 8 floats a vector, 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_impl.hpp"

namespace sidepool::kernels {
namespace {

struct Avx2 {
  using Float = __m256;
  static constexpr int64_t width = 8;
  static constexpr int registers = 16;

  static inline __m256i lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline Float broadcast(float x) { return _mm256_set1_ps(x); }
  static inline Float load(const std::byte* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static inline Float load_part(const std::byte* p, int64_t n) {
    return _mm256_maskload_ps(reinterpret_cast<const float*>(p), lanes(n));
  }
  static inline Float load_half(const std::byte* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load_half_part(const std::byte* p, int64_t n) { return _mm256_cvtph_ps(part(p, size_t(n) * 2)); }
  static inline float half(const std::byte* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _cvtsh_ss(bits);
  }
  static inline Float load_bfloat(const std::byte* p) {
    return widen_bfloats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load_bfloat_part(const std::byte* p, int64_t n) { return widen_bfloats(part(p, size_t(n) * 2)); }
  static inline Float load_bytes(const std::byte* p) {
    return widen_bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load_bytes_part(const std::byte* p, int64_t n) { return widen_bytes(part(p, size_t(n))); }
  static inline Float load_nibbles(const std::byte* p) { return widen_nibbles(part(p, 4)); }
  static inline Float load_nibbles_part(const std::byte* p, int64_t n) {
    return widen_nibbles(part(p, size_t(n + 1) / 2));
  }
  static inline void store(std::byte* p, Float x) { _mm256_storeu_ps(reinterpret_cast<float*>(p), x); }
  static inline void stream(std::byte* p, Float x) { _mm256_stream_ps(reinterpret_cast<float*>(p), x); }
  static inline void store_part(std::byte* p, Float x, int64_t n) {
    _mm256_maskstore_ps(reinterpret_cast<float*>(p), lanes(n), x);
  }
  static inline void store_half(std::byte* p, Float x) { store_half_part(p, x, width); }
  static inline void store_half_part(std::byte* p, Float x, int64_t n) {
    const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &halves, size_t(n) * 2);
  }
  static inline void store_bfloat(std::byte* p, Float x) { store_bfloat_part(p, x, width); }
  static inline void store_bfloat_part(std::byte* p, Float x, int64_t n) {
    const __m128i bfloats = narrow_to_bfloats(x);
    __builtin_memcpy(p, &bfloats, size_t(n) * 2);
  }
  static inline Float greater(Float a, Float b) { return _mm256_max_ps(a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

 private:
  static inline __m128i part(const std::byte* p, size_t bytes) {
    __m128i x = _mm_setzero_si128();
    __builtin_memcpy(&x, p, bytes);
    return x;
  }
  static inline __m128i narrow_to_bfloats(Float x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    // Packed within each half of the vector: the two quarters that count are brought together.
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08));
  }
  static inline Float widen_bfloats(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static inline Float widen_bytes(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)); }
  static inline Float widen_nibbles(__m128i x) {
    const __m128i low = _mm_set1_epi8(15);
    return widen_bytes(_mm_unpacklo_epi8(_mm_and_si128(x, low), _mm_and_si128(_mm_srli_epi16(x, 4), low)));
  }
};

}  // namespace

void pool_avx2(PoolTask& task, Lookahead& ahead) { pool<Avx2>(task, ahead); }

}  // namespace sidepool::kernels
#endif
