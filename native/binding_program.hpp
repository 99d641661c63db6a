// Programs as Python gives them.
#pragma once
#include <nanobind/nanobind.h>

#include "program.hpp"

namespace sidepool {

// lookups: (table, pooling, padding_index or None, begin, ids). inputs: (whether bytes, begin, count). steps: (op, sizes, depth,
// operands), the first operand being what is written; an operand: (space, offset, stride of every size).
// external: None, or called in place of steps with a list of `[samples, floats]` and an array `[samples, dim]` to fill in.
ProgramSpec program_spec(int32_t words, int64_t floats, const nanobind::list& lookups, const nanobind::list& inputs,
                         const nanobind::list& steps, const nanobind::object& external);

}  // namespace sidepool
