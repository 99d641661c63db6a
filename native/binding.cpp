// What knows Python, with binding_rdma.cpp: converts arguments and results, releases the GIL, decides nothing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "binding_load.hpp"
#include "binding_part.hpp"
#include "binding_program.hpp"
#include "binding_rdma.hpp"
#include "client.hpp"
#include "lookahead.hpp"
#include "parent.hpp"
#include "prepared.hpp"
#include "pooling.hpp"
#include "reasons.hpp"
#include "server.hpp"
#include "tables.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace sidepool;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// Results: float32, float16, or bf16 as uint16, its bits (NumPy has no bfloat16).
using Rows = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Numbers = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct PyTables {
  std::shared_ptr<TableSet> set;
};

Pooling as_pooling(const std::string& s) { return parse_pooling(s); }

const char* status_name(size_t status) {
  static const char* const names[] = {"OK", "REJECTED", "OVERLOADED", "DEADLINE", "TRANSPORT", "FRAME", "PLAN", "SHARD", "DRAINING", "INTERNAL"};
  return names[status];
}

nb::dict histogram(const std::vector<const Histogram*>& parts) {
  nb::list bounds, counts;
  int64_t sum = 0;
  for (size_t b = 0; b < Histogram::kBuckets; ++b) {
    int64_t n = 0;
    for (const Histogram* h : parts) n += h->count(b);
    if (b + 1 < Histogram::kBuckets) bounds.append(int64_t(1) << b);
    counts.append(n);
  }
  for (const Histogram* h : parts) sum += h->sum_us();
  nb::dict d;
  d["bounds"] = bounds;
  d["counts"] = counts;
  d["sum"] = sum;
  return d;
}

nb::dict server_stats(SidecarServer& server) {
  nb::dict d;
  const auto tables = server.published().get();
  d["epoch"] = tables ? tables->epoch() : 0;
  nb::list engines, lanes, table_list;
  int64_t statuses[kStatusCount] = {};
  std::vector<const Histogram*> queue, pool, blackout;
  for (const auto& engine : server.engines()) {
    const EngineCounters& c = engine->counters();
    nb::dict e;
    e["lanes"] = c.lanes.get();
    e["queued"] = c.queued.get();
    e["in_flight"] = engine->in_flight();
    e["served"] = c.served.get();
    e["shed"] = c.shed.get();
    e["shed_on_arrival"] = c.shed_on_arrival.get();
    e["helped"] = c.helped.get();
    e["busy_ns"] = c.busy_ns.get();
    e["moved"] = c.moved.get();
    if (const RdmaDomain* rdma = engine->rdma()) e["rdma"] = rdma_counters(rdma->counters(), rdma->thread_domain());
    engines.append(e);
    for (size_t s = 0; s < kStatusCount; ++s) statuses[s] += c.statuses[s].get();
    queue.push_back(&c.queue);
    pool.push_back(&c.pool);
    blackout.push_back(&c.blackout);
  }
  SidecarServer::Direct& direct = server.direct();
  std::vector<LaneStats> lane_stats = server.lane_stats();
  {
    std::lock_guard lock(direct.mutex);
    for (size_t s = 0; s < kStatusCount; ++s) statuses[s] += direct.counters.statuses[s].get();
    if (direct.lane.received.get() > 0)
      lane_stats.push_back({0, "grpc", -1, direct.lane.received.get(), direct.lane.sent.get(), direct.lane.request_bytes.get(),
                            direct.lane.response_bytes.get(), 0, direct.counters.pool.sum_us() * 1000, 0, 0, 0, 0, 0});
  }
  pool.push_back(&direct.counters.pool);
  for (const LaneStats& l : lane_stats) {
    nb::dict e;
    e["id"] = l.id;
    e["kind"] = l.kind;
    e["engine"] = l.engine;
    e["received"] = l.received;
    e["sent"] = l.sent;
    e["request_bytes"] = l.request_bytes;
    e["response_bytes"] = l.response_bytes;
    e["credit_waits"] = l.credit_waits;
    e["busy_ns"] = l.busy_ns;
    e["queued"] = l.queued;
    e["queued_bytes"] = l.queued_bytes;
    e["grants"] = l.grants;
    e["grant_us"] = l.grant_us;
    e["late_bytes"] = l.late_bytes;
    lanes.append(e);
  }
  const auto sums = server.table_stats();
  for (size_t i = 0; i < sums.size(); ++i) {
    nb::dict e;
    e["table"] = i;
    e["lookups"] = sums[i][0];
    e["rows"] = sums[i][1];
    e["bytes"] = sums[i][2];
    e["out_of_range"] = sums[i][3];
    e["bags"] = sums[i][4];
    nb::list top;
    for (const auto& [row, count] : server.top_rows(i)) top.append(nb::make_tuple(row, count));
    e["top_rows"] = top;
    e["rows_ahead"] = tables && int32_t(i) < tables->table_count() ? tables->table(int32_t(i)).rows_ahead.load() : 0;
    table_list.append(e);
  }
  nb::dict status_dict;
  for (size_t s = 0; s < kStatusCount; ++s) status_dict[status_name(s)] = statuses[s];
  d["engines"] = engines;
  d["lanes"] = lanes;
  d["tables"] = table_list;
  d["statuses"] = status_dict;
  d["queue_us"] = histogram(queue);
  d["pool_us"] = histogram(pool);
  d["blackout_us"] = histogram(blackout);
  return d;
}

