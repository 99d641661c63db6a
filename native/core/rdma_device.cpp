#include "rdma_device.hpp"

#ifdef SIDEPOOL_VERBS
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <fstream>

namespace sidepool {
namespace {

std::string gid_type(const std::string& device, int port, int index) {
  std::ifstream file("/sys/class/infiniband/" + device + "/ports/" + std::to_string(port) + "/gid_attrs/types/" + std::to_string(index));
  std::string type;
  std::getline(file, type);  // stays empty for entries that are not in use
  return type;
}

bool is_ipv4(const ibv_gid& gid) {
  static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::memcmp(gid.raw, mapped, sizeof mapped) == 0;
}

std::string text(const ibv_gid& gid) {
  char out[40];
  for (int i = 0; i < 8; ++i) std::snprintf(out + i * 5, 6, i < 7 ? "%02x%02x:" : "%02x%02x", gid.raw[2 * i], gid.raw[2 * i + 1]);
  return out;
}

}  // namespace

std::string rdma_dmabuf_refusal(const std::string& device, int fd) {
  const Verbs& v = verbs();
  if (v.reg_dmabuf_mr == nullptr) return "libibverbs has no ibv_reg_dmabuf_mr";
  int count = 0;
  std::unique_ptr<ibv_device*, void (*)(ibv_device**)> list(v.get_device_list(&count), v.free_device_list);
  for (int i = 0; list && i < count; ++i) {
    if (device != v.get_device_name(list.get()[i])) continue;
    const Owned<ibv_context> context = require(v.open_device(list.get()[i]), ("open device " + device).c_str());
    const Owned<ibv_pd> pd = require(v.alloc_pd(context.get()), "allocate a protection domain");
    const Owned<ibv_mr> memory(v.reg_dmabuf_mr(pd.get(), 0, 4096, 0, fd, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
    return memory || (fd < 0 && errno == EBADF) ? "" : std::strerror(errno);
  }
  throw Error(Status::transport, "rdma device: found '" + device + "'; allowed: a device of this machine");
}

RdmaDevice::RdmaDevice(const RdmaOptions& options) : options_(options) {
  const Verbs& v = verbs();
  int count = 0;
  std::unique_ptr<ibv_device*, void (*)(ibv_device**)> list(v.get_device_list(&count), v.free_device_list);
  if (!list || count == 0) throw Error(Status::transport, "rdma: this machine has no device");
  std::string names;
  for (int i = 0; i < count && !context_; ++i) {
    const std::string name = v.get_device_name(list.get()[i]);
    names += (i ? ", " : "") + name;
    if (options.device != "auto" && options.device != name) continue;
    Owned<ibv_context> context = require(v.open_device(list.get()[i]), ("open device " + name).c_str());
    if (!choose_port(context.get())) continue;
    context_ = std::move(context);
    name_ = name;
  }
  if (!context_)
    throw Error(Status::transport, "rdma device: found '" + options.device + "', port " + std::to_string(options.port) +
                                       ": no such active port; allowed: auto, or an active port of " + names);
  ibv_device_attr attributes{};
  if (v.query_device(context_.get(), &attributes) != 0) throw Error(Status::transport, "rdma: cannot query device " + name_);
  max_cqe_ = attributes.max_cqe;
  choose_gid();
  fcntl(context_->async_fd, F_SETFL, fcntl(context_->async_fd, F_GETFL) | O_NONBLOCK);
  wake_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  watcher_ = std::thread([this] { watch(); });
}

RdmaDevice::~RdmaDevice() {
  stopping_.store(true, std::memory_order_release);
  eventfd_write(wake_.get(), 1);
  watcher_.join();
}

bool RdmaDevice::choose_port(ibv_context* context) {
  ibv_device_attr attributes{};
  if (verbs().query_device(context, &attributes) != 0) return false;
  for (int port = 1; port <= attributes.phys_port_cnt; ++port) {
    if (options_.port != 0 && options_.port != port) continue;
    port_attr_ = {};
    if (verbs().query_port(context, uint8_t(port), &port_attr_) != 0 || port_attr_.state != IBV_PORT_ACTIVE) continue;
    port_ = uint8_t(port);
    return true;
  }
  return false;
}

// RoCE v2 over IPv4 goes through any routed network and is what fabrics are set up for; then v2 over IPv6, then whatever the
// first entry is (InfiniBand's only one).
void RdmaDevice::choose_gid() {
  int best = -1, rank = -1;
  for (int i = 0; i < port_attr_.gid_tbl_len; ++i) {
    ibv_gid gid{};
    if ((options_.gid_index >= 0 && i != options_.gid_index) || verbs().query_gid(context_.get(), port_, i, &gid) != 0) continue;
    const std::string type = gid_type(name_, port_, i);
    if (type.empty()) continue;
    const int this_rank = type == "RoCE v2" ? (is_ipv4(gid) ? 2 : 1) : 0;
    if (this_rank <= rank) continue;
    best = i;
    rank = this_rank;
    gid_ = gid;
  }
  if (best < 0)
    throw Error(Status::transport, "rdma gid_index: found " + std::to_string(options_.gid_index) + " on " + name_ + " port " +
                                       std::to_string(port_) + "; allowed: auto, or an entry of its table that is in use");
  gid_index_ = best;
}

std::string RdmaDevice::description() const {
  return name_ + " port " + std::to_string(port_) + ", gid " + std::to_string(gid_index_) + " " + text(gid_) + ", mtu " +
         std::to_string(128 << int(port_attr_.active_mtu));
}

RdmaEnd RdmaDevice::end() const {
  RdmaEnd end;
  end.link_layer = ethernet() ? 2 : 1;
  end.mtu = uint8_t(port_attr_.active_mtu);
  end.lid = port_attr_.lid;
  std::memcpy(end.gid, gid_.raw, sizeof end.gid);
  end.clock_id = clock_id();
  return end;
}

void RdmaDevice::check(const RdmaEnd& peer) const {
  const auto refuse = [](const std::string& what) { throw Error(Status::transport, "rdma: the peer's end: " + what); };
  if (peer.magic != kMagic || peer.version != kWireVersion || peer.kind != FrameKind::rdma_end)
    refuse("no end of wire version " + std::to_string(kWireVersion));
  if (peer.link_layer != (ethernet() ? 2 : 1))
    refuse("link layer: found " + std::to_string(peer.link_layer) + "; allowed: " + (ethernet() ? "2 (Ethernet)" : "1 (InfiniBand)"));
  if (peer.mtu < IBV_MTU_256 || peer.mtu > IBV_MTU_4096) refuse("mtu: found " + std::to_string(peer.mtu) + "; allowed: 1 to 5");
  if (peer.data_qpn == 0 || peer.data_qpn >= 1u << 24 || peer.control_qpn >= 1u << 24)
    refuse("queue pair numbers: found " + std::to_string(peer.data_qpn) + " and " + std::to_string(peer.control_qpn) + "; allowed: 24 bits");
}

void RdmaDevice::listen(FailureListener* listener) {
  std::lock_guard lock(listeners_mutex_);
  listeners_.push_back(listener);
}

void RdmaDevice::forget(FailureListener* listener) {
  std::lock_guard lock(listeners_mutex_);
  std::erase(listeners_, listener);
}

void RdmaDevice::watch() {
  while (!stopping_.load(std::memory_order_acquire)) {
    pollfd ready[2] = {{context_->async_fd, POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    if (::poll(ready, 2, -1) <= 0 || ready[1].revents != 0) continue;
    ibv_async_event event;
    if (verbs().get_async_event(context_.get(), &event) != 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      tell(0);
      return;  // the device is gone for good
    }
    bool concerns_all = false;
    uint32_t qpn = 0;
    switch (event.event_type) {
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
      case IBV_EVENT_PATH_MIG_ERR:
        qpn = event.element.qp->qp_num;
        break;
      case IBV_EVENT_CQ_ERR:
      case IBV_EVENT_DEVICE_FATAL:
        concerns_all = true;
        break;
      default:
        // A port that went down may come back within the retry time, and then nothing is lost; if it does not, sends and
        // keepalives run out of retries. The rest (address and client changes, limits reached) concerns no live lane.
        break;
    }
    // Acknowledged first: destroying the queue pair waits for that.
    verbs().ack_async_event(&event);
    if (concerns_all || qpn != 0) tell(qpn);
  }
}

void RdmaDevice::tell(uint32_t qpn) {
  std::lock_guard lock(listeners_mutex_);
  for (FailureListener* listener : listeners_) listener->device_failed(qpn);
}

}  // namespace sidepool
#endif
