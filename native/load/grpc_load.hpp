// Unary gRPC calls in an open loop, from one thread.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "load.hpp"

namespace sidepool {

struct GrpcTarget {
  std::string host;  // a name, or an address without brackets
  int port = 0;
  std::string path;  // /package.Service/Method
  int connections = 1;
  // Calls are refused (`kNotSent`) while those outstanding take more memory than this.
  uint64_t memory_bytes = 0;
  // The thread spins this long before a request is due.
  uint64_t spin_ns = 0;
  // Words that servers put in brackets at the head of an error's message: `[WORD] `. The status of such a reply is
  // gRPC's code + 256 * (1 + place of the word).
  std::vector<std::string> words;

  std::string authority() const {
    return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(port);
  }
};

// A serialised request. Where `deadline_at` is not negative, eight bytes there are a protobuf integer, which each call has as the
// time in microseconds since 1970 when `deadline_ns` have passed since it was due.
struct GrpcMessage {
  std::string bytes;
  int64_t deadline_at = -1;
  int64_t deadline_ns = 0;
};

// Why there is no gRPC load in this process, and what to do about it; empty where there is.
std::string grpc_load_unavailable();

// The schedule refers to the messages by place. Throws Error where the library is missing.
std::unique_ptr<Load> make_grpc_load(const GrpcTarget& target, const std::vector<GrpcMessage>& messages);

}  // namespace sidepool
