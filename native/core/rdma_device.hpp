// An opened device with the port and address that its lanes use, and its asynchronous events.
#pragma once
#include "verbs.hpp"

#ifdef SIDEPOOL_VERBS
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "memory.hpp"
#include "rdma.hpp"
#include "rdma_wire.hpp"

namespace sidepool {

// Told, on the device's own thread, that something of the device failed: one queue pair, or (0) all of them.
class FailureListener {
 public:
  virtual ~FailureListener() = default;
  virtual void device_failed(uint32_t qpn) = 0;
};

class RdmaDevice {
 public:
  // Throws Error(transport) naming the option that does not fit what is there.
  explicit RdmaDevice(const RdmaOptions& options);
  ~RdmaDevice();

  ibv_context* context() const { return context_.get(); }
  const RdmaOptions& options() const { return options_; }
  const std::string& name() const { return name_; }
  uint8_t port() const { return port_; }
  int gid_index() const { return gid_index_; }
  bool ethernet() const { return port_attr_.link_layer == IBV_LINK_LAYER_ETHERNET; }
  int max_cqe() const { return max_cqe_; }
  std::string description() const;

  // This end's address and path, to be completed by the lane.
  RdmaEnd end() const;
  // Throws Error(transport) where the peer cannot be on the same fabric.
  void check(const RdmaEnd& peer) const;

  void listen(FailureListener* listener);
  void forget(FailureListener* listener);

 private:
  bool choose_port(ibv_context* context);
  void choose_gid();
  void watch();
  void tell(uint32_t qpn);

  RdmaOptions options_;
  Owned<ibv_context> context_;
  std::string name_;
  uint8_t port_ = 0;
  int gid_index_ = 0;
  int max_cqe_ = 0;
  ibv_port_attr port_attr_{};
  ibv_gid gid_{};
  std::mutex listeners_mutex_;  // taken when lanes' engines come and go, and by events
  std::vector<FailureListener*> listeners_;
  Fd wake_;
  std::atomic<bool> stopping_{false};
  std::thread watcher_;
};

}  // namespace sidepool
#endif
