// Programs as Python gives them: converted here, checked in the core.
#include "binding_program.hpp"

#include <algorithm>

#include <memory>

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace sidepool {
namespace {

using Numbers = std::vector<int64_t>;

Operand operand(const Numbers& given, size_t rank) {
  if (given.size() != rank + 2 || given[0] < 0 || given[0] > INT32_MAX)
    throw nb::value_error("steps: an operand has a space, an offset and a stride for every size");
  Operand found;
  found.space = int32_t(given[0]);
  found.offset = given[1];
  std::copy(given.begin() + 2, given.end(), found.strides);
  return found;
}

Step step(const nb::handle& given) {
  const auto [op, sizes, depth, operands] = nb::cast<std::tuple<std::string, Numbers, int64_t, std::vector<Numbers>>>(given);
  if (sizes.size() > size_t(kMaxRank) || operands.size() < 2 || operands.size() > 4)
    throw nb::value_error("steps: found too many sizes, or not 2 to 4 operands");
  Step found;
  found.op = parse_step_op(op);
  found.rank = int32_t(sizes.size());
  found.operands = int32_t(operands.size()) - 1;
  found.depth = depth;
  std::copy(sizes.begin(), sizes.end(), found.sizes);
  found.out = operand(operands[0], sizes.size());
  for (size_t i = 1; i < operands.size(); ++i) found.in[i - 1] = operand(operands[i], sizes.size());
  return found;
}

using Values = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

// Called, and let go, by threads that do not hold the GIL.
External external_call(const nb::object& function) {
  std::shared_ptr<nb::object> held(new nb::object(function), [](nb::object* gone) {
    nb::gil_scoped_acquire acquire;
    delete gone;
  });
  return [held](const ExternalCall& call) {
    nb::gil_scoped_acquire acquire;
    try {
      nb::list leaves;
      for (size_t i = 0; i < call.count; ++i)
        leaves.append(nb::cast(Values(call.leaves[i], {size_t(call.samples), size_t(call.floats[i])}), nb::rv_policy::reference));
      (*held)(leaves, nb::cast(Values(call.results, {size_t(call.samples), size_t(call.dim)}), nb::rv_policy::reference));
      return true;
    } catch (nb::python_error& e) {
      e.restore();
      PyErr_WriteUnraisable(held->ptr());
      return false;
    }
  };
}

}  // namespace

ProgramSpec program_spec(int32_t words, int64_t floats, const nb::list& lookups, const nb::list& inputs, const nb::list& steps,
                         const nb::object& external) {
  ProgramSpec spec;
  if (!external.is_none()) spec.external = external_call(external);
  spec.words = words;
  spec.floats = floats;
  for (const nb::handle given : lookups) {
    const auto [table, pooling, padding, begin, ids] =
        nb::cast<std::tuple<int32_t, std::string, std::optional<int64_t>, int32_t, int32_t>>(given);
    spec.lookups.push_back({table, parse_pooling(pooling), padding.value_or(kNoPadding), begin, ids});
  }
  for (const nb::handle given : inputs) {
    const auto [bytes, begin, count] = nb::cast<std::tuple<bool, int32_t, int32_t>>(given);
    spec.inputs.push_back({bytes, begin, count});
  }
  for (const nb::handle given : steps) spec.steps.push_back(step(given));
  return spec;
}

}  // namespace sidepool
