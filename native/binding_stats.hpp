// Counters, as dictionaries.
#pragma once
#include <nanobind/nanobind.h>

#include "client.hpp"
#include "server.hpp"

namespace nb = nanobind;

namespace sidepool {

nb::dict server_stats(SidecarServer& server);
nb::dict client_stats(LookupClient& client);

}  // namespace sidepool
