// Tables, and frames that are served again and again.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>

#include "binding_program.hpp"
#include "binding_types.hpp"
#include "pooling.hpp"
#include "prepared.hpp"

using namespace nb::literals;

namespace sidepool {
namespace {

using RowArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check_range(const PreparedFrames& frames, size_t first, size_t count) {
  if (first > frames.size() || count > frames.size() - first) throw nb::index_error("frames");
}

// The row format that an array's own type says.
RowFormat float_format(const RowArray& rows) {
  const auto type = rows.dtype();
  if (type == nb::dtype<float>()) return RowFormat::fp32;
  if (type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) return RowFormat::fp16;
  throw nb::type_error("rows: wants float32 or float16, or a row_format");
}

nb::tuple pool_one(const PyTables& tables, int32_t feature, Array<int64_t> values, Array<int32_t> lengths,
                   std::optional<Array<float>> weights, Rows out) {
  const TableSet& set = *tables.set;
  if (feature < 0 || feature >= set.feature_count() || set.feature(feature).table < 0) throw nb::index_error("feature");
  const Table& table = set.table(set.feature(feature).table);
  const Pooling pooling = set.feature(feature).pooling;
  const size_t rows = pooling == Pooling::none ? values.shape(0) : lengths.shape(0);
  if (out.shape(0) != rows || int64_t(out.shape(1)) != table.dim || (weights && weights->shape(0) != values.shape(0)))
    throw nb::value_error("out or weights: wrong shape");
  BagInput input;
  input.values = values.data();
  input.value_count = int64_t(values.shape(0));
  input.lengths = lengths.data();
  input.batch = int32_t(lengths.shape(0));
  input.weights = weights ? weights->data() : nullptr;
  PoolCounts counts;
  Fault fault;
  void* to = out.data();
  const OutputFormat output = output_format(out);
  const int64_t stride = rows > 1 ? out.stride(0) : table.dim;
  {
    nb::gil_scoped_release release;
    fault = pool_feature(table, pooling, input, to, stride, counts, output, set.feature(feature).padding_index);
  }
  return nb::make_tuple(int(fault.status), int(fault.reason), fault.bag, fault.value);
}

}  // namespace

const std::shared_ptr<TableSet>& sealed(const PyTables& tables) {
  if (!tables.set->sealed()) throw nb::value_error("tables: seal() them first");
  return tables.set;
}

OutputFormat output_format(const Rows& rows) {
  const auto type = rows.dtype();
  if (type == nb::dtype<float>()) return OutputFormat::fp32;
  if (type == nb::dtype<uint16_t>()) return OutputFormat::bf16;
  if (type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) return OutputFormat::fp16;
  throw nb::type_error("out: wants float32, float16, or uint16 for bf16");
}

void bind_tables(nb::module_& m) {
  m.def("pool", &pool_one, "tables"_a, "feature"_a, "values"_a, "lengths"_a, "weights"_a.none(), "out"_a.noconvert());

  nb::class_<PyTables>(m, "TableSet")
      .def("__init__", [](PyTables* self, int64_t epoch, int32_t tables, int32_t features) {
            new (self) PyTables{std::make_shared<TableSet>(epoch, tables, features)};
          }, "epoch"_a, "tables"_a, "features"_a)
      .def("add_table_file", [](PyTables& self, int32_t table, const std::string& path, int64_t offset, int64_t rows, int32_t dim,
                                const std::string& format, const std::string& policy, int64_t default_row) {
            self.set->add_file(table, path, offset, rows, dim, parse_row_format(format), parse_out_of_range(policy), default_row);
          }, "table"_a, "path"_a, "offset"_a, "rows"_a, "dim"_a, "row_format"_a, "out_of_range"_a, "default_row"_a)
      .def("add_table_array", [](PyTables& self, int32_t table, RowArray rows, const std::string& policy, int64_t default_row,
                                 const std::string& format_name, int32_t dim) {
            const RowFormat format = format_name.empty() ? float_format(rows) : parse_row_format(format_name);
            if (dim == 0) dim = int32_t(std::min(rows.shape(1), size_t(INT32_MAX)));
            if (dim < 1 || dim > kMaxDim || rows.shape(1) * rows.itemsize() != row_bytes(format, dim))
              throw nb::value_error("rows: their bytes are not those of dim values in this row format");
            self.set->add_copy(table, rows.data(), int64_t(rows.shape(0)), dim, format, parse_out_of_range(policy), default_row);
          }, "table"_a, "rows"_a, "out_of_range"_a, "default_row"_a, "row_format"_a = "", "dim"_a = 0)
      .def("add_feature", [](PyTables& self, int32_t feature, int32_t table, const std::string& pooling, bool weighted,
                             std::optional<int64_t> padding_index, int32_t shards) {
            self.set->add_feature(feature, table, parse_pooling(pooling), weighted, padding_index.value_or(kNoPadding), shards);
          }, "feature"_a, "table"_a, "pooling"_a, "weighted"_a, "padding_index"_a = nb::none(), "shards"_a = 1)
      .def("add_program", [](PyTables& self, int32_t table, int32_t words, int64_t floats, const nb::list& lookups,
                             const nb::list& inputs, const nb::list& steps, const nb::object& external) {
            self.set->add_program(table, program_spec(words, floats, lookups, inputs, steps, external));
          }, "table"_a, "words"_a, "floats"_a, "lookups"_a, "inputs"_a, "steps"_a, "external"_a = nb::none())
      .def("seal", [](PyTables& self) { self.set->seal(); })
      .def("set_memory", [](PyTables& self, const std::string& huge_pages, const std::vector<int>& nodes) {
            self.set->set_memory({parse_huge_pages(huge_pages), nodes});
          }, "huge_pages"_a, "nodes"_a)
      .def("reserve", [](PyTables& self) { self.set->reserve(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("promote", [](PyTables& self, int64_t at_least) { return self.set->promote(at_least); },
           "at_least"_a = std::numeric_limits<int64_t>::max(), nb::call_guard<nb::gil_scoped_release>())
      .def("share", [](PyTables& self, int32_t table, const PyTables& other, int32_t others_table) {
            nb::gil_scoped_release release;
            return self.set->share(table, *other.set, others_table);
          }, "table"_a, "other"_a, "others_table"_a)
      .def("choose_lookahead", [](PyTables& self, int64_t bytes) {
            if (bytes < 0) throw nb::value_error("bytes: 0 or more");
            nb::gil_scoped_release release;
            self.set->choose_lookahead(bytes);
          }, "bytes"_a)
      .def("rows_ahead", [](const PyTables& self, int32_t table) {
            if (table < 0 || table >= self.set->table_count()) throw nb::index_error("table");
            return self.set->table(table).rows_ahead.load(std::memory_order_relaxed);
          }, "table"_a)
      .def_prop_ro("placement_error", [](const PyTables& self) { return self.set->placement_error(); })
      .def_prop_ro("epoch", [](const PyTables& self) { return self.set->epoch(); })
      .def_prop_ro("bytes", [](const PyTables& self) { return self.set->bytes(); })
      .def_prop_ro("huge_bytes", [](const PyTables& self) { return self.set->huge_bytes(); });

  nb::class_<PreparedFrames>(m, "PreparedFrames")
      .def("__init__", [](PreparedFrames* self, const PyTables& tables, const std::vector<nb::bytes>& frames) {
            PreparedFrames prepared(sealed(tables));
            for (const nb::bytes& frame : frames) prepared.add({frame.c_str(), frame.size()});
            new (self) PreparedFrames(std::move(prepared));
          }, "tables"_a, "frames"_a)
      .def("serve", [](PreparedFrames& self, size_t first, size_t count) {
            check_range(self, first, count);
            nb::gil_scoped_release release;
            return int(self.serve(first, count));
          }, "first"_a, "count"_a)
      .def("read_rows", [](const PreparedFrames& self, size_t first, size_t count, int64_t bytes_ahead) {
            check_range(self, first, count);
            nb::gil_scoped_release release;
            return self.read_rows(first, count, bytes_ahead);
          }, "first"_a, "count"_a, "bytes_ahead"_a)
      .def("payload", [](const PreparedFrames& self) { return nb::bytes(self.payload().data(), self.payload().size()); })
      .def("__len__", &PreparedFrames::size);
}

}  // namespace sidepool
