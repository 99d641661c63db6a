#include "grpc_connection.hpp"

#ifdef SIDEPOOL_HTTP2
#include <malloc.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "status.hpp"

namespace sidepool {
namespace {

constexpr size_t kPrefixBytes = 5;
// Replies are never held back: a window as large as HTTP/2 knows, for each call and for all together.
constexpr int32_t kWindowBytes = (1u << 31) - 1;
// Frames are gathered up to this size, then written: few system calls, and little memory where the peer reads slowly.
constexpr size_t kWriteBytes = 256 << 10;
constexpr size_t kReadBytes = 256 << 10;
// Messages of errors are examples for a person.
constexpr size_t kMessageBytes = 300;

CountedMemory& counted(void* user) { return *static_cast<CountedMemory*>(user); }

void* take(size_t size, void* user) {
  void* p = std::malloc(size);
  if (p != nullptr) counted(user).bytes += malloc_usable_size(p);
  return p;
}
void* take_zeroed(size_t count, size_t size, void* user) {
  void* p = std::calloc(count, size);
  if (p != nullptr) counted(user).bytes += malloc_usable_size(p);
  return p;
}
void give(void* p, void* user) {
  if (p != nullptr) counted(user).bytes -= malloc_usable_size(p);
  std::free(p);
}
void* resize(void* p, size_t size, void* user) {
  const size_t before = p != nullptr ? malloc_usable_size(p) : 0;
  void* moved = std::realloc(p, size);
  if (moved != nullptr) counted(user).bytes += malloc_usable_size(moved) - before;
  return moved;
}

nghttp2_nv header(const char* name, const std::string& value) {
  const uint8_t flags = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE;
  // libnghttp2 takes what it only reads as if it wrote it.
  const auto bytes = [](const char* p) { return reinterpret_cast<uint8_t*>(const_cast<char*>(p)); };
  return {bytes(name), bytes(value.data()), std::strlen(name), value.size(), flags};
}

const std::string kPost = "POST", kHttp = "http", kGrpc = "application/grpc", kTrailers = "trailers";

GrpcConnection& connection(void* self) { return *static_cast<GrpcConnection*>(self); }

// The number that `text` is, or -1.
int number(std::string_view text) {
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? value : -1;
}

// What grpc-message has as %XX.
std::string decoded(std::string_view text) {
  std::string plain;
  for (size_t i = 0; i < text.size() && plain.size() < kMessageBytes; ++i) {
    int code = 0;
    if (text[i] == '%' && i + 2 < text.size() && std::from_chars(&text[i + 1], &text[i + 3], code, 16).ptr == &text[i + 3]) i += 2;
    else code = uint8_t(text[i]);
    plain.push_back(char(code));
  }
  return plain;
}

}  // namespace

GrpcConnection::GrpcConnection(const GrpcTarget& target, Replies& replies, CountedMemory& memory)
    : http2_(http2()), target_(target), replies_(replies), allocator_{&memory, take, give, take_zeroed, resize},
      authority_(target.authority()), in_(kReadBytes) {
  headers_ = {header(":method", kPost), header(":scheme", kHttp), header(":path", target_.path), header(":authority", authority_),
              header("content-type", kGrpc), header("te", kTrailers)};
}

GrpcConnection::~GrpcConnection() { http2_.session_del(session_); }

void GrpcConnection::open(const sockaddr* address, socklen_t length, int epoll, uint64_t tag) {
  fd_ = Fd(socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const int on = 1;
  if (!fd_ || setsockopt(fd_.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0 ||
      (connect(fd_.get(), address, length) != 0 && errno != EINPROGRESS)) {
    const int error = errno;
    fd_.reset();
    throw Error(Status::transport, authority_ + ": cannot connect: " + std::strerror(error));
  }
  epoll_ = epoll;
  tag_ = tag;
  greet();
  greeted_ = writable_ = false;
  watched_writable_ = true;
  epoll_event event{EPOLLIN | EPOLLOUT, {.u64 = tag}};
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd_.get(), &event) != 0) throw Error(Status::transport, std::string("epoll_ctl: ") + std::strerror(errno));
}

void GrpcConnection::greet() {
  nghttp2_session_callbacks* callbacks = nullptr;
  if (http2_.callbacks_new(&callbacks) != 0) throw std::bad_alloc();
  http2_.set_on_header(callbacks, on_header);
  http2_.set_on_data(callbacks, on_data);
  http2_.set_on_frame(callbacks, on_frame);
  http2_.set_on_not_sent(callbacks, on_not_sent);
  http2_.set_on_close(callbacks, on_close);
  const int error = http2_.client_new(&session_, callbacks, this, nullptr, &allocator_);
  http2_.callbacks_del(callbacks);
  if (error != 0) throw std::bad_alloc();
  const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_ENABLE_PUSH, 0}, {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, uint32_t(kWindowBytes)}};
  if (http2_.submit_settings(session_, NGHTTP2_FLAG_NONE, settings, std::size(settings)) != 0 ||
      http2_.set_window(session_, NGHTTP2_FLAG_NONE, 0, kWindowBytes) != 0)
    throw std::bad_alloc();
}

