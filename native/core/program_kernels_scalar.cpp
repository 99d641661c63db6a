// Operators of programs for any machine: vectors of four that the compiler lowers to what the baseline has.
#define SIDEPOOL_VECTOR_BYTES 16
#include "program_kernels_impl.hpp"

void sidepool::kernels::step_scalar(const Step& step, float* const* spaces) { run_step(step, spaces); }
