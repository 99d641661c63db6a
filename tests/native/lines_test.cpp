// Engines share no cache line while each answers its own lanes: counted, access by access. Built for the thread sanitizer only, whose
// hooks accesses.cpp answers.
#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <new>
#include <thread>

#include "accesses.hpp"
#include "cluster.hpp"

// As dense as any allocator packs: what is made one after the other lies side by side, and is never freed.
static void* packed(size_t bytes, size_t alignment) {
  constexpr size_t kArena = size_t(4) << 30;  // of addresses, not of memory
  static std::byte* const arena = static_cast<std::byte*>(
      mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static std::atomic<size_t> used{0};
  for (size_t before = used.load();;) {
    const size_t begin = (before + alignment - 1) / alignment * alignment;
    if (begin + bytes > kArena) throw std::bad_alloc();
    if (used.compare_exchange_weak(before, begin + bytes)) return arena + begin;
  }
}
void* operator new(size_t bytes) { return packed(bytes, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) { return packed(bytes, size_t(alignment)); }
void operator delete(void*) noexcept {}
void operator delete(void*, size_t) noexcept {}
void operator delete(void*, std::align_val_t) noexcept {}
void operator delete(void*, size_t, std::align_val_t) noexcept {}

using namespace sidepool;

namespace {

constexpr int kLookups = 300;
constexpr const char* kRdma = "rdma";

RdmaOptions options(const std::string& device) {
  RdmaOptions found;
  found.device = device;
  found.peer_timeout_s = 60;
  return found;
}

// Two callers, each with a lane to an engine of its own, and over rdma with an engine of its own at this end too.
struct World {
  Cluster cluster;
  std::array<LookupClient, 2> clients;

  explicit World(const std::string& kind)
      : cluster(1, 2, kind == kRdma ? "tcp" : kind), clients{LookupClient(5, make_routes(1), 5, false), LookupClient(5, make_routes(1), 5, false)} {
    SidecarServer& server = *cluster.servers[0];
    if (kind == kRdma) server.listen_rdma(options("rxeB"));
    for (LookupClient& client : clients) {
      constexpr LaneLimits limits{4, 1 << 16, 2 << 20};
      if (kind != kRdma) {
        client.attach(0, cluster.connect(0, kind, limits.slots, limits.request_bytes, limits.response_bytes));
        continue;
      }
      const auto offer = client.rdma(options("rxeA"), 1)->prepare(limits);
      client.attach(0, offer->connect(server.connect_rdma(limits, offer->end())));
    }
  }
  ~World() {
    for (LookupClient& client : clients) client.close();
    cluster.servers[0]->close();
  }

  // Both callers at once.
  void look(int lookups, int64_t batch) {
    std::array<std::thread, 2> threads;
    for (unsigned t = 0; t < 2; ++t)
      threads[t] = std::thread([this, t, lookups, batch] {
        accesses::this_thread_calls();
        Looker looker(t);
        for (int i = 0; i < lookups; ++i) CHECK(looker.look(clients[t], batch).status == Status::ok && looker.right(batch));
      });
    for (std::thread& thread : threads) thread.join();
  }

  size_t shared_lines(int lookups, int64_t batch) {
    look(lookups, batch);  // what grows, grows now
    accesses::start();
    look(lookups, batch);
    accesses::stop();
    const auto found = accesses::shared_by_engines();
    std::printf("%zu of %ld cache lines are shared\n", found.size(), long(accesses::touched_by_engines()));
    for (size_t i = 0; i < found.size() && i < 5; ++i)
      std::printf("  %#zx: written by %x, read by %x, last at %p\n", size_t(found[i].line), found[i].wrote, found[i].read, found[i].writer);
    CHECK(accesses::touched_by_engines() > 50);
    return found.size();
  }
};

void engines_share_no_cache_line(const std::string& kind) { CHECK(World(kind).shared_lines(kLookups, 2) == 0); }

// What is counted can be more than none: a large lookup is pooled by both engines.
void engines_that_help_each_other_do(const std::string& kind) { CHECK(World(kind).shared_lines(20, 3000) > 0); }

bool has_rdma() {
  try {
    make_rdma_server(options("rxeB"));
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

int main() {
  accesses::this_thread_calls();
  std::vector<TestCase> tests{{"shm: engines that help each other do share lines", [] { engines_that_help_each_other_do("shm"); }}};
  std::vector<std::string> kinds{"shm", "tcp", kApart};
  if (has_rdma()) kinds.push_back(kRdma);
  for (const std::string& kind : kinds) tests.push_back({kind + ": engines share no cache line", [kind] { engines_share_no_cache_line(kind); }});
  return run_tests(tests);
}
