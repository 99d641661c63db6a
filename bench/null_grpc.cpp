// A gRPC server that does nothing: the ceiling of what a load generator can be measured against. One thread, HTTP/2 without TLS.
//
//   null_grpc REPLY_BYTES [FAULT]
//
// Answers every unary call with a message of REPLY_BYTES zeros. FAULT, for tests of the generator: `length` announces a message
// of another length, `status` leaves gRPC's status out, `http` answers 503, `reset` resets every call, `bytes` answers with what is
// not HTTP/2, `cut` closes a connection at its 100th call, `silent` never answers, `overloaded` refuses every call with a code in
// its message. Prints its port on loopback, then serves until it is killed.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

namespace {

constexpr int kCallsBeforeCut = 100;

std::string reply, fault;

struct Connection {
  int fd = -1;
  nghttp2_session* session = nullptr;
  std::unordered_map<int32_t, size_t> sent;  // bytes of each reply that have left
  std::string out;
  size_t written = 0;
  int calls = 0;
};

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

nghttp2_nv header(const char* name, const char* value) {
  const auto bytes = [](const char* p) { return reinterpret_cast<uint8_t*>(const_cast<char*>(p)); };
  return {bytes(name), bytes(value), std::strlen(name), std::strlen(value), NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

ssize_t read_reply(nghttp2_session* session, int32_t stream, uint8_t* into, size_t room, uint32_t* flags, nghttp2_data_source* source, void*) {
  Connection& connection = *static_cast<Connection*>(source->ptr);
  size_t& sent = connection.sent[stream];
  const size_t size = std::min(room, reply.size() - sent);
  std::memcpy(into, reply.data() + sent, size);
  sent += size;
  if (sent < reply.size()) return ssize_t(size);
  *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
  connection.sent.erase(stream);
  const bool refuse = fault == "overloaded", other = fault == "status";
  const nghttp2_nv trailers[] = {header(other ? "x-no-status" : "grpc-status", refuse ? "14" : "0"),
                                 header("grpc-message", refuse ? "[OVERLOADED] no credit%21" : "")};
  nghttp2_submit_trailer(session, stream, trailers, 2);
  return ssize_t(size);
}

int on_frame(nghttp2_session* session, const nghttp2_frame* frame, void* self) {
  if ((frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS) || (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) return 0;
  Connection& connection = *static_cast<Connection*>(self);
  ++connection.calls;
  if (fault == "silent") return 0;
  if (fault == "bytes") {
    connection.out = "HTTP/1.1 400 Bad Request\r\n\r\n";
    return 0;
  }
  if (fault == "reset") return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_INTERNAL_ERROR);
  nghttp2_data_provider body;
  body.source.ptr = self;
  body.read_callback = read_reply;
  const nghttp2_nv headers[] = {header(":status", fault == "http" ? "503" : "200"), header("content-type", "application/grpc")};
  return nghttp2_submit_response(session, frame->hd.stream_id, headers, 2, &body);
}

// False where the connection is over.
bool flush(Connection& connection) {
  for (;;) {
    while (connection.written < connection.out.size()) {
      const ssize_t n = send(connection.fd, connection.out.data() + connection.written, connection.out.size() - connection.written, MSG_NOSIGNAL);
      if (n < 0) return errno == EAGAIN;
      connection.written += size_t(n);
    }
    connection.out.clear();
    connection.written = 0;
    const uint8_t* bytes;
    for (ssize_t n; connection.out.size() < (256 << 10) && (n = nghttp2_session_mem_send(connection.session, &bytes)) != 0;) {
      if (n < 0) return false;
      connection.out.append(reinterpret_cast<const char*>(bytes), size_t(n));
    }
    if (connection.out.empty()) return true;
  }
}

bool serve(Connection& connection) {
  static uint8_t in[256 << 10];
  const ssize_t n = recv(connection.fd, in, sizeof in, 0);
  if (n == 0 || (n < 0 && errno != EAGAIN)) return false;
  if (n > 0 && nghttp2_session_mem_recv(connection.session, in, size_t(n)) < 0) return false;
  return !(fault == "cut" && connection.calls >= kCallsBeforeCut) && flush(connection);
}

void greet(Connection& connection) {
  nghttp2_session_callbacks* callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
  nghttp2_option* option;
  nghttp2_option_new(&option);
  nghttp2_option_set_no_closed_streams(option, 1);
  nghttp2_session_server_new2(&connection.session, callbacks, &connection, option);
  nghttp2_option_del(option);
  nghttp2_session_callbacks_del(callbacks);
  const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, (1u << 31) - 1}};
  nghttp2_submit_settings(connection.session, NGHTTP2_FLAG_NONE, settings, 1);
  nghttp2_session_set_local_window_size(connection.session, NGHTTP2_FLAG_NONE, 0, (1u << 31) - 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: null_grpc REPLY_BYTES [FAULT]\n"), 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const uint32_t size = uint32_t(std::atoi(argv[1]));
  if (argc > 2) fault = argv[2];
  const uint32_t told = fault == "length" ? size + 1 : size;
  reply = {'\0', char(told >> 24), char(told >> 16), char(told >> 8), char(told)};
  reply.append(size, '\0');
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(listener, 128) != 0 ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) != 0)
    fail("listen");
  std::printf("%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
  const int epoll = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{EPOLLIN, {.ptr = nullptr}};
  epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
  for (;;) {
    epoll_event events[64];
    const int n = epoll_wait(epoll, events, 64, -1);
    for (int i = 0; i < n; ++i) {
      auto* connection = static_cast<Connection*>(events[i].data.ptr);
      if (connection == nullptr) {
        const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) continue;
        const int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        connection = new Connection;
        connection->fd = fd;
        greet(*connection);
        epoll_event added{EPOLLIN | EPOLLOUT | EPOLLET, {.ptr = connection}};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &added);
        continue;
      }
      bool more = serve(*connection);
      // Edge-triggered: everything that has come is read.
      for (char peeked; more && recv(connection->fd, &peeked, 1, MSG_PEEK) > 0;) more = serve(*connection);
      if (more) continue;
      nghttp2_session_del(connection->session);
      close(connection->fd);
      delete connection;
    }
  }
}
