// Loads under the sanitizers: many callers on one client, and gRPC connections to peers that lie, cut or keep silent. What a
// healthy gRPC server answers is the Python tests' part.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "check.hpp"
#include "clock.hpp"
#include "grpc_load.hpp"
#include "lookup_load.hpp"
#include "memory.hpp"

using namespace sidepool;

namespace {

constexpr int64_t kRows = 100;
constexpr int32_t kDim = 8;
constexpr uint64_t kDrainNs = 500'000'000;

struct Run {
  std::vector<int64_t> due, sent, done;
  std::vector<int32_t> request, status;

  Run(size_t count, int64_t gap_ns, int requests) : due(count), sent(count, -1), done(count, -1), request(count), status(count, kWaiting) {
    for (size_t i = 0; i < count; ++i) {
      due[i] = int64_t(i) * gap_ns;
      request[i] = int32_t(i) % requests;
    }
  }
  LoadTotals on(Load& load) {
    return load.run({due.data(), request.data(), due.size()}, Outcomes(sent.data(), done.data(), status.data()), kDrainNs);
  }
  size_t count(int32_t wanted) const { return size_t(std::count(status.begin(), status.end(), wanted)); }
};

std::shared_ptr<LookupClient> make_client() {
  auto tables = std::make_shared<TableSet>(1, 2, 2);
  const std::vector<float> rows(size_t(kRows * kDim), 1.0f);
  Routes routes;
  for (int32_t f = 0; f < 2; ++f) {
    const Pooling pooling = f == 0 ? Pooling::sum : Pooling::none;
    tables->add_copy(f, rows.data(), kRows, kDim, RowFormat::fp32, OutOfRange::error, 0);
    tables->add_feature(f, f, pooling, false);
    RoutedFeature feature;
    feature.rows = kRows;
    feature.dim = kDim;
    feature.pooling = pooling;
    routes.add_whole(feature, 0);
  }
  tables->seal();
  auto client = std::make_shared<LookupClient>(1, routes, 5, false);
  client->attach(0, make_local_lane(tables));
  return client;
}

void many_callers_answer_every_lookup_when_it_is_due() {
  const std::vector<int64_t> ids{1, 2, 3, 4}, wrong{1, 2, 3, kRows};
  LookupTarget target;
  target.client = make_client();
  for (const auto* values : {&ids, &wrong}) {
    Part part;
    part.values = values->data();
    part.value_count = 4;
    part.fixed_batch = part.fixed_width = 2;
    target.requests.push_back(part);
  }
  target.callers = 6;
  target.budget_ns = 10'000'000'000;
  Run run(400, 100'000, 2);
  const LoadTotals totals = run.on(*make_lookup_load(target));
  CHECK(run.count(int32_t(Status::ok)) == 200);
  CHECK(run.count(int32_t(Status::rejected)) == 200);
  CHECK(totals.most_outstanding >= 1 && totals.most_outstanding <= 6);
  for (size_t i = 0; i < run.due.size(); ++i) CHECK(run.due[i] <= run.sent[i] && run.sent[i] <= run.done[i]);
}

void a_stopped_load_ends_and_says_what_was_not_sent() {
  LookupTarget target;
  target.client = make_client();
  const std::vector<int64_t> ids{1, 2};
  Part part;
  part.values = ids.data();
  part.value_count = part.fixed_width = 2;
  part.fixed_batch = 1;
  target.requests = {part};
  target.callers = 3;
  target.budget_ns = 1'000'000'000;
  const auto load = make_lookup_load(target);
  Run run(1000, 1'000'000'000, 1);
  std::thread stopper([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    load->stop();
  });
  run.on(*load);
  stopper.join();
  CHECK(run.count(kNotSent) >= 999 && run.count(kWaiting) == 0);
}

// A server that greets as HTTP/2 servers do, and then sends `bytes` to each connection, once it has heard something; keeps
// silent, where they are empty, and ends the connection afterwards if `cut`.
struct Liar {
  Fd listener{socket(AF_INET, SOCK_STREAM, 0)};
  int port = 0;
  std::atomic<bool> stopped{false};
  std::thread thread;

  Liar(const std::string& bytes, bool cut) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    CHECK(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length) == 0 && listen(listener.get(), 64) == 0);
    CHECK(getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length) == 0);
    port = ntohs(address.sin_port);
    thread = std::thread([this, bytes, cut] { serve(bytes, cut); });
  }
  ~Liar() {
    stopped = true;
    shutdown(listener.get(), SHUT_RDWR);
    thread.join();
  }

  void serve(const std::string& bytes, bool cut) {
    std::vector<Fd> held;
    while (!stopped) {
      Fd peer(accept(listener.get(), nullptr, nullptr));
      if (!peer) return;
      const char settings[9] = {0, 0, 0, 4, 0, 0, 0, 0, 0};
      char heard[4096];
      send(peer.get(), settings, sizeof settings, MSG_NOSIGNAL);
      if (recv(peer.get(), heard, sizeof heard, 0) <= 0) continue;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      if (!bytes.empty()) send(peer.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (!cut) held.push_back(std::move(peer));
    }
  }
};

void lying_servers_are_counted_and_the_run_ends() {
  std::mt19937_64 random(3);
  for (int kind = 0; kind < 12; ++kind) {
    std::string bytes;
    if (kind >= 2) {
      // Frames with random contents: of a known type mostly, so that the parser goes on.
      for (int frame = 0; frame < 8; ++frame) {
        const uint64_t r = random();
        const size_t size = r % 64;
        bytes += {'\0', '\0', char(size), char((r >> 8) % 10), char(r >> 16), 0, 0, 0, char((r >> 24) % 8)};
        for (size_t i = 0; i < size; ++i) bytes.push_back(char(random()));
      }
    }
    Liar liar(bytes, kind % 2 == 0);
    const auto load = make_grpc_load({"127.0.0.1", liar.port, "/a.B/C", 1, 1 << 20, 0, {"WORD"}}, {{"hello"}, {std::string(50'000, 'x'), 20, 1000}});
    Run run(60, 3'000'000, 2);
    const uint64_t begin = now_ns();
    run.on(*load);
    CHECK(now_ns() - begin < 5'000'000'000);
    CHECK(run.count(kWaiting) == 0 && run.count(0) == 0);
  }
}

}  // namespace

int main() {
  std::vector<TestCase> tests{
      {"many callers answer every lookup when it is due", many_callers_answer_every_lookup_when_it_is_due},
      {"a stopped load ends and says what was not sent", a_stopped_load_ends_and_says_what_was_not_sent},
  };
  if (grpc_load_unavailable().empty()) tests.push_back({"lying servers are counted and the run ends", lying_servers_are_counted_and_the_run_ends});
  return run_tests(tests);
}
