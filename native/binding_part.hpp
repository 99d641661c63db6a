// How Python hands over the requests of a lookup.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "part.hpp"

namespace nb = nanobind;

namespace sidepool {

// An array as it is: a converted copy would be gone before the lookup reads it, or take the results with it.
template <class T>
T exact(nb::handle item, const char* wanted) {
  T array;
  if (!nb::try_cast<T>(item, array, false)) throw nb::type_error(wanted);
  return array;
}

// Appends `(values, lengths, weights)`; the arrays must outlive the part. Raises TypeError for what is not taken as it is.
void add_part(nb::handle item, std::vector<Part>& parts);

}  // namespace sidepool
