#include "verbs.hpp"

#ifdef SIDEPOOL_VERBS
#include <dlfcn.h>

namespace sidepool {
namespace {

template <class F>
void find(void* library, F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw Error(Status::transport, std::string("rdma: libibverbs has no ") + name);
}

Verbs load() {
  // Never closed: its providers keep state for as long as the process lives.
  void* library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw Error(Status::transport, std::string("rdma: libibverbs cannot be loaded: ") + dlerror() + "; apt-get install libibverbs1 ibverbs-providers");
  Verbs v;
  find(library, v.get_device_list, "ibv_get_device_list");
  find(library, v.free_device_list, "ibv_free_device_list");
  find(library, v.get_device_name, "ibv_get_device_name");
  find(library, v.open_device, "ibv_open_device");
  find(library, v.close_device, "ibv_close_device");
  find(library, v.query_device, "ibv_query_device");
  find(library, v.query_port, "ibv_query_port");
  find(library, v.query_gid, "ibv_query_gid");
  find(library, v.alloc_pd, "ibv_alloc_pd");
  find(library, v.dealloc_pd, "ibv_dealloc_pd");
  find(library, v.reg_mr, "ibv_reg_mr");
  v.reg_dmabuf_mr = reinterpret_cast<decltype(v.reg_dmabuf_mr)>(dlsym(library, "ibv_reg_dmabuf_mr"));
  find(library, v.dereg_mr, "ibv_dereg_mr");
  find(library, v.create_comp_channel, "ibv_create_comp_channel");
  find(library, v.destroy_comp_channel, "ibv_destroy_comp_channel");
  find(library, v.create_cq, "ibv_create_cq");
  find(library, v.destroy_cq, "ibv_destroy_cq");
  find(library, v.get_cq_event, "ibv_get_cq_event");
  find(library, v.ack_cq_events, "ibv_ack_cq_events");
  find(library, v.create_qp, "ibv_create_qp");
  find(library, v.modify_qp, "ibv_modify_qp");
  find(library, v.destroy_qp, "ibv_destroy_qp");
  find(library, v.get_async_event, "ibv_get_async_event");
  find(library, v.ack_async_event, "ibv_ack_async_event");
  return v;
}

}  // namespace

const Verbs& verbs() {
  static const Verbs loaded = load();
  return loaded;
}

const char* meaning(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_SUCCESS: return "success";
    // The peer does not answer, or refuses: its end of the lane is gone.
    case IBV_WC_RETRY_EXC_ERR: return "the peer does not answer (retries exceeded)";
    case IBV_WC_RNR_RETRY_EXC_ERR: return "the peer does not post receives";
    case IBV_WC_RESP_TIMEOUT_ERR: return "the peer did not answer in time";
    case IBV_WC_REM_ABORT_ERR: return "the peer ended the connection";
    // What one end may do at the other does not fit: wrong keys, addresses or lengths.
    case IBV_WC_REM_ACCESS_ERR: return "the peer refuses access to its memory";
    case IBV_WC_REM_INV_REQ_ERR: return "the peer calls the operation invalid";
    case IBV_WC_REM_OP_ERR: return "the operation failed at the peer";
    case IBV_WC_LOC_ACCESS_ERR: return "the peer wrote where it must not";
    // Set up wrongly at this end.
    case IBV_WC_LOC_LEN_ERR: return "a message is longer than its buffer";
    case IBV_WC_LOC_QP_OP_ERR: return "the queue pair refuses the operation";
    case IBV_WC_LOC_PROT_ERR: return "a buffer is not registered";
    case IBV_WC_BAD_RESP_ERR: return "the peer's answer makes no sense";
    case IBV_WC_FATAL_ERR: return "the device failed";
    // A consequence of an earlier failure, whose own completion the provider did not deliver.
    case IBV_WC_WR_FLUSH_ERR: return "the queue pair was already broken";
    default: return "an error of the device";
  }
}

}  // namespace sidepool
#endif
