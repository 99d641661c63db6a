#include "parent.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <thread>

#include "memory.hpp"

namespace sidepool {

void end_with_parent(uint64_t grace_ns) {
  const pid_t parent = getppid();
  Fd watched(int(syscall(SYS_pidfd_open, parent, 0)));
  if (!watched) throw Error(Status::internal, std::string("cannot watch the parent process: ") + std::strerror(errno));
  std::thread([parent, grace_ns, fd = std::move(watched)] {
    // A parent that ended before it could be watched has left us to another one.
    pollfd end{fd.get(), POLLIN, 0};
    while (getppid() == parent && poll(&end, 1, -1) < 0 && errno == EINTR) continue;
    std::this_thread::sleep_for(std::chrono::nanoseconds(grace_ns));
    _exit(1);
  }).detach();
}

}  // namespace sidepool
