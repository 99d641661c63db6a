// The seam between program.cpp and its operators, compiled once per SIMD level. As in kernels.hpp: plain data and internal
// linkage only.
#pragma once
#include "program.hpp"

namespace sidepool::kernels {

// Runs one checked step on one sample. spaces: the first element of every space.
using StepKernel = void (*)(const Step& step, float* const* spaces);

void step_scalar(const Step& step, float* const* spaces);
#if defined(__x86_64__)
void step_avx2(const Step& step, float* const* spaces);
void step_avx512(const Step& step, float* const* spaces);
#endif

// Of the SIMD level in use.
StepKernel step_kernel();

}  // namespace sidepool::kernels
