// What Python hands over, by type; shared by the parts of the binding.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>

#include "tables.hpp"

namespace nb = nanobind;

namespace sidepool {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// Results: float32, float16, or bf16 as uint16, its bits (NumPy has no bfloat16).
using Rows = nb::ndarray<nb::ndim<2>, nb::device::cpu>;

struct PyTables {
  std::shared_ptr<TableSet> set;
};

// Of a set that lookups may use: ValueError unless it is sealed.
const std::shared_ptr<TableSet>& sealed(const PyTables& tables);

// The output format that an array's own type says.
OutputFormat output_format(const Rows& rows);

// Classes, defined where their functions are.
void bind_tables(nb::module_& m);
nb::class_<class SidecarServer> bind_server(nb::module_& m);
nb::class_<class LookupClient> bind_client(nb::module_& m);

}  // namespace sidepool