bool GrpcConnection::takes_calls() const { return session_ != nullptr && http2_.request_allowed(session_) != 0; }

void GrpcConnection::call(size_t index, const GrpcMessage& message, int64_t deadline_us) {
  nghttp2_data_provider body;
  body.source.ptr = this;
  body.read_callback = read_body;
  const int32_t stream = http2_.submit_request(session_, nullptr, headers_.data(), headers_.size(), &body, nullptr);
  if (stream < 0) {
    replies_.over(index, kLost, "no further call fits this connection");
    return;
  }
  Call& call = calls_[stream];
  call.index = index;
  call.message = &message;
  // Base 128, lowest digits first, all but the last marked: times from 1987 to 4253 have eight.
  for (int i = 0; i < 8; ++i) call.deadline[i] = uint8_t((deadline_us >> (7 * i)) & 0x7f) | (i < 7 ? 0x80 : 0);
}

// From libnghttp2 into our buffer; false where the session has failed.
bool GrpcConnection::fill() {
  if (written_ < out_.size()) return true;
  out_.clear();
  written_ = 0;
  while (out_.size() < kWriteBytes) {
    const uint8_t* bytes = nullptr;
    const ssize_t size = http2_.mem_send(session_, &bytes);
    if (size < 0) return false;
    if (size == 0) return true;
    out_.append(reinterpret_cast<const char*>(bytes), size_t(size));
  }
  return true;
}

void GrpcConnection::flush() {
  while (writable_ && is_open()) {
    if (!fill()) return close(kLost, "libnghttp2 cannot go on");
    if (out_.empty()) break;
    const ssize_t n = send(fd_.get(), out_.data() + written_, out_.size() - written_, MSG_NOSIGNAL);
    if (n >= 0) written_ += size_t(n);
    else if (errno == EAGAIN || errno == EWOULDBLOCK) writable_ = false;
    else if (errno != EINTR) return close(kLost, std::string("connection lost: ") + std::strerror(errno));
  }
  if (is_open()) watch(!writable_);
}

void GrpcConnection::watch(bool writable) {
  if (writable == watched_writable_) return;
  epoll_event event{EPOLLIN | (writable ? EPOLLOUT : 0u), {.u64 = tag_}};
  epoll_ctl(epoll_, EPOLL_CTL_MOD, fd_.get(), &event);
  watched_writable_ = writable;
}

void GrpcConnection::handle(uint32_t events) {
  if (!is_open()) return;
  if (events & EPOLLOUT) writable_ = true;
  if (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) {
    const ssize_t n = recv(fd_.get(), in_.data(), in_.size(), 0);
    if (n == 0) return close(kLost, "the server closed the connection");
    if (n < 0 && errno != EAGAIN && errno != EINTR) return close(kLost, std::string("connection lost: ") + std::strerror(errno));
    if (n > 0 && http2_.mem_recv(session_, in_.data(), size_t(n)) < 0) return close(kMalformed, "what came is not HTTP/2");
  }
  flush();
  // A peer that broke the protocol has been told so, and will not be heard any more; so has one that said goodbye.
  if (is_open() && !http2_.want_read(session_) && !http2_.want_write(session_)) close(kMalformed, "what came is not HTTP/2");
}

void GrpcConnection::close(int32_t status, const std::string& why) {
  http2_.session_del(session_);
  session_ = nullptr;
  fd_.reset();  // leaves the epoll instance with it
  out_.clear();
  written_ = 0;
  std::unordered_map<int32_t, Call> calls;
  calls.swap(calls_);
  for (const auto& [stream, call] : calls) replies_.over(call.index, status, why);
}

