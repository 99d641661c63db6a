#include "http2.hpp"

#ifdef SIDEPOOL_HTTP2
#include <dlfcn.h>

#include <string>

#include "status.hpp"

namespace sidepool {
namespace {

template <class F>
void find(void* library, F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw Error(Status::transport, std::string("gRPC load: libnghttp2 has no ") + name);
}

Http2 load() {
  void* library = dlopen("libnghttp2.so.14", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw Error(Status::transport, std::string("gRPC load: libnghttp2 cannot be loaded: ") + dlerror() + "; apt-get install libnghttp2-14");
  Http2 h;
  find(library, h.callbacks_new, "nghttp2_session_callbacks_new");
  find(library, h.callbacks_del, "nghttp2_session_callbacks_del");
  find(library, h.set_on_header, "nghttp2_session_callbacks_set_on_header_callback");
  find(library, h.set_on_data, "nghttp2_session_callbacks_set_on_data_chunk_recv_callback");
  find(library, h.set_on_frame, "nghttp2_session_callbacks_set_on_frame_recv_callback");
  find(library, h.set_on_not_sent, "nghttp2_session_callbacks_set_on_frame_not_send_callback");
  find(library, h.set_on_close, "nghttp2_session_callbacks_set_on_stream_close_callback");
  find(library, h.client_new, "nghttp2_session_client_new3");
  find(library, h.session_del, "nghttp2_session_del");
  find(library, h.submit_settings, "nghttp2_submit_settings");
  find(library, h.set_window, "nghttp2_session_set_local_window_size");
  find(library, h.submit_request, "nghttp2_submit_request");
  find(library, h.mem_send, "nghttp2_session_mem_send");
  find(library, h.mem_recv, "nghttp2_session_mem_recv");
  find(library, h.request_allowed, "nghttp2_session_check_request_allowed");
  find(library, h.want_read, "nghttp2_session_want_read");
  find(library, h.want_write, "nghttp2_session_want_write");
  return h;
}

}  // namespace

const Http2& http2() {
  static const Http2 loaded = load();
  return loaded;
}

}  // namespace sidepool
#endif
