// What says that there is no rdma lane in a build without the verbs' headers.
#include "rdma.hpp"
#include "verbs.hpp"

namespace sidepool {

#ifdef SIDEPOOL_VERBS

std::string rdma_unavailable() {
  try {
    verbs();
    return "";
  } catch (const Error& e) {
    return e.what();
  }
}

#else

std::string rdma_unavailable() {
  return "rdma: this build has no rdma lane: libibverbs-dev was missing; apt-get install libibverbs-dev, then make native";
}
std::shared_ptr<RdmaServer> make_rdma_server(const RdmaOptions&) { throw Error(Status::transport, rdma_unavailable()); }
std::string rdma_dmabuf_refusal(const std::string&, int) { throw Error(Status::transport, rdma_unavailable()); }
std::shared_ptr<RdmaRanker> make_rdma_ranker(const RdmaOptions&, int, uint32_t) { throw Error(Status::transport, rdma_unavailable()); }

#endif

}  // namespace sidepool
