// libibverbs, loaded at run time: a machine without it lacks this lane and nothing else. Compiled only where its headers are.
#pragma once

#if __has_include(<infiniband/verbs.h>)
#define SIDEPOOL_VERBS 1
#include <infiniband/verbs.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>

#include "status.hpp"

namespace sidepool {

// The functions that libibverbs exports; posting, polling and thread domains are inline in its header and go through the
// device's own table.
struct Verbs {
  decltype(&::ibv_get_device_list) get_device_list;
  decltype(&::ibv_free_device_list) free_device_list;
  decltype(&::ibv_get_device_name) get_device_name;
  decltype(&::ibv_open_device) open_device;
  decltype(&::ibv_close_device) close_device;
  decltype(&::ibv_query_device) query_device;
  // The library's own entry fills the common part of ibv_port_attr, which is all that is read here.
  int (*query_port)(ibv_context*, uint8_t, ibv_port_attr*);
  decltype(&::ibv_query_gid) query_gid;
  decltype(&::ibv_alloc_pd) alloc_pd;
  decltype(&::ibv_dealloc_pd) dealloc_pd;
  ibv_mr* (*reg_mr)(ibv_pd*, void*, size_t, int);
  // Null in libraries older than 34, which cannot register other devices' memory.
  ibv_mr* (*reg_dmabuf_mr)(ibv_pd*, uint64_t offset, size_t length, uint64_t iova, int fd, int access);
  decltype(&::ibv_dereg_mr) dereg_mr;
  decltype(&::ibv_create_comp_channel) create_comp_channel;
  decltype(&::ibv_destroy_comp_channel) destroy_comp_channel;
  decltype(&::ibv_create_cq) create_cq;
  decltype(&::ibv_destroy_cq) destroy_cq;
  decltype(&::ibv_get_cq_event) get_cq_event;
  decltype(&::ibv_ack_cq_events) ack_cq_events;
  decltype(&::ibv_create_qp) create_qp;
  decltype(&::ibv_modify_qp) modify_qp;
  decltype(&::ibv_destroy_qp) destroy_qp;
  decltype(&::ibv_get_async_event) get_async_event;
  decltype(&::ibv_ack_async_event) ack_async_event;
};

// Throws Error(transport) where the library cannot be loaded, saying what to install.
const Verbs& verbs();

// Owners of verbs objects; the deleters never throw and ignore errors, since a failed destroy leaves nothing to do.
struct VerbsDelete {
  void operator()(ibv_context* c) const { verbs().close_device(c); }
  void operator()(ibv_pd* p) const { verbs().dealloc_pd(p); }
  void operator()(ibv_td* t) const { ibv_dealloc_td(t); }
  void operator()(ibv_mr* m) const { verbs().dereg_mr(m); }
  void operator()(ibv_comp_channel* c) const { verbs().destroy_comp_channel(c); }
  void operator()(ibv_cq* c) const { verbs().destroy_cq(c); }
  void operator()(ibv_qp* q) const { verbs().destroy_qp(q); }
};
template <class T>
using Owned = std::unique_ptr<T, VerbsDelete>;

// The pointer a verbs call returned, or the error it left in errno.
template <class T>
Owned<T> require(T* made, const char* what) {
  if (made == nullptr) throw Error(Status::transport, std::string("rdma: cannot ") + what + ": " + std::strerror(errno));
  return Owned<T>(made);
}

// What a completion that is no success means, and so why its lane ended.
const char* meaning(ibv_wc_status status);

}  // namespace sidepool
#endif
