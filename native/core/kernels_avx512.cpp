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
  static inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static inline void store_part(float* p, Float x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
  static inline Float greater(Float a, Float b) { return _mm512_maskz_max_ps(kAll, a, b); }
  static inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

void pool_avx512(PoolTask& task, Lookahead& ahead) { pool<Avx512>(task, ahead); }

}  // namespace sidepool::kernels
#endif
