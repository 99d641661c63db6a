// The two implementations behind crc32c(); tables.hpp has the one to call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sidepool {

// Table-driven, eight bytes a step, on any machine.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t seed);

bool crc32c_hardware_runs_here();
// Only where crc32c_hardware_runs_here().
uint32_t crc32c_hardware(const void* data, size_t bytes, uint32_t seed);

}  // namespace sidepool
