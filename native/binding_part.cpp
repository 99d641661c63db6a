#include "binding_part.hpp"

namespace sidepool {
namespace {

template <class T>
using AnyArray = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

void set_values(Part& part, const void* ids, nb::dlpack::dtype type) {
  part.values = ids;
  part.int32_values = type == nb::dtype<int32_t>();
  if (!part.int32_values && type != nb::dtype<int64_t>()) throw nb::type_error("ids: wants int64 or int32");
}

}  // namespace

void add_part(nb::handle item, std::vector<Part>& parts) {
  const nb::tuple t = nb::cast<nb::tuple>(item);
  if (t.size() != 3) throw nb::type_error("a part is (values, lengths, weights)");
  Part part;
  if (t[1].is_none()) {
    const auto ids = exact<nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>>(t[0], "ids: wants contiguous int64 or int32 [batch, width]");
    set_values(part, ids.data(), ids.dtype());
    part.fixed_batch = int64_t(ids.shape(0));
    part.fixed_width = int64_t(ids.shape(1));
    part.value_count = part.fixed_batch * part.fixed_width;
  } else {
    const auto values = exact<nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(t[0], "values: wants contiguous int64 or int32 [nnz]");
    const auto lengths = exact<AnyArray<int32_t>>(t[1], "lengths: wants contiguous int32");
    set_values(part, values.data(), values.dtype());
    part.value_count = int64_t(values.shape(0));
    // An empty array may have no address; a part is jagged because it has lengths, however few.
    static const int32_t nothing = 0;
    part.lengths = lengths.size() > 0 ? lengths.data() : &nothing;
    part.length_count = int64_t(lengths.size());
  }
  if (!t[2].is_none()) {
    const auto weights = exact<AnyArray<float>>(t[2], "weights: wants contiguous float32");
    static const float nothing = 0;
    part.weights = weights.size() > 0 ? weights.data() : &nothing;
    part.weight_count = int64_t(weights.size());
  }
  parts.push_back(part);
}

}  // namespace sidepool
