// Waiting for a time, and for whatever else an epoll instance watches.
#pragma once
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "clock.hpp"
#include "memory.hpp"
#include "status.hpp"

namespace sidepool {

class Pacer {
 public:
  static constexpr uint64_t kWoken = UINT64_MAX;  // tag of the timer and of `wake`

  explicit Pacer(uint64_t spin_ns)
      : spin_ns_(spin_ns), epoll_(epoll_create1(EPOLL_CLOEXEC)), timer_(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)),
        wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    epoll_event event{EPOLLIN, {.u64 = kWoken}};
    if (!epoll_ || !timer_ || !wake_ || epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, timer_.get(), &event) != 0 ||
        epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0)
      throw Error(Status::internal, std::string("epoll: ") + std::strerror(errno));
  }
  int epoll() const { return epoll_.get(); }
  // Any thread: this and every later `wait` return at once.
  void wake() const {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake_.get(), &one, sizeof one);
  }
  // Events that are there, or come until `until_ns`; returns their number.
  int wait(uint64_t until_ns, epoll_event* events, int room) const {
    int timeout_ms = 0;
    if (until_ns > now_ns() + spin_ns_) {
      const uint64_t at = until_ns - spin_ns_;
      const itimerspec when{{0, 0}, {time_t(at / 1'000'000'000), long(at % 1'000'000'000)}};
      // Exact, unlike epoll's own timeout, which the kernel rounds up by its timer slack. Setting it forgets an expiry.
      timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
      timeout_ms = -1;
    }
    const int n = epoll_wait(epoll_.get(), events, room, timeout_ms);
    return n < 0 ? 0 : n;
  }

 private:
  const uint64_t spin_ns_;
  Fd epoll_, timer_, wake_;
};

}  // namespace sidepool
