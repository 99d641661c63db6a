// Blocking connect and handshake with a deadline, for the lanes' set-up only.
#pragma once
#include <string>

#include "frames.hpp"
#include "memory.hpp"

namespace sidepool {

// Connected, non-blocking sockets. Errors throw Error(transport) naming the address.
Fd dial_unix(const std::string& path, uint64_t deadline_ns);
Fd dial_tcp(const std::string& host, int port, uint64_t deadline_ns);

// A hello with this token of 16 bytes; throws Error(transport).
Hello hello_with(const std::string& token, FrameKind kind, const std::string& where);

// Present the token, read the acknowledgement and up to `fd_count` descriptors that come with it.
HelloAck shake_hands(int socket, const Hello& hello, Fd* fds, size_t fd_count, uint64_t deadline_ns, const std::string& where);

// Ask the network for this class (DSCP times 4) for what the socket sends. Best effort, as the class itself is.
void set_traffic_class(int socket, uint8_t traffic_class);

// Wait until the socket is ready for `events` (poll flags); false once the deadline has passed.
bool wait_ready(int socket, short events, uint64_t deadline_ns);

}  // namespace sidepool
