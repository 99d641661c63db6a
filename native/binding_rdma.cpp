// The rdma lane's part of binding.cpp.
#include "binding_rdma.hpp"

#include "repeat.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

using namespace nb::literals;

namespace sidepool {
namespace {

RdmaOptions options_of(const nb::dict& given) {
  RdmaOptions o;
  for (const auto& [key, value] : given) {
    const std::string name = nb::cast<std::string>(key);
    if (name == "device") o.device = nb::cast<std::string>(value);
    else if (name == "port") o.port = nb::cast<int>(value);
    else if (name == "gid_index") o.gid_index = nb::cast<int>(value);
    else if (name == "piece_bytes") o.piece_bytes = nb::cast<uint32_t>(value);
    else if (name == "window_bytes") o.window_bytes = nb::cast<uint64_t>(value);
    else if (name == "piggyback") o.piggyback = nb::cast<bool>(value);
    else if (name == "peer_timeout_s") o.peer_timeout_s = nb::cast<double>(value);
    else if (name == "service_level") o.service_level = nb::cast<uint8_t>(value);
    else if (name == "control_service_level") o.control_service_level = nb::cast<uint8_t>(value);
    else if (name == "traffic_class") o.traffic_class = nb::cast<uint8_t>(value);
    else if (name == "control_traffic_class") o.control_traffic_class = nb::cast<uint8_t>(value);
    else throw nb::value_error(("options: unknown key " + name).c_str());
  }
  return o;
}

nb::bytes as_bytes(const std::string& s) { return nb::bytes(s.data(), s.size()); }
std::string as_string(const nb::bytes& b) { return std::string(b.c_str(), b.size()); }

}  // namespace

nb::dict rdma_counters(const RdmaCounters& c, bool thread_domain) {
  nb::dict d;
  d["thread_domain"] = thread_domain;
  d["work_requests"] = c.work_requests.get();
  d["credit_writes"] = c.credit_writes.get();
  d["doorbells"] = c.doorbells.get();
  d["rounds"] = c.rounds.get();
  d["most_doorbells"] = c.most_doorbells.get();
  d["signalled"] = c.signalled.get();
  d["receives"] = c.receives.get();
  d["receive_doorbells"] = c.receive_doorbells.get();
  d["registrations"] = c.registrations.get();
  d["failures"] = c.failures.get();
  d["asleep"] = c.asleep.get();
  nb::list buckets;
  for (size_t b = 0; b < Histogram::kBuckets; ++b) buckets.append(c.credit.count(b));
  d["credit_us"] = buckets;
  d["credit_sum_us"] = c.credit.sum_us();
  return d;
}

void bind_rdma(nb::module_& m, nb::class_<SidecarServer>& server, nb::class_<LookupClient>& client) {
  m.def("rdma_unavailable", &rdma_unavailable);
  m.def("rdma_dmabuf_refusal", &rdma_dmabuf_refusal, "device"_a, "fd"_a = -1);
  nb::class_<RdmaOffer>(m, "RdmaOffer").def_prop_ro("end", [](const RdmaOffer& self) { return as_bytes(self.end()); });
  server
      .def("migrate", &SidecarServer::migrate, "lane"_a, "engine"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("listen_rdma", [](SidecarServer& self, const nb::dict& options) {
            const RdmaOptions o = options_of(options);
            nb::gil_scoped_release release;
            return self.listen_rdma(o);
          }, "options"_a)
      .def("connect_rdma", [](SidecarServer& self, uint32_t slots, uint64_t request_bytes, uint64_t response_bytes, nb::bytes peer) {
            const std::string bytes = as_string(peer);
            std::string end;
            {
              nb::gil_scoped_release release;
              end = self.connect_rdma({slots, request_bytes, response_bytes}, bytes);
            }
            return as_bytes(end);
          }, "slots"_a, "request_bytes"_a, "response_bytes"_a, "peer"_a);
  client
      .def("repeat", [](LookupClient& self, nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> ids, uint64_t count, int threads) {
            Part part;
            part.values = ids.data();
            part.fixed_batch = int64_t(ids.shape(0));
            part.fixed_width = int64_t(ids.shape(1));
            part.value_count = part.fixed_batch * part.fixed_width;
            int64_t width = 0;
            for (const RoutedFeature& f : self.routes().features) {
              if (f.pooling == Pooling::none) throw nb::value_error("repeat: pooled features only");
              width += f.dim;
            }
            if (threads < 1 || threads > 256) throw nb::value_error("threads: 1 to 256");
            nb::gil_scoped_release release;
            return repeat_lookups(self, part, width, count, threads);
          }, "ids"_a, "count"_a, "threads"_a)
      .def("offer_rdma", [](LookupClient& self, const nb::dict& options, int engines, uint32_t slots, uint64_t request_bytes,
                            uint64_t response_bytes) {
            if (slots < 1 || slots > kMaxSlots) throw nb::value_error("slots: 1 to 64");
            const RdmaOptions o = options_of(options);
            nb::gil_scoped_release release;
            return self.rdma(o, engines)->prepare({slots, request_bytes, response_bytes});
          }, "options"_a, "engines"_a, "slots"_a, "request_bytes"_a, "response_bytes"_a)
      .def("attach_rdma", [](LookupClient& self, int64_t sidecar, RdmaOffer& offer, nb::bytes peer) {
            if (sidecar < 0 || sidecar >= int64_t(self.sidecar_count())) throw nb::index_error("sidecar");
            const std::string bytes = as_string(peer);
            nb::gil_scoped_release release;
            self.attach(int32_t(sidecar), offer.connect(bytes));
          }, "sidecar"_a, "offer"_a, "peer"_a);
}

}  // namespace sidepool
