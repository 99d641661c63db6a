// More than can be done in time: what engines answer first, what they and rankers refuse, and that everything is answered once.
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>

#include "check.hpp"
#include "cluster.hpp"
#include "connect.hpp"

using namespace sidepool;

namespace {

constexpr uint64_t kSecond = 1'000'000'000;

// A request without ids for `batch` samples, whose answer is as large as any.
std::vector<std::byte> frame_for(uint32_t slot, uint32_t batch, uint64_t budget_ns, int32_t priority = 0) {
  const RequestLayout layout = request_layout(kFeatures, 0, 0, 0);
  std::vector<std::byte> frame(layout.total);
  RequestHeader header;
  header.frame_bytes = layout.total;
  header.slot = slot;
  header.lookup_id = slot + 1;
  header.priority = priority;
  header.epoch = 5;
  header.budget_ns = budget_ns;
  header.batch = batch;
  header.feature_count = kFeatures;
  std::memcpy(frame.data(), &header, sizeof header);
  for (uint32_t f = 0; f < kFeatures; ++f) {
    FeatureEntry entry;
    entry.feature = f;
    entry.fixed_length = 0;
    std::memcpy(frame.data() + sizeof header + f * sizeof entry, &entry, sizeof entry);
  }
  return frame;
}

// A ranker's end of a tcp lane, bare.
struct BareLane {
  Fd socket;
  bool ended = false;
  BareLane(Cluster& cluster, uint64_t response_bytes) {
    const std::string token = fresh_token();
    cluster.servers[0]->expect(token, "tcp", {4, 1 << 16, response_bytes}, 5);
    const uint64_t until = now_ns() + 5 * kSecond;
    socket = dial_tcp("127.0.0.1", cluster.ports[0], until);
    Hello hello = hello_with(token, FrameKind::hello, "test");
    hello.window_bytes = kSmallest;
    shake_hands(socket.get(), hello, nullptr, 0, until, "test");
  }
  void send_all(const std::vector<std::byte>& bytes) {
    CHECK(send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) == ssize_t(bytes.size()));
  }
  // The next piece; its payload is read and dropped.
  ResponseHeader next() {
    ResponseHeader header;
    read_exactly(&header, sizeof header);
    std::vector<std::byte> payload(std::max(header.frame_bytes, sizeof header) - sizeof header);
    read_exactly(payload.data(), payload.size());
    return header;
  }
  void read_exactly(void* to, size_t bytes) {
    const uint64_t until = now_ns() + 20 * kSecond;
    for (size_t got = 0; got < bytes;) {
      const ssize_t n = recv(socket.get(), static_cast<std::byte*>(to) + got, bytes - got, MSG_DONTWAIT);
      if (n > 0) got += size_t(n);
      ended |= n == 0 || (n < 0 && (errno != EAGAIN || !wait_ready(socket.get(), POLLIN, until)));
      if (ended) break;
    }
    CHECK(!ended);
  }
};

void an_engine_answers_what_waits_in_its_order(Order order) {
  Cluster cluster(1, 1, "tcp", order);
  BareLane lane(cluster, 1 << 18);
  // All at once, so that the engine has them all before it answers one.
  std::vector<std::byte> burst;
  const int32_t priority[] = {0, 1, 0, 1};
  const uint64_t budget_s[] = {80, 70, 50, 60};
  for (uint32_t slot = 0; slot < 4; ++slot) {
    const auto frame = frame_for(slot, 4, budget_s[slot] * kSecond, priority[slot]);
    burst.insert(burst.end(), frame.begin(), frame.end());
  }
  lane.send_all(burst);
  std::vector<uint32_t> answered;
  for (int i = 0; i < 4; ++i) {
    const ResponseHeader header = lane.next();
    CHECK(header.status == 0);
    answered.push_back(header.slot);
  }
  CHECK(answered == (order == Order::edf ? std::vector<uint32_t>{3, 1, 2, 0} : std::vector<uint32_t>{0, 1, 2, 3}));
}

void what_has_no_time_left_is_refused_on_arrival() {
  Cluster cluster(1);
  BareLane lane(cluster, 1 << 18);
  auto burst = frame_for(0, 4, 50 * kSecond);
  const auto late = frame_for(1, 4, 0);
  burst.insert(burst.end(), late.begin(), late.end());
  lane.send_all(burst);
  const ResponseHeader first = lane.next(), second = lane.next();
  CHECK(first.slot == 1 && Status(first.status) == Status::deadline && first.frame_bytes == sizeof first);
  CHECK(second.slot == 0 && second.status == 0);
  const EngineCounters& counters = cluster.servers[0]->engines()[0]->counters();
  CHECK(counters.shed.get() == 1 && counters.shed_on_arrival.get() == 1);
}

