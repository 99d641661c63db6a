// The load generator's part of the binding.
#pragma once
#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace sidepool {

void bind_load(nb::module_& m);

}  // namespace sidepool
