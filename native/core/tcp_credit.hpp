// The connection of its own on which a tcp lane's credits travel, so that bulk data cannot delay them.
#pragma once
#include <sys/socket.h>

#include <cerrno>

#include "frames.hpp"
#include "memory.hpp"

namespace sidepool {

// Whether the 128 bytes are a grant by itself.
inline bool is_grant(const GrantFrame& frame) {
  return frame.magic == kMagic && frame.version == kWireVersion && frame.kind == FrameKind::grant && frame.frame_bytes == sizeof frame;
}

// Either end. One thread at a time receives, one sends.
class GrantSocket {
 public:
  explicit GrantSocket(Fd socket) : socket_(std::move(socket)) {}
  explicit operator bool() const { return bool(socket_); }
  int fd() const { return socket_.get(); }

  // What has come, the largest limit of it, into `newest`. False: the connection has ended or carries something else.
  bool receive(Grant& newest) {
    for (;;) {
      const ssize_t n = recv(fd(), reinterpret_cast<std::byte*>(&incoming_) + received_, sizeof incoming_ - received_, MSG_DONTWAIT);
      if (n < 0) return errno == EAGAIN || errno == EINTR;
      if (n == 0) return false;
      received_ += size_t(n);
      if (received_ < sizeof incoming_) continue;
      received_ = 0;
      if (!is_grant(incoming_)) return false;
      if (incoming_.grant.limit > newest.limit) newest = incoming_.grant;
    }
  }

  // False: the peer is gone. There is room for honest peers: they cannot spend five grants without having read four.
  bool send(const Grant& grant) {
    GrantFrame frame;
    frame.grant = grant;
    return ::send(fd(), &frame, sizeof frame, MSG_DONTWAIT | MSG_NOSIGNAL) == ssize_t(sizeof frame);
  }

 private:
  Fd socket_;
  GrantFrame incoming_;
  size_t received_ = 0;
};

}  // namespace sidepool