// A ranker that does not read has its answers waiting: those that become late there must not delay what comes after them.
void late_answers_stay_at_the_sidecar() {
  Cluster cluster(1);
  BareLane lane(cluster, 4 << 20);
  const uint64_t budget = kSecond / 2;  // enough for the engine to pool all of them, sanitized or not
  for (uint32_t slot = 0; slot < 4; ++slot) lane.send_all(frame_for(slot, 8000, budget));
  const SidecarServer& server = *cluster.servers[0];
  const uint64_t sent = now_ns();
  while (now_ns() < sent + 2 * budget || server.engines()[0]->counters().served.get() < 4) std::this_thread::yield();
  // Credit for everything; then everything is there to be read.
  GrantFrame frame;
  frame.grant.limit = 1ull << 40;
  std::vector<std::byte> grant(sizeof frame);
  std::memcpy(grant.data(), &frame, sizeof frame);
  lane.send_all(grant);
  int last = 0, late = 0;
  uint64_t bytes = 0;
  bool whole = true;
  while (last < 4 && !lane.ended) {
    const ResponseHeader header = lane.next();
    bytes += header.frame_bytes - sizeof header;
    if ((header.flags & kLastPiece) == 0) continue;
    ++last;
    whole &= header.status == 0 || header.frame_bytes == sizeof header;
    late += Status(header.status) == Status::deadline;
  }
  // Its credit covers two answers: the other two cannot have begun to leave.
  const uint64_t answer = 8000 * kFeatures * kDim * sizeof(float);
  CHECK(whole);
  CHECK(late >= 2);
  CHECK(server.engines()[0]->counters().shed.get() == 0);
  CHECK(server.lane_stats()[0].late_bytes == int64_t(4 * answer - bytes));
}

// Whatever the order, the budgets and the window: right, or refused for lack of time or room; and nothing is left behind.
void every_lookup_is_answered_once(const std::string& kind, Order order) {
  Cluster cluster(2, 1, kind, order);
  // The least delay congests: the window closes whenever the machine is busy, and takes part.
  LookupClient client(5, make_routes(2), 5, false, {.window_delay_ns = 1, .max_ids = 5'000});
  cluster.attach(client, kind);
  std::atomic<int> right{0}, late{0}, full{0}, wrong{0};
  constexpr int kThreads = 6, kLookups = 300;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      Looker looker(t);
      for (int i = 0; i < kLookups; ++i) {
        const int64_t batch = looker.rng() % 8 == 0 ? 1500 : 1 + looker.rng() % 100;
        const uint64_t budget = looker.rng() % 3 == 0 ? 5 * kSecond : 1000ull << (looker.rng() % 14);
        const Status status = looker.look(client, batch, budget, int32_t(looker.rng() % 3)).status;
        const bool ok = status == Status::ok && looker.right(batch);
        (ok ? right : status == Status::deadline ? late : status == Status::overloaded ? full : wrong).fetch_add(1);
      }
    });
  for (auto& t : threads) t.join();
  CHECK(wrong.load() == 0);
  CHECK(right.load() > 0 && late.load() > 0);
  int64_t counted = 0;
  for (const auto& status : client.totals().statuses) counted += status.load();
  CHECK(counted == kThreads * kLookups);
  CHECK(client.window().used() == 0 && client.window().waiting() == 0);
  Looker looker(99);
  CHECK(looker.look(client, 1500).status == Status::ok && looker.right(1500));
  const uint64_t until = now_ns() + 5 * kSecond;
  for (const auto& server : cluster.servers)
    while (server->in_flight() != 0 && now_ns() < until) std::this_thread::yield();
  for (const auto& server : cluster.servers) CHECK(server->in_flight() == 0);
}

void more_ids_than_admitted_are_refused_unless_alone() {
  Cluster cluster(1);
  cluster.servers[0]->drain();  // nothing is answered with rows; who is admitted gets DRAINING
  LookupClient client(5, make_routes(1), 5, false, {.max_ids = 10 * kFeatures});
  Looker looker(1);
  CHECK(looker.look(client, 20).status == Status::transport);  // alone, and nobody is connected
  client.attach(0, cluster.connect(0, "shm"));
  CHECK(looker.look(client, 20).status == Status::draining);
  CHECK(client.totals().refused.load() == 0);
  // All slots are taken, so that one lookup waits for as long as the other needs to come.
  const auto lane = client.lane(0);
  for (int i = 0; i < 4; ++i) CHECK(lane->try_acquire() >= 0);
  std::thread other([&] { CHECK(Looker(2).look(client, 8, 60 * kSecond).status == Status::draining); });
  while (lane->counters().credit_waits.load() == 0) std::this_thread::yield();
  CHECK(looker.look(client, 3).status == Status::overloaded);
  CHECK(client.totals().refused.load() == 1);
  for (uint32_t slot = 0; slot < 4; ++slot) lane->release(slot);
  other.join();
  CHECK(looker.look(client, 3).status == Status::draining);
}

}  // namespace

int main() {
  std::vector<TestCase> tests;
  for (const auto& [order, name] : {std::pair(Order::edf, "edf"), std::pair(Order::fcfs, "fcfs")}) {
    const std::string prefix = std::string(name) + ": ";
    tests.push_back({prefix + "an engine answers what waits in its order", [order] { an_engine_answers_what_waits_in_its_order(order); }});
    for (const std::string& kind : {std::string("shm"), std::string("tcp"), kApart})
      tests.push_back({prefix + kind + ": every lookup is answered once", [kind, order] { every_lookup_is_answered_once(kind, order); }});
  }
  tests.push_back({"what has no time left is refused on arrival", what_has_no_time_left_is_refused_on_arrival});
  tests.push_back({"late answers stay at the sidecar", late_answers_stay_at_the_sidecar});
  tests.push_back({"more ids than admitted are refused unless alone", more_ids_than_admitted_are_refused_unless_alone});
  return run_tests(tests);
}
