// What knows Python, with the other binding_*.cpp: converts arguments and results, releases the GIL, decides nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "binding_load.hpp"
#include "binding_rdma.hpp"
#include "binding_types.hpp"
#include "lookahead.hpp"
#include "parent.hpp"
#include "pooling.hpp"
#include "reasons.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace sidepool;

namespace {

const char* output_name(OutputFormat output) {
  return output == OutputFormat::fp32 ? "fp32" : output == OutputFormat::fp16 ? "fp16" : "bf16";
}

nb::dict inspect_frame(nb::bytes bytes) {
  const size_t n = bytes.size();
  nb::dict d;
  if (n < 64) throw Error(Status::frame, "frame: " + std::to_string(n) + " bytes are fewer than any frame has");
  std::vector<uint64_t> memory((n + 63) / 8 + 8);
  std::byte* frame = reinterpret_cast<std::byte*>(align_up(reinterpret_cast<uintptr_t>(memory.data())));
  std::memcpy(frame, bytes.data(), n);
  const FrameKind kind = FrameKind(frame[5]);
  if (kind == FrameKind::request) {
    ParsedRequest r;
    if (parse_request(frame, n, r) != Status::ok) throw Error(Status::frame, "frame: not a valid request");
    d["kind"] = "request";
    d["slot"] = r.header.slot;
    d["priority"] = r.header.priority;
    d["lookup_id"] = r.header.lookup_id;
    d["epoch"] = r.header.epoch;
    d["budget_ns"] = r.header.budget_ns;
    d["batch"] = r.header.batch;
    d["output_format"] = output_name(r.header.output_format);
    d["trace"] = nb::bytes(reinterpret_cast<const char*>(r.header.trace), sizeof r.header.trace);
    nb::list features;
    const int32_t* lengths = r.lengths;
    const int64_t* values = r.values;
    const float* weights = r.weights;
    for (const FeatureEntry& e : r.entries) {
      nb::dict f;
      f["feature"] = e.feature;
      nb::list l, v, w;
      if (e.fixed_length < 0)
        for (uint32_t b = 0; b < e.bag_count(r.header.batch); ++b) l.append(*lengths++);
      for (uint64_t i = 0; i < e.value_count; ++i) v.append(*values++);
      // Of parts of cut tables only.
      if (e.shard != 0) f["shard"] = e.shard;
      if (e.bags != 0) f["bags"] = e.bags;
      if (e.flags & kPartialEntry) f["partial"] = true;
      if (e.flags & kRowsEntry) f["rows"] = true;
      f["fixed_length"] = e.fixed_length;
      f["lengths"] = l;
      f["values"] = v;
      if (e.flags & kWeightedEntry)
        for (uint64_t i = 0; i < e.value_count; ++i) w.append(*weights++);
      f["weights"] = w;
      features.append(f);
    }
    d["features"] = features;
    return d;
  }
  ResponseHeader h;
  if (n < sizeof h) throw Error(Status::frame, "frame: too short");
  std::memcpy(&h, frame, sizeof h);
  if (kind != FrameKind::response || check_response_header(h, kMaxFeatures) != Status::ok || h.frame_bytes > n)
    throw Error(Status::frame, "frame: not a valid request or response");
  d["kind"] = "response";
  d["slot"] = h.slot;
  d["status"] = h.status;
  d["reason"] = h.reason;
  d["lookup_id"] = h.lookup_id;
  d["epoch"] = h.epoch;
  d["first"] = h.first;
  d["count"] = h.count;
  d["batch"] = h.batch;
  d["last"] = (h.flags & kLastPiece) != 0;
  d["fault_feature"] = h.fault_feature;
  d["fault_bag"] = h.fault_bag;
  d["fault_value"] = h.fault_value;
  d["payload"] = nb::bytes(reinterpret_cast<const char*>(frame + sizeof h), h.frame_bytes - sizeof h);
  d["frame_bytes"] = h.frame_bytes;
  return d;
}

}  // namespace

NB_MODULE(_native, m) {
  static nb::exception<Error> native_error(m, "NativeError");
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Error& e) {
      PyObject* args = Py_BuildValue("(is)", int(e.status), e.what());
      PyErr_SetObject(native_error.ptr(), args);
      Py_XDECREF(args);
    }
  });
  m.attr("WIRE_VERSION") = int(kWireVersion);
  m.attr("CLIENT_TIMING_FIELDS") = nb::make_tuple("lane_out_ns", "queue_ns", "pool_ns", "lane_back_ns", "request_bytes", "response_bytes");
  m.def("simd_level", &simd_level);
  m.def("simd_levels", &simd_levels);
  m.def("force_simd_level", &force_simd_level, "level"_a);
  m.def("reason_text", [](int reason) { return std::string(reason_text(Reason(reason))); }, "reason"_a);
  m.def("inspect_frame", &inspect_frame, "frame"_a);
  m.def("measure_lookahead", [](const std::vector<int32_t>& dims) {
    std::vector<RowKind> kinds;
    for (const int32_t dim : dims) {
      if (dim < 1 || dim > kMaxDim) throw nb::value_error("dims: 1 to 4096");
      kinds.push_back({RowFormat::fp32, dim, 0});
    }
    {
      nb::gil_scoped_release release;
      measure_lookahead(kinds, kMeasureLookaheadNs);
    }
    std::vector<int32_t> rows;
    for (const RowKind& kind : kinds) rows.push_back(kind.rows_ahead);
    return rows;
  }, "dims"_a);
  m.def("end_with_parent", [](double grace_s) { end_with_parent(uint64_t(grace_s * 1e9)); }, "grace_s"_a);
  m.def(
      "crc32c",
      [](nb::object data, uint32_t seed) {
        Py_buffer view;
        if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw nb::python_error();
        uint32_t crc;
        {
          nb::gil_scoped_release release;
          crc = crc32c(view.buf, size_t(view.len), seed);
        }
        PyBuffer_Release(&view);
        return crc;
      },
      "data"_a, "seed"_a = 0);
  bind_tables(m);
  auto server = bind_server(m);
  auto client = bind_client(m);
  bind_rdma(m, server, client);
  bind_load(m);
}