nb::dict client_stats(LookupClient& client) {
  nb::dict d;
  const auto& t = client.totals();
  d["lookups"] = t.lookups.load();
  d["samples"] = t.samples.load();
  d["refused_parts"] = t.refused_parts.load();
  d["out_of_range"] = t.out_of_range.load();
  d["failovers"] = t.failovers.load();
  d["hedges"] = t.hedges.load();
  d["degraded"] = t.degraded.load();
  d["refused"] = t.refused.load();
  d["shed"] = t.shed.load();
  const ReceiveWindow& window = client.window();
  nb::dict w;
  if (window.bytes() == ReceiveWindow::kOpen)
    w["bytes"] = nb::none();
  else
    w["bytes"] = window.bytes();
  w["used_bytes"] = window.used();
  w["waiting"] = window.waiting();
  w["waits"] = window.totals().waits.load();
  w["shrunk"] = window.totals().shrunk.load();
  w["marks"] = window.totals().marks.load();
  d["window"] = w;
  nb::dict statuses;
  for (size_t s = 0; s < kStatusCount; ++s) statuses[status_name(s)] = t.statuses[s].load();
  d["statuses"] = statuses;
  nb::list lanes;
  for (size_t s = 0; s < client.sidecar_count(); ++s) {
    const auto lane = client.lane(int32_t(s));
    nb::dict l;
    l["sidecar"] = s;
    l["alive"] = lane && !lane->dead();
    l["kind"] = lane ? lane->kind() : "";
    l["lost"] = lane && lane->dead() ? lane->why_lost() : "";
    l["in_flight_bytes"] = client.in_flight_bytes(int32_t(s));
    if (lane) {
      const auto& c = lane->counters();
      l["sent"] = c.sent.load();
      l["received"] = c.received.load();
      l["request_bytes"] = c.request_bytes.load();
      l["response_bytes"] = c.response_bytes.load();
      l["credit_waits"] = c.credit_waits.load();
    }
    lanes.append(l);
  }
  d["lanes"] = lanes;
  nb::list rdma;
  if (const auto ranker = client.rdma())
    for (const auto& engine : ranker->engines()) {
      nb::dict e = rdma_counters(*engine.counters, engine.thread_domain);
      e["lanes"] = engine.lanes;
      rdma.append(e);
    }
  d["rdma"] = rdma;
  return d;
}

int32_t check_sidecar(const LookupClient& client, int64_t sidecar) {
  if (sidecar < 0 || sidecar >= int64_t(client.sidecar_count())) throw nb::index_error("sidecar");
  return int32_t(sidecar);
}

// Per leg: feature, first column, columns, first row, shard, holders, whether the rows of its table are cut.
using PyLeg = std::tuple<int32_t, int32_t, int32_t, int64_t, int32_t, std::vector<int32_t>, bool>;

