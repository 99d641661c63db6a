// The end of a process whose parent is gone.
#pragma once
#include <cstdint>

namespace sidepool {

// From now on, when the parent of this process ends, this one ends `grace_ns` later (status 1, nothing is run on the way
// out), whatever its threads are waiting for. The watching thread takes no lock and touches nothing else.
void end_with_parent(uint64_t grace_ns);

}  // namespace sidepool
