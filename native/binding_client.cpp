#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "binding_part.hpp"
#include "binding_stats.hpp"
#include "binding_types.hpp"
#include "client.hpp"

using namespace nb::literals;

namespace sidepool {
namespace {

using Numbers = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

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
    feature.pooling = parse_pooling(poolings[f]);
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

}  // namespace

nb::class_<LookupClient> bind_client(nb::module_& m) {
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
            self.attach(check_sidecar(self, sidecar), make_local_lane(sealed(tables)));
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
  return client_class;
}

}  // namespace sidepool
