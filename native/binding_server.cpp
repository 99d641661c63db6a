#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "binding_stats.hpp"
#include "binding_types.hpp"

using namespace nb::literals;

namespace sidepool {

nb::class_<SidecarServer> bind_server(nb::module_& m) {
  nb::class_<SidecarServer> server_class(m, "SidecarServer");
  server_class.def(nb::new_([](int engines, uint32_t spin_us, uint32_t max_lanes, uint64_t max_frame_bytes,
                               const std::vector<std::vector<int>>& cpus, const std::string& order) {
           return std::make_unique<SidecarServer>(engines, spin_us, max_lanes, max_frame_bytes, cpus, parse_order(order));
         }), nb::kw_only(), "engines"_a, "spin_us"_a, "max_lanes"_a, "max_frame_bytes"_a, "cpus"_a = std::vector<std::vector<int>>{},
         "order"_a = "edf")
      .def("publish", [](SidecarServer& self, const PyTables& tables) {
            const std::shared_ptr<TableSet>& set = sealed(tables);
            nb::gil_scoped_release release;  // engines may let tables go that hold Python's own
            self.publish(set);
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
  return server_class;
}

}  // namespace sidepool
