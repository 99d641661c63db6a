#include "binding_load.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "binding_part.hpp"
#include "grpc_load.hpp"
#include "lookup_load.hpp"

using namespace nb::literals;

namespace sidepool {
namespace {

template <class T>
using Given = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Written = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct PyLoad {
  std::unique_ptr<Load> load;
  size_t requests;
  nb::object keep;  // arrays that parts point into
};

uint64_t microseconds(int64_t us) {
  if (us < 0 || us > 1'000'000) throw nb::value_error("spin_us: 0 to 1000000");
  return uint64_t(us) * 1000;
}

PyLoad grpc_load(const std::string& host, int port, const std::string& path, const std::vector<std::tuple<nb::bytes, int64_t>>& messages, int64_t deadline_ns,
                 const std::vector<std::string>& words, int connections, int64_t memory_bytes, int64_t spin_us) {
  if (port < 1 || port > 65535) throw nb::value_error("port: 1 to 65535");
  if (connections < 1 || connections > 1024) throw nb::value_error("connections: 1 to 1024");
  if (memory_bytes < 1) throw nb::value_error("memory_bytes: above 0");
  if (deadline_ns < 0) throw nb::value_error("deadline_ns: 0 or more");
  std::vector<GrpcMessage> bodies;
  for (const auto& [bytes, deadline_at] : messages) {
    if (bytes.size() > UINT32_MAX) throw nb::value_error("messages: below 4 GiB each");
    if (deadline_at >= 0 && size_t(deadline_at) + 8 > bytes.size()) throw nb::value_error("messages: a deadline must lie within its message");
    bodies.push_back({std::string(bytes.c_str(), bytes.size()), deadline_at, deadline_ns});
  }
  const GrpcTarget target{host, port, path, connections, uint64_t(memory_bytes), microseconds(spin_us), words};
  nb::gil_scoped_release release;  // a name may have to be resolved
  return {make_grpc_load(target, bodies), bodies.size(), {}};
}

PyLoad lookup_load(std::shared_ptr<LookupClient> client, const nb::list& parts, int callers, int64_t budget_ns, int32_t priority, int64_t spin_us) {
  if (callers < 1 || callers > 1024) throw nb::value_error("callers: 1 to 1024");
  if (budget_ns < 1 || budget_ns > int64_t(3'600'000'000'000)) throw nb::value_error("budget_ns: above 0, at most an hour");
  LookupTarget target{std::move(client), {}, callers, microseconds(spin_us), uint64_t(budget_ns), priority};
  for (nb::handle part : parts) add_part(part, target.requests);
  return {make_lookup_load(std::move(target)), parts.size(), parts};
}

nb::dict run(PyLoad& self, Given<int64_t> due_ns, Given<int32_t> request, Written<int64_t> sent_ns, Written<int64_t> done_ns,
             Written<int32_t> status, int64_t drain_ns) {
  const size_t n = due_ns.shape(0);
  for (const size_t size : {request.shape(0), sent_ns.shape(0), done_ns.shape(0), status.shape(0)})
    if (size != n) throw nb::value_error("arrays differ in length");
  for (size_t i = 0; i < n; ++i) {
    if (due_ns.data()[i] < (i == 0 ? 0 : due_ns.data()[i - 1])) throw nb::value_error("due_ns: from 0 on, ascending");
    if (request.data()[i] < 0 || size_t(request.data()[i]) >= self.requests) throw nb::value_error("request: beyond the target's requests");
  }
  if (drain_ns < 0) throw nb::value_error("drain_ns: 0 or more");
  LoadTotals totals;
  {
    const Schedule schedule{due_ns.data(), request.data(), n};
    const Outcomes outcomes(sent_ns.data(), done_ns.data(), status.data());
    nb::gil_scoped_release release;
    totals = self.load->run(schedule, outcomes, uint64_t(drain_ns));
  }
  nb::dict d;
  d["start_ns"] = totals.start_ns;
  d["most_outstanding"] = totals.most_outstanding;
  d["most_bytes"] = totals.most_bytes;
  d["reconnects"] = totals.reconnects;
  return d;
}

}  // namespace

void bind_load(nb::module_& m) {
  m.def("grpc_load_unavailable", &grpc_load_unavailable);
  nb::class_<PyLoad>(m, "Load")
      .def("run", &run, "due_ns"_a.noconvert(), "request"_a.noconvert(), "sent_ns"_a.noconvert(), "done_ns"_a.noconvert(),
           "status"_a.noconvert(), "drain_ns"_a)
      .def("stop", [](PyLoad& self) { self.load->stop(); })
      .def("examples", [](const PyLoad& self) { return self.load->examples(); });
  m.def("grpc_load", &grpc_load, nb::kw_only(), "host"_a, "port"_a, "path"_a, "messages"_a, "deadline_ns"_a, "words"_a, "connections"_a, "memory_bytes"_a,
        "spin_us"_a);
  m.def("lookup_load", &lookup_load, "client"_a, "parts"_a, nb::kw_only(), "callers"_a, "budget_ns"_a, "priority"_a, "spin_us"_a);
}

}  // namespace sidepool
