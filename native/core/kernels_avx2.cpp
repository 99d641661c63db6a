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
  static inline Float load_half_part(const std::byte* p, int64_t n) {
    __m128i halves = _mm_setzero_si128();
    __builtin_memcpy(&halves, p, size_t(n) * 2);
    return _mm256_cvtph_ps(halves);
  }
  static inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static inline void store_part(float* p, Float x, int64_t n) { _mm256_maskstore_ps(p, lanes(n), x); }
  static inline Float greater(Float a, Float b) { return _mm256_max_ps(a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

void pool_avx2(PoolTask& task, Lookahead& ahead) { pool<Avx2>(task, ahead); }

}  // namespace sidepool::kernels
#endif