void add_leg(Routes& routes, const PyLeg& leg) {
  const auto& [feature, column, columns, row, shard, holders, cut] = leg;
  const RoutedFeature& routed = routes.features.back();
  bool valid = column >= 0 && columns >= 1 && columns <= routed.dim - column && row >= 0 && row < routed.rows && shard >= 0 &&
               shard <= UINT16_MAX && !holders.empty();
  for (const int32_t holder : holders) valid &= holder >= 0 && holder < routes.sidecars;
  if (!valid) throw nb::value_error("legs: out of range");
  routes.add_leg(column, columns, row, uint16_t(shard), holders, cut);
}

std::shared_ptr<LookupClient> make_client(int64_t epoch, int32_t sidecars, uint32_t spin_us, bool degrade, Array<int64_t> rows,
                                          Array<int32_t> dims, const std::vector<std::string>& poolings, const std::vector<bool>& weighted,
                                          const std::vector<std::string>& policies, std::optional<Array<int32_t>> holders,
                                          const std::vector<PyLeg>& legs, const std::vector<int64_t>& default_rows,
                                          const std::vector<int64_t>& padding, bool ranker_pooling, double hedge_budget,
                                          uint32_t window_delay_us, int64_t max_ids) {
  const size_t n = rows.shape(0);
  const bool settled = legs.empty() || (default_rows.size() == n && padding.size() == n);
  if (n == 0 || dims.shape(0) != n || poolings.size() != n || weighted.size() != n || policies.size() != n || !settled ||
      (holders && holders->shape(0) != n) || holders.has_value() == !legs.empty())
    throw nb::value_error("per-feature arrays differ in length, or neither or both of sidecar_of_feature and legs are given");
  if (sidecars < 1 || sidecars > 4096) throw nb::value_error("sidecars: 1 to 4096");
  if (!(hedge_budget >= 0 && hedge_budget <= 1)) throw nb::value_error("hedge_budget: 0 to 1");
  if (max_ids < 0) throw nb::value_error("max_ids: 0 or more");
  Routes routes;
  routes.sidecars = sidecars;
  routes.rows_travel = ranker_pooling;
  size_t next = 0;
  for (size_t f = 0; f < n; ++f) {
    RoutedFeature feature;
    feature.rows = rows.data()[f];
    feature.dim = dims.data()[f];
    feature.pooling = as_pooling(poolings[f]);
    feature.weighted = weighted[f];
    feature.policy = parse_out_of_range(policies[f]);
    if (f < default_rows.size()) feature.default_row = default_rows[f];
    if (f < padding.size()) feature.padding_index = padding[f];
    if (feature.rows < 1 || feature.dim < 1 || feature.default_row < 0 || feature.default_row >= feature.rows)
      throw nb::value_error("rows, dims or default_rows out of range");
    routes.add_feature(feature);
    if (holders) add_leg(routes, {int32_t(f), 0, feature.dim, 0, 0, {holders->data()[f]}, false});
    const size_t first = next;
    for (; next < legs.size() && std::get<0>(legs[next]) == int32_t(f); ++next) add_leg(routes, legs[next]);
    if (!holders && next == first) throw nb::value_error("legs: every feature needs one, in feature order");
  }
  return std::make_shared<LookupClient>(epoch, std::move(routes), spin_us, degrade,
                                        ClientOptions{hedge_budget, uint64_t(window_delay_us) * 1000, max_ids});
}

// The output format that an array's own type says.
OutputFormat output_format(const Rows& rows) {
  const auto type = rows.dtype();
  if (type == nb::dtype<float>()) return OutputFormat::fp32;
  if (type == nb::dtype<uint16_t>()) return OutputFormat::bf16;
  if (type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) return OutputFormat::fp16;
  throw nb::type_error("out: wants float32, float16, or uint16 for bf16");
}