ssize_t GrpcConnection::read_body(nghttp2_session*, int32_t stream, uint8_t* into, size_t room, uint32_t* flags, nghttp2_data_source*, void* self) {
  Call* call = connection(self).find(stream);
  if (call == nullptr) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
  const GrpcMessage& message = *call->message;
  const size_t size = std::min(room, message.bytes.size() - call->sent);
  std::memcpy(into, message.bytes.data() + call->sent, size);
  if (message.deadline_at >= 0) {
    // What of the deadline lies in [sent, sent + size).
    const size_t at = size_t(message.deadline_at), end = std::min(at + sizeof call->deadline, call->sent + size);
    for (size_t i = std::max(at, call->sent); i < end; ++i) into[i - call->sent] = call->deadline[i - at];
  }
  call->sent += size;
  if (call->sent == message.bytes.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return ssize_t(size);
}

GrpcConnection::Call* GrpcConnection::find(int32_t stream) {
  const auto found = calls_.find(stream);
  return found == calls_.end() ? nullptr : &found->second;
}

int GrpcConnection::on_header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size, const uint8_t* value,
                              size_t value_size, uint8_t, void* self) {
  Call* call = connection(self).find(frame->hd.stream_id);
  if (call == nullptr) return 0;
  const std::string_view key(reinterpret_cast<const char*>(name), name_size), text(reinterpret_cast<const char*>(value), value_size);
  if (key == ":status") call->http_status = number(text);
  else if (key == "grpc-status") call->malformed |= (call->grpc_status = number(text)) < 0 || call->grpc_status > 16;
  else if (key == "grpc-message") call->grpc_message = decoded(text);
  return 0;
}

int GrpcConnection::on_data(nghttp2_session*, uint8_t, int32_t stream, const uint8_t* data, size_t size, void* self) {
  Call* call = connection(self).find(stream);
  if (call == nullptr) return 0;
  if (call->received < kPrefixBytes) std::copy_n(data, std::min(size, size_t(kPrefixBytes - call->received)), call->prefix + call->received);
  call->received += size;
  return 0;
}

int GrpcConnection::on_frame(nghttp2_session*, const nghttp2_frame* frame, void* self) {
  if (frame->hd.type == NGHTTP2_SETTINGS && (frame->hd.flags & NGHTTP2_FLAG_ACK) == 0) connection(self).greeted_ = true;
  return 0;
}

int GrpcConnection::on_not_sent(nghttp2_session*, const nghttp2_frame* frame, int, void* self) {
  if (frame->hd.type == NGHTTP2_HEADERS) connection(self).finish(frame->hd.stream_id, NGHTTP2_REFUSED_STREAM);
  return 0;
}

int GrpcConnection::on_close(nghttp2_session*, int32_t stream, uint32_t error, void* self) {
  connection(self).finish(stream, error);
  return 0;
}

void GrpcConnection::finish(int32_t stream, uint32_t error) {
  const auto found = calls_.find(stream);
  if (found == calls_.end()) return;
  std::string message;
  const int32_t status = verdict(found->second, error, message);
  const size_t index = found->second.index;
  calls_.erase(found);
  replies_.over(index, status, message);
}

int32_t GrpcConnection::verdict(const Call& call, uint32_t error, std::string& message) const {
  if (call.grpc_status > 0 && !call.malformed) {
    message = call.grpc_message;
    for (size_t i = 0; i < target_.words.size(); ++i)
      if (message.find("[" + target_.words[i] + "] ") != std::string::npos) return call.grpc_status + 256 * int32_t(i + 1);
    return call.grpc_status;
  }
  if (error != NGHTTP2_NO_ERROR) {
    message = "the server reset the call, HTTP/2 error " + std::to_string(error);
    return kLost;
  }
  const uint8_t* p = call.prefix;
  const uint64_t size = uint64_t(p[1]) << 24 | uint64_t(p[2]) << 16 | uint64_t(p[3]) << 8 | p[4];
  if (call.malformed || call.http_status != 200 || call.grpc_status != 0) {
    message = "the reply has HTTP status " + std::to_string(call.http_status) + " and no valid gRPC status";
  } else if (call.received < kPrefixBytes || p[0] != 0 || call.received != kPrefixBytes + size) {
    message = "the reply is not one whole uncompressed message: " + std::to_string(call.received) + " bytes";
  } else {
    return 0;
  }
  return kMalformed;
}

}  // namespace sidepool
#endif
