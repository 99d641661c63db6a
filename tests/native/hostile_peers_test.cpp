// What misbehaving peers do to lanes and engines: real sockets and shared memory, in one process so that the sanitizers see
// both ends.
#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <random>
#include <thread>

#include "check.hpp"
#include "client.hpp"
#include "cluster.hpp"
#include "connect.hpp"
#include "server.hpp"

using namespace sidepool;

namespace {

int open_descriptors() {
  int n = 0;
  DIR* d = opendir("/proc/self/fd");
  while (readdir(d) != nullptr) ++n;
  closedir(d);
  return n;
}

void dead_peers_leave_nothing(const std::string& kind) {
  Cluster cluster(1, 1, kind);
  auto settle = [&](int64_t lanes) {
    for (int i = 0; i < 500 && cluster.servers[0]->engines()[0]->load() != lanes; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK(cluster.servers[0]->engines()[0]->load() == lanes);
  };
  cluster.connect(0, kind)->kill();
  settle(0);
  const int before = open_descriptors();
  for (int i = 0; i < 1000; ++i) {
    const auto lane = cluster.connect(0, kind);
    // Posts and vanishes without waiting for the answer, every other time.
    if (i % 2 == 0) {
      LookupClient client(5, make_routes(1), 0, false);
      client.attach(0, lane);
      Looker looker(unsigned(i) + 1);
      looker.look(client, 3, 1);
    }
    lane->kill();
    if (i % 20 == 19) settle(0);
  }
  settle(0);
  CHECK(open_descriptors() <= before);
}

int raw_connection(const Cluster& cluster) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(uint16_t(cluster.ports[0]));
  inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
  CHECK(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0);
  return fd;
}

// The far end of a tcp lane, played by the test: answers what it likes, when it likes.
struct PlayedSidecar {
  Fd listener{socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  Fd peer;
  std::shared_ptr<ClientLane> lane;

  PlayedSidecar() {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof at;
    CHECK(bind(listener.get(), reinterpret_cast<sockaddr*>(&at), sizeof at) == 0 && listen(listener.get(), 1) == 0);
    getsockname(listener.get(), reinterpret_cast<sockaddr*>(&at), &length);
    std::thread admission([this] {
      peer = Fd(accept(listener.get(), nullptr, nullptr));
      Hello hello;
      CHECK(recv(peer.get(), &hello, sizeof hello, MSG_WAITALL) == ssize_t(sizeof hello));
      HelloAck ack;
      ack.slots = 4;
      ack.request_bytes = ack.response_bytes = 4096;
      CHECK(send(peer.get(), &ack, sizeof ack, MSG_NOSIGNAL) == ssize_t(sizeof ack));
    });
    lane = connect_tcp("127.0.0.1", ntohs(at.sin_port), fresh_token(), 5);
    admission.join();
  }

  // Responses without features to these slots, in one write. A slot's lookup has the id slot + 1.
  void answer(const std::vector<uint32_t>& slots) {
    std::vector<ResponseHeader> frames(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) {
      frames[i].flags = kLastPiece;
      frames[i].frame_bytes = sizeof(ResponseHeader);
      frames[i].slot = slots[i];
      frames[i].lookup_id = slots[i] + 1;
    }
    const size_t bytes = frames.size() * sizeof(ResponseHeader);
    CHECK(send(peer.get(), frames.data(), bytes, MSG_NOSIGNAL) == ssize_t(bytes));
  }
};

// One waiter reads the socket for all. What it hands on when it is done must reach a waiter that still needs it: not one
// whose response it has just taken in, nor one whose deadline has come.
void reading_is_handed_to_who_still_waits() {
  for (int round = 0; round < 40; ++round) {
    PlayedSidecar sidecar;
    const bool late = round % 2;  // slot 0 gives up instead of being answered
    std::vector<std::thread> waiters;
    std::atomic<int> answered{0};
    const uint64_t start = now_ns();
    for (const uint32_t slot : {1u, 0u, 2u}) {  // slot 1 comes first and reads
      CHECK(sidecar.lane->try_acquire() >= 0);
      CHECK(sidecar.lane->post(slot, sizeof(RequestHeader), slot + 1, {0}, start + 5'000'000'000) == Status::ok);
      waiters.emplace_back([&, slot] {
        Status status;
        sidecar.lane->wait(slot, 0, slot == 0 && late ? start + 20'000'000 : start + 5'000'000'000, 0, status);
        answered += status == Status::ok;
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    while (late && now_ns() < start + 20'000'000) {
    }
    sidecar.answer(late ? std::vector<uint32_t>{1} : std::vector<uint32_t>{0, 1});
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    sidecar.answer({2});
    for (auto& waiter : waiters) waiter.join();
    CHECK(answered.load() == (late ? 2 : 3));
  }
}

// Whatever strangers send, the lane next to them goes on.
void hostile_bytes_on_the_tcp_port_hurt_nobody() {
  Cluster cluster(1);
  LookupClient client(5, make_routes(1), 5, false);
  client.attach(0, cluster.connect(0, "tcp"));
  Looker looker(1);
  std::mt19937_64 rng(3);
  for (int i = 0; i < 200; ++i) {
    const int fd = raw_connection(cluster);
    std::vector<uint64_t> noise(size_t(rng() % 64));
    for (auto& n : noise) n = rng();
    if (i % 3 == 0) {
      Hello hello;  // well-formed, token unknown
      CHECK(send(fd, &hello, sizeof hello, MSG_NOSIGNAL) == ssize_t(sizeof hello));
    }
    if (i % 3 == 1) {
      // An admitted lane that then lies: valid handshake, hostile request headers.
      const std::string token = fresh_token();
      cluster.servers[0]->expect(token, "tcp", {4, 1 << 16, 1 << 18}, 5);
      Hello hello;
      std::memcpy(hello.token, token.data(), token.size());
      CHECK(send(fd, &hello, sizeof hello, MSG_NOSIGNAL) == ssize_t(sizeof hello));
      RequestHeader header;
      header.frame_bytes = i % 2 ? ~0ull : 1ull << 40;
      header.slot = uint32_t(rng());
      header.feature_count = uint32_t(rng());
      header.value_count = rng();
      send(fd, &header, sizeof header, MSG_NOSIGNAL);
    }
    if (!noise.empty()) send(fd, noise.data(), noise.size() * 8, MSG_NOSIGNAL);
    close(fd);
    if (i % 10 == 0) CHECK(looker.look(client, 7).status == Status::ok && looker.right(7));
  }
  CHECK(looker.look(client, 7).status == Status::ok && looker.right(7));
}

// A peer may write anything into the memory it shares, at any time.
void hostile_writes_to_shared_memory_hurt_nobody() {
  Cluster cluster(1);
  LookupClient client(5, make_routes(1), 5, false);
  client.attach(0, cluster.connect(0, "shm"));
  Looker looker(1);
  std::mt19937_64 rng(5);
  for (int i = 0; i < 300; ++i) {
    const auto lane = cluster.connect(0, "shm");
    std::byte* header = lane->request(0) - kShmHeaderBytes;
    auto* memory = reinterpret_cast<std::atomic<uint64_t>*>(lane->request(0));
    for (size_t w = 0; w < 64; ++w) memory[w].store(i % 2 ? rng() : rng() % 9, std::memory_order_relaxed);
    if (i % 4 == 0) {
      RequestHeader good;
      good.frame_bytes = 1 << 16;
      good.epoch = 5;
      good.budget_ns = 1'000'000'000;
      good.batch = uint32_t(rng() % 5);
      good.feature_count = uint32_t(rng() % 9);
      good.value_count = rng() % 9;
      std::memcpy(lane->request(0), &good, sizeof good);
    }
    reinterpret_cast<std::atomic<uint64_t>*>(header)->fetch_or(i % 3 ? 1 : rng());
    lane->acquire(now_ns() + 100'000);
    if (i % 10 == 0) CHECK(looker.look(client, 7).status == Status::ok && looker.right(7));
    lane->kill();
  }
  CHECK(looker.look(client, 7).status == Status::ok && looker.right(7));
}

// A reader that takes nothing is held to its slots; its neighbour on the same engine is served.
void a_slow_reader_is_held_to_its_credits() {
  Cluster cluster(1);
  const std::string token = fresh_token();
  cluster.servers[0]->expect(token, "tcp", {4, 1 << 16, 4 << 20}, 5);
  Fd slow = dial_tcp("127.0.0.1", cluster.ports[0], now_ns() + 2'000'000'000);
  const int small = 4096;
  setsockopt(slow.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  shake_hands(slow.get(), hello_with(token, FrameKind::hello, "test"), nullptr, 0, now_ns() + 2'000'000'000, "test");
  // Batches of zero-length fixed bags: small requests with large answers.
  const uint32_t batch = 8000;
  const RequestLayout layout = request_layout(kFeatures, 0, 0, 0);
  std::vector<std::byte> frame(layout.total);
  RequestHeader header;
  header.frame_bytes = layout.total;
  header.epoch = 5;
  header.budget_ns = 5'000'000'000;
  header.batch = batch;
  header.feature_count = kFeatures;
  for (uint32_t f = 0; f < kFeatures; ++f) {
    FeatureEntry entry;
    entry.feature = f;
    entry.fixed_length = 0;
    std::memcpy(frame.data() + sizeof header + f * sizeof entry, &entry, sizeof entry);
  }
  for (uint32_t slot = 0; slot < 4; ++slot) {
    header.slot = slot;
    header.lookup_id = slot + 1;
    std::memcpy(frame.data(), &header, sizeof header);
    CHECK(send(slow.get(), frame.data(), frame.size(), MSG_NOSIGNAL) == ssize_t(frame.size()));
  }
  LookupClient client(5, make_routes(1), 5, false);
  client.attach(0, cluster.connect(0, "tcp"));
  Looker looker(1);
  for (int i = 0; i < 200; ++i) CHECK(looker.look(client, 7).status == Status::ok && looker.right(7));
  // Beyond its credits (the kernel's buffers may have freed a slot or two), without having read anything: the sidecar
  // hangs up instead of growing.
  bool gone = false;
  header.slot = 0;
  for (int i = 0; i < 1000 && !gone; ++i) {
    header.lookup_id = uint64_t(i) + 9;
    std::memcpy(frame.data(), &header, sizeof header);
    send(slow.get(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    gone = cluster.servers[0]->engines()[0]->load() == 1;
  }
  CHECK(gone);
  CHECK(looker.look(client, 7).status == Status::ok && looker.right(7));
}
}  // namespace

int main() {
  std::vector<TestCase> tests;
  for (const std::string& kind : {std::string("shm"), std::string("tcp"), kApart})
    tests.push_back({kind + ": a thousand dead peers leave nothing", [kind] { dead_peers_leave_nothing(kind); }});
  tests.push_back({"reading is handed to who still waits", reading_is_handed_to_who_still_waits});
  tests.push_back({"hostile bytes on the tcp port hurt nobody", hostile_bytes_on_the_tcp_port_hurt_nobody});
  tests.push_back({"hostile writes to shared memory hurt nobody", hostile_writes_to_shared_memory_hurt_nobody});
  tests.push_back({"a slow reader is held to its credits", a_slow_reader_is_held_to_its_credits});
  return run_tests(tests);
}