void check_outputs(const LookupClient& client, const std::vector<Part>& parts, const Rows& out, const std::vector<Rows>& sequences) {
  const Routes& routes = client.routes();
  int64_t samples = 0, width = 0;
  const int64_t features = int64_t(routes.features.size());
  for (const Part& p : parts) samples += p.lengths == nullptr ? p.fixed_batch : p.length_count / features;
  for (const RoutedFeature& f : routes.features) width += f.pooling == Pooling::none ? 0 : f.dim;
  if (int64_t(out.shape(0)) < samples || int64_t(out.shape(1)) != width || (width > 1 && samples > 0 && out.stride(1) != 1))
    throw nb::value_error("out: wants [samples of all parts, sum of dims] with contiguous rows");
  size_t at = 0;
  for (size_t f = 0; f < routes.features.size(); ++f) {
    if (routes.features[f].pooling != Pooling::none) continue;
    if (at >= sequences.size()) throw nb::value_error("sequences: one array per `none` feature is required");
    const Rows& rows = sequences[at++];
    if (rows.dtype() != out.dtype()) throw nb::type_error("sequences: wants the dtype of out");
    int64_t needed = 0;
    for (const Part& p : parts) needed += routes.sequence_rows(p, f);
    if (int64_t(rows.shape(1)) != routes.features[f].dim || int64_t(rows.shape(0)) < needed ||
        (rows.shape(0) > 1 && rows.stride(0) != routes.features[f].dim))
      throw nb::value_error("sequences: wants contiguous [values of the feature, dim]");
  }
}

