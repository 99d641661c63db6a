// One HTTP/2 connection and the unary gRPC calls outstanding on it. One thread.
#pragma once
#include "http2.hpp"

#ifdef SIDEPOOL_HTTP2
#include <netinet/in.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "grpc_load.hpp"
#include "memory.hpp"

namespace sidepool {

// Who is told about replies.
class Replies {
 public:
  virtual ~Replies() = default;
  // The call of schedule entry `index` is over. `message` may be empty; it is gone when this returns.
  virtual void over(size_t index, int32_t status, const std::string& message) = 0;
};

// Bytes that libnghttp2 holds for all connections together.
struct CountedMemory {
  size_t bytes = 0;
};

class GrpcConnection {
 public:
  GrpcConnection(const GrpcTarget& target, Replies& replies, CountedMemory& memory);
  ~GrpcConnection();
  GrpcConnection(const GrpcConnection&) = delete;
  GrpcConnection& operator=(const GrpcConnection&) = delete;

  // Begins to connect; throws Error where no socket can be made. The epoll instance reports events with `tag`.
  void open(const sockaddr* address, socklen_t length, int epoll, uint64_t tag);
  // Calls may be made from `open` on: they leave when the connection is there.
  bool is_open() const { return session_ != nullptr; }
  // Whether the server has greeted.
  bool greeted() const { return greeted_; }
  // False where the peer takes no new calls on this connection.
  bool takes_calls() const;
  // message: with gRPC's five bytes in front; kept until the call is over. `deadline_us` goes where the message wants one.
  void call(size_t index, const GrpcMessage& message, int64_t deadline_us);
  // Writes what is ready. Like `handle`, closes a connection that has ended.
  void flush();
  void handle(uint32_t events);
  // Everything outstanding is over with `status`.
  void close(int32_t status, const std::string& why);
  size_t outstanding() const { return calls_.size(); }

 private:
  struct Call {
    size_t index;
    const GrpcMessage* message;
    uint8_t deadline[8];
    size_t sent = 0;
    int http_status = 0;
    int grpc_status = -1;
    std::string grpc_message;
    uint8_t prefix[5];
    uint64_t received = 0;  // bytes of the reply, prefix included
    bool malformed = false;
  };

  static ssize_t read_body(nghttp2_session*, int32_t stream, uint8_t* into, size_t room, uint32_t* flags, nghttp2_data_source*, void* self);
  static int on_header(nghttp2_session*, const nghttp2_frame*, const uint8_t* name, size_t name_size, const uint8_t* value,
                       size_t value_size, uint8_t flags, void* self);
  static int on_data(nghttp2_session*, uint8_t flags, int32_t stream, const uint8_t* data, size_t size, void* self);
  static int on_frame(nghttp2_session*, const nghttp2_frame*, void* self);
  static int on_not_sent(nghttp2_session*, const nghttp2_frame*, int error, void* self);
  static int on_close(nghttp2_session*, int32_t stream, uint32_t error, void* self);

  void greet();
  Call* find(int32_t stream);
  void finish(int32_t stream, uint32_t error);
  int32_t verdict(const Call& call, uint32_t error, std::string& message) const;
  void watch(bool writable);
  bool fill();

  const Http2& http2_;
  const GrpcTarget& target_;
  Replies& replies_;
  nghttp2_mem allocator_;
  const std::string authority_;
  std::vector<nghttp2_nv> headers_;
  Fd fd_;
  int epoll_ = -1;
  uint64_t tag_ = 0;
  nghttp2_session* session_ = nullptr;
  bool greeted_ = false, writable_ = false, watched_writable_ = false;
  std::unordered_map<int32_t, Call> calls_;
  std::string out_;
  size_t written_ = 0;
  std::vector<uint8_t> in_;
};

}  // namespace sidepool
#endif
