// The rdma lane's part of the binding.
#pragma once
#include <nanobind/nanobind.h>

#include "client.hpp"
#include "server.hpp"

namespace nb = nanobind;

namespace sidepool {

void bind_rdma(nb::module_& m, nb::class_<SidecarServer>& server, nb::class_<LookupClient>& client);
nb::dict rdma_counters(const RdmaCounters& counters, bool thread_domain);

}  // namespace sidepool