nb::tuple lookup(LookupClient& client, nb::sequence part_list, Rows out, nb::sequence sequence_list, int64_t deadline_ns, int32_t priority,
                 nb::bytes trace, Numbers verdicts, Numbers timings) {
  static thread_local std::vector<Part> parts;
  parts.clear();
  for (nb::handle item : part_list) add_part(item, parts);
  std::vector<Rows> sequences;
  for (nb::handle item : sequence_list) sequences.push_back(exact<Rows>(item, "sequences: wants writeable [ids, dim]"));
  check_outputs(client, parts, out, sequences);
  if (deadline_ns <= 0) throw nb::value_error("deadline_ns: must be positive");
  if (trace.size() != 0 && trace.size() != sizeof RequestHeader::trace) throw nb::value_error("trace: 26 bytes or none");
  if (verdicts.shape(0) < parts.size() || verdicts.shape(1) != 5) throw nb::value_error("verdicts: wants [parts, 5] int64");
  if (timings.shape(0) < 1 + client.sidecar_count() || timings.shape(1) != 6) throw nb::value_error("timings: wants [1 + sidecars, 6] int64");

  std::byte* sequence_data[64];
  std::vector<std::byte*> many;
  std::byte** sequence_rows = sequence_data;
  if (sequences.size() > 64) {
    many.resize(sequences.size());
    sequence_rows = many.data();
  }
  for (size_t i = 0; i < sequences.size(); ++i) sequence_rows[i] = static_cast<std::byte*>(sequences[i].data());

  LookupCall call;
  call.parts = parts.data();
  call.part_count = parts.size();
  call.out = {static_cast<std::byte*>(out.data()), out.shape(0) > 1 ? out.stride(0) : int64_t(out.shape(1)), sequence_rows, output_format(out)};
  call.budget_ns = uint64_t(deadline_ns);
  call.priority = priority;
  call.trace = trace.size() != 0 ? reinterpret_cast<const uint8_t*>(trace.data()) : nullptr;
  LookupResult result;
  {
    nb::gil_scoped_release release;
    result = client.lookup(call);
  }
  int64_t* v = verdicts.data();
  for (const Fault& f : *result.faults) {
    *v++ = int64_t(f.status);
    *v++ = int64_t(f.reason);
    *v++ = f.feature;
    *v++ = f.bag;
    *v++ = f.value;
  }
  int64_t* t = timings.data();
  for (const int64_t n : {result.times.route, result.times.wait, result.times.merge, result.times.total, result.times.chunks, int64_t(0)}) *t++ = n;
  for (const SidecarTimes& s : *result.sidecars)
    for (const int64_t n : {s.degraded ? int64_t(-1) : s.lane_out, s.queue, s.pool, s.lane_back, s.request_bytes, s.response_bytes}) *t++ = n;
  return nb::make_tuple(int(result.status), result.sidecar);
}

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
  m.def("pool", &pool_one, "tables"_a, "feature"_a, "values"_a, "lengths"_a, "weights"_a.none(), "out"_a.noconvert());
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
            self.set->add_feature(feature, table, as_pooling(pooling), weighted, padding_index.value_or(kNoPadding), shards);
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
      .def("promote", [](PyTables& self, bool gently) { return self.set->promote(gently); }, "gently"_a = false,
           nb::call_guard<nb::gil_scoped_release>())
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
            if (!tables.set->sealed()) throw nb::value_error("tables: seal() them first");
            PreparedFrames prepared(tables.set);
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

  nb::class_<SidecarServer> server_class(m, "SidecarServer");
  server_class.def(nb::new_([](int engines, uint32_t spin_us, uint32_t max_lanes, uint64_t max_frame_bytes,
                               const std::vector<std::vector<int>>& cpus, const std::string& order) {
           return std::make_unique<SidecarServer>(engines, spin_us, max_lanes, max_frame_bytes, cpus, parse_order(order));
         }), nb::kw_only(), "engines"_a, "spin_us"_a, "max_lanes"_a, "max_frame_bytes"_a, "cpus"_a = std::vector<std::vector<int>>{},
         "order"_a = "edf")
      .def("publish", [](SidecarServer& self, const PyTables& tables) {
            if (!tables.set->sealed()) throw nb::value_error("tables: seal() them first");
            nb::gil_scoped_release release;  // engines may let tables go that hold Python's own
            self.publish(tables.set);
          }, "tables"_a)
      .def("retire_previous", &SidecarServer::retire_previous)
      .def("listen_unix", &SidecarServer::listen_unix, "path"_a)
      .def("listen_tcp", [](SidecarServer& self, const std::string& host, int port, bool dedicated, uint64_t window_bytes, uint8_t traffic_class,
                           uint8_t control_traffic_class) {
            return self.listen_tcp(host, port, {dedicated, window_bytes, traffic_class, control_traffic_class});
          }, "host"_a, "port"_a, nb::kw_only(), "dedicated"_a = false, "window_bytes"_a = 0, "traffic_class"_a = 0, "control_traffic_class"_a = 0)
      .def("expect", [](SidecarServer& self, nb::bytes token, const std::string& lane, uint32_t slots, uint64_t request_bytes,
                        uint64_t response_bytes, double ttl_s) {
            self.expect(std::string(token.c_str(), token.size()), lane, {slots, request_bytes, response_bytes}, ttl_s);
          }, "token"_a, "lane"_a, "slots"_a, "request_bytes"_a, "response_bytes"_a, "ttl_s"_a)
      .def("serve", [](SidecarServer& self, nb::bytes frame) {
            std::string out;
            {
              nb::gil_scoped_release release;
              out = self.serve_frame(reinterpret_cast<const std::byte*>(frame.data()), frame.size());
            }
            return nb::bytes(out.data(), out.size());
          }, "frame"_a)
      .def("stats", &server_stats)
      .def("drain", &SidecarServer::drain)
      .def("in_flight", &SidecarServer::in_flight)
      .def("close", &SidecarServer::close, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<LookupClient> client_class(m, "LookupClient");
  client_class.def(nb::new_(&make_client), nb::kw_only(), "epoch"_a, "sidecars"_a, "spin_us"_a, "degrade"_a, "rows"_a, "dims"_a, "poolings"_a,
           "weighted"_a, "out_of_range"_a, "sidecar_of_feature"_a = nb::none(), "legs"_a = std::vector<PyLeg>{},
           "default_rows"_a = std::vector<int64_t>{}, "padding"_a = std::vector<int64_t>{}, "ranker_pooling"_a = false,
           "hedge_budget"_a = 0.0, "window_delay_us"_a = 0, "max_ids"_a = 0)
      .def("set_fixed_columns", [](LookupClient& self, Array<int32_t> begins, Array<int32_t> widths) {
            const size_t n = self.routes().features.size();
            if (begins.shape(0) != n || widths.shape(0) != n) throw nb::value_error("begins, widths: one entry per feature");
            for (size_t f = 0; f < n; ++f)
              if (begins.data()[f] < 0 || widths.data()[f] < 1) throw nb::value_error("begins, widths: out of range");
            self.set_fixed_columns(begins.data(), widths.data());
          }, "begins"_a, "widths"_a)
      .def("attach_local", [](LookupClient& self, int64_t sidecar, const PyTables& tables) {
            if (!tables.set->sealed()) throw nb::value_error("tables: seal() them first");
            self.attach(check_sidecar(self, sidecar), make_local_lane(tables.set));
          }, "sidecar"_a, "tables"_a)
      .def("attach_shm", [](LookupClient& self, int64_t sidecar, const std::string& path, nb::bytes token, double timeout_s) {
            const int32_t s = check_sidecar(self, sidecar);
            const std::string secret(token.c_str(), token.size());
            nb::gil_scoped_release release;
            self.attach(s, connect_shm(path, secret, timeout_s));
          }, "sidecar"_a, "path"_a, "token"_a, "timeout_s"_a)
      .def("attach_tcp", [](LookupClient& self, int64_t sidecar, const std::string& host, int port, nb::bytes token, double timeout_s,
                            uint64_t window_bytes) {
            const int32_t s = check_sidecar(self, sidecar);
            const std::string secret(token.c_str(), token.size());
            nb::gil_scoped_release release;
            self.attach(s, connect_tcp(host, port, secret, timeout_s, window_bytes));
          }, "sidecar"_a, "host"_a, "port"_a, "token"_a, "timeout_s"_a, "window_bytes"_a = 0)
      .def("attach_external", [](LookupClient& self, int64_t sidecar, uint32_t slots, uint64_t request_bytes, uint64_t response_bytes) {
            if (slots < 1 || slots > kMaxSlots) throw nb::value_error("slots: 1 to 64");
            self.attach(check_sidecar(self, sidecar), make_external_lane({slots, request_bytes, response_bytes}));
          }, "sidecar"_a, "slots"_a, "request_bytes"_a, "response_bytes"_a)
      .def("take", [](LookupClient& self, int64_t sidecar, double timeout_s) -> nb::object {
            const auto lane = std::dynamic_pointer_cast<ExternalLane>(self.lane(check_sidecar(self, sidecar)));
            if (!lane) return nb::none();
            ExternalLane::Request request;
            bool found;
            {
              nb::gil_scoped_release release;
              found = lane->take(request, timeout_s);
            }
            if (!found) return nb::none();
            return nb::make_tuple(request.ticket, nb::bytes(request.frame.data(), request.frame.size()), request.budget_ns);
          }, "sidecar"_a, "timeout_s"_a)
      .def("deliver", [](LookupClient& self, int64_t sidecar, uint64_t ticket, std::optional<nb::bytes> frames, int status) {
            const auto lane = std::dynamic_pointer_cast<ExternalLane>(self.lane(check_sidecar(self, sidecar)));
            if (!lane) return;
            const auto* data = frames ? reinterpret_cast<const std::byte*>(frames->data()) : nullptr;
            const size_t size = frames ? frames->size() : 0;
            if (!frames && status == 0) status = int(Status::transport);
            nb::gil_scoped_release release;
            lane->deliver(ticket, data, size, Status(status));
          }, "sidecar"_a, "ticket"_a, "frames"_a.none(), "status"_a)
      .def("detach", [](LookupClient& self, int64_t sidecar) { self.detach(check_sidecar(self, sidecar)); }, "sidecar"_a)
      .def("lane_alive", [](LookupClient& self, int64_t sidecar) { return self.alive(check_sidecar(self, sidecar)); }, "sidecar"_a)
      .def("wait_lane_lost", &LookupClient::wait_lane_lost, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("lookup", &lookup, "parts"_a, "out"_a.noconvert(), "sequences"_a, "deadline_ns"_a, "priority"_a, "trace"_a,
           "verdicts"_a.noconvert(), "timings"_a.noconvert())
      .def("degraded", [](const LookupClient&) { return LookupClient::last_degraded(); })
      .def("stats", &client_stats)
      .def("close", &LookupClient::close, nb::call_guard<nb::gil_scoped_release>());
  bind_rdma(m, server_class, client_class);
  bind_load(m);
}
