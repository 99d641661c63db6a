// Operators of programs with AVX512.
#if defined(__x86_64__)
#define SIDEPOOL_VECTOR_BYTES 64
#include "program_kernels_impl.hpp"

void sidepool::kernels::step_avx512(const Step& step, float* const* spaces) { run_step(step, spaces); }
#endif
