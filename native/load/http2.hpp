// libnghttp2, loaded at run time: a machine without it lacks gRPC load and nothing else. Compiled only where its headers are.
#pragma once

#if __has_include(<nghttp2/nghttp2.h>)
#define SIDEPOOL_HTTP2 1
#include <nghttp2/nghttp2.h>

namespace sidepool {

struct Http2 {
  decltype(&::nghttp2_session_callbacks_new) callbacks_new;
  decltype(&::nghttp2_session_callbacks_del) callbacks_del;
  decltype(&::nghttp2_session_callbacks_set_on_header_callback) set_on_header;
  decltype(&::nghttp2_session_callbacks_set_on_data_chunk_recv_callback) set_on_data;
  decltype(&::nghttp2_session_callbacks_set_on_frame_recv_callback) set_on_frame;
  decltype(&::nghttp2_session_callbacks_set_on_frame_not_send_callback) set_on_not_sent;
  decltype(&::nghttp2_session_callbacks_set_on_stream_close_callback) set_on_close;
  decltype(&::nghttp2_session_client_new3) client_new;
  decltype(&::nghttp2_session_del) session_del;
  decltype(&::nghttp2_submit_settings) submit_settings;
  decltype(&::nghttp2_session_set_local_window_size) set_window;
  decltype(&::nghttp2_submit_request) submit_request;
  decltype(&::nghttp2_session_mem_send) mem_send;
  decltype(&::nghttp2_session_mem_recv) mem_recv;
  decltype(&::nghttp2_session_check_request_allowed) request_allowed;
  decltype(&::nghttp2_session_want_read) want_read;
  decltype(&::nghttp2_session_want_write) want_write;
};

// Throws Error(transport) where the library cannot be loaded, saying what to install.
const Http2& http2();

}  // namespace sidepool
#endif
