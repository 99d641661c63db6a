#include "connect.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <memory>

#include "clock.hpp"

namespace sidepool {
namespace {

[[noreturn]] void fail(const std::string& where, const std::string& what) { throw Error(Status::transport, where + ": " + what); }

void finish_connect(int socket, const sockaddr* address, socklen_t length, uint64_t deadline_ns, const std::string& where) {
  if (connect(socket, address, length) == 0) return;
  if (errno != EINPROGRESS && errno != EAGAIN) fail(where, std::strerror(errno));
  if (!wait_ready(socket, POLLOUT, deadline_ns)) fail(where, "no connection within the timeout");
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &size);
  if (error != 0) fail(where, std::strerror(error));
}

}  // namespace

bool wait_ready(int socket, short events, uint64_t deadline_ns) {
  for (;;) {
    const uint64_t now = now_ns();
    const uint64_t left = deadline_ns > now ? deadline_ns - now : 0;
    timespec timeout{time_t(left / 1'000'000'000), long(left % 1'000'000'000)};
    pollfd p{socket, events, 0};
    const int n = ppoll(&p, 1, &timeout, nullptr);
    if (n > 0) return true;
    if (n == 0) return false;
    if (errno != EINTR) return true;  // let the caller's next system call report it
  }
}

Fd dial_unix(const std::string& path, uint64_t deadline_ns) {
  const std::string where = "shm lane at " + path;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) fail(where, "not a usable socket path");
  std::memcpy(address.sun_path, path.data(), path.size());
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) fail(where, std::strerror(errno));
  finish_connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address, deadline_ns, where);
  return socket;
}

Fd dial_tcp(const std::string& host, int port, uint64_t deadline_ns) {
  const std::string where = "tcp lane at " + host + ":" + std::to_string(port);
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  if (const int rc = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found); rc != 0) fail(where, gai_strerror(rc));
  std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> guard(found, freeaddrinfo);
  Fd socket(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) fail(where, std::strerror(errno));
  finish_connect(socket.get(), found->ai_addr, found->ai_addrlen, deadline_ns, where);
  const int on = 1;
  setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return socket;
}

void set_traffic_class(int socket, uint8_t traffic_class) {
  const int value = traffic_class;
  // One of the two fits the socket's family; an IPv6 socket that carries IPv4 takes both.
  setsockopt(socket, IPPROTO_IP, IP_TOS, &value, sizeof value);
  setsockopt(socket, IPPROTO_IPV6, IPV6_TCLASS, &value, sizeof value);
}

Hello hello_with(const std::string& token, FrameKind kind, const std::string& where) {
  Hello hello;
  hello.kind = kind;
  if (token.size() != sizeof hello.token) fail(where, "a token has 16 bytes");
  std::memcpy(hello.token, token.data(), token.size());
  return hello;
}

HelloAck shake_hands(int socket, const Hello& hello, Fd* fds, size_t fd_count, uint64_t deadline_ns, const std::string& where) {
  if (send(socket, &hello, sizeof hello, MSG_NOSIGNAL) != ssize_t(sizeof hello)) fail(where, std::strerror(errno));

  HelloAck ack;
  size_t received = 0, got_fds = 0;
  while (received < sizeof ack) {
    if (!wait_ready(socket, POLLIN, deadline_ns)) fail(where, "no answer to the handshake within the timeout");
    iovec part{reinterpret_cast<std::byte*>(&ack) + received, sizeof ack - received};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 4)];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n < 0) fail(where, std::strerror(errno));
    if (n == 0) fail(where, "the sidecar refused the handshake (token unknown or expired)");
    received += size_t(n);
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
        Fd owned(fd);
        if (got_fds < fd_count) fds[got_fds++] = std::move(owned);
      }
    }
  }
  if (ack.magic != kMagic || ack.version != kWireVersion || ack.kind != FrameKind::hello_ack)
    throw Error(Status::frame, where + ": the answer is not a handshake of wire version " + std::to_string(kWireVersion));
  if (ack.status != 0)
    throw Error(Status(ack.status), where + ": refused with status " + std::to_string(ack.status) + " (no more lanes)");
  const bool sane = ack.slots >= 1 && ack.slots <= kMaxSlots && ack.request_bytes >= 4096 && ack.request_bytes <= kMaxSlotBytes &&
                    ack.response_bytes >= 4096 && ack.response_bytes <= kMaxSlotBytes && ack.request_bytes % kAlign == 0 &&
                    ack.response_bytes % kAlign == 0;
  if (!sane || got_fds != fd_count) throw Error(Status::frame, where + ": the handshake grants impossible slots");
  return ack;
}

}  // namespace sidepool
