// The measured floor for lanes: two processes that hand each other the same bytes with nothing else to do.
//
//   pingpong futex|socket REQUEST_BYTES RESPONSE_BYTES ROUNDS
//
// Each round the parent writes the request, the child reads it and writes the response, the parent reads it; futex: through
// shared memory with a futex each way; socket: through one loopback TCP connection with blocking calls. Prints the median
// and the 99th percentile of a round in nanoseconds.
#include <arpa/inet.h>
#include <linux/futex.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000ull + uint64_t(t.tv_nsec);
}

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

struct Shared {
  alignas(64) std::atomic<uint32_t> turn{0};  // odd: the child's, even: the parent's
};

void wait_turn(std::atomic<uint32_t>& turn, uint32_t wanted) {
  for (uint32_t seen; (seen = turn.load(std::memory_order_acquire)) != wanted;)
    syscall(SYS_futex, &turn, FUTEX_WAIT, seen, nullptr, nullptr, 0);
}

void give_turn(std::atomic<uint32_t>& turn, uint32_t next) {
  turn.store(next, std::memory_order_release);
  syscall(SYS_futex, &turn, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void read_all(int fd, char* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t n = read(fd, data, bytes);
    if (n <= 0) std::exit(n == 0 ? 0 : 1);
    data += n;
    bytes -= size_t(n);
  }
}

void write_all(int fd, const char* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t n = write(fd, data, bytes);
    if (n < 0) fail("write");
    data += n;
    bytes -= size_t(n);
  }
}

void report(std::vector<uint64_t>& rounds) {
  std::sort(rounds.begin(), rounds.end());
  std::printf("%llu %llu\n", static_cast<unsigned long long>(rounds[rounds.size() / 2]),
              static_cast<unsigned long long>(rounds[rounds.size() * 99 / 100]));
}

void futex_rounds(size_t request, size_t response, size_t rounds) {
  char* memory = static_cast<char*>(mmap(nullptr, 4096 + request + response, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) fail("mmap");
  auto* shared = new (memory) Shared();
  char* there = memory + 4096;
  char* back = there + request;
  std::vector<char> from(std::max(request, response), 1), to(std::max(request, response));
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (size_t i = 0; i < rounds; ++i) {
      wait_turn(shared->turn, uint32_t(2 * i + 1));
      std::memcpy(to.data(), there, request);
      std::memcpy(back, from.data(), response);
      give_turn(shared->turn, uint32_t(2 * i + 2));
    }
    _exit(0);
  }
  std::vector<uint64_t> times;
  for (size_t i = 0; i < rounds; ++i) {
    const uint64_t begin = now_ns();
    std::memcpy(there, from.data(), request);
    give_turn(shared->turn, uint32_t(2 * i + 1));
    wait_turn(shared->turn, uint32_t(2 * i + 2));
    std::memcpy(to.data(), back, response);
    times.push_back(now_ns() - begin);
  }
  waitpid(child, nullptr, 0);
  report(times);
}

void socket_rounds(size_t request, size_t response, size_t rounds) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || listen(listener, 1) != 0) fail("listen");
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length);
  std::vector<char> from(std::max(request, response), 1), to(std::max(request, response));
  const int on = 1;
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int fd = accept(listener, nullptr, nullptr);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    for (;;) {
      read_all(fd, to.data(), request);
      write_all(fd, from.data(), response);
    }
  }
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) fail("connect");
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  std::vector<uint64_t> times;
  for (size_t i = 0; i < rounds; ++i) {
    const uint64_t begin = now_ns();
    write_all(fd, from.data(), request);
    read_all(fd, to.data(), response);
    times.push_back(now_ns() - begin);
  }
  close(fd);
  waitpid(child, nullptr, 0);
  report(times);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: pingpong futex|socket REQUEST_BYTES RESPONSE_BYTES ROUNDS\n");
    return 2;
  }
  const size_t request = std::strtoull(argv[2], nullptr, 10), response = std::strtoull(argv[3], nullptr, 10);
  const size_t rounds = std::strtoull(argv[4], nullptr, 10);
  (std::string(argv[1]) == "futex" ? futex_rounds : socket_rounds)(request, response, rounds);
  return 0;
}
