// Moving a lane from one engine to another while its requests flow.
//
// The old engine begins the move and goes on serving. When the lane has agreed with its peer (rdma: on twin queue pairs) and
// nothing waits to leave on the old path, it is handed over with what is queued; the new engine answers that and all that follows.
#include <sys/epoll.h>

#include <algorithm>

#include "engine.hpp"

namespace sidepool {

void Engine::move(uint64_t lane, Engine& target) {
  Mail mail;
  {
    std::lock_guard roster(roster_mutex_);
    const auto found = std::find_if(lanes_.begin(), lanes_.end(), [lane](const auto& owned) { return owned->lane->id() == lane; });
    if (found == lanes_.end()) throw Error(Status::rejected, "lane: " + std::to_string(lane) + " has just gone");
    mail.twin = (*found)->lane->make_twin(target.rdma());
  }
  mail.move_lane = lane;
  mail.target = &target;
  target.reserve();
  post(std::move(mail));
}

void Engine::begin_move(Mail& mail) {
  const auto found = std::find_if(lanes_.begin(), lanes_.end(), [&](const auto& owned) { return owned->lane->id() == mail.move_lane; });
  if (found == lanes_.end() || (*found)->dead || (*found)->target != nullptr) {
    mail.target->release();  // gone meanwhile, or moving already
    return;
  }
  (*found)->target = mail.target;
  ++moving_;
  (*found)->lane->begin_move(std::move(mail.twin));
}

void Engine::hand_over() {
  for (size_t i = 0; i < lanes_.size();) {
    Owned& owned = *lanes_[i];
    if (owned.target == nullptr || owned.dead || !owned.lane->ready_to_move()) {
      ++i;
      continue;
    }
    Mail mail;
    mail.move_lane = owned.lane->id();
    mail.works = queue_.take(&owned);
    Engine& target = *owned.target;
    target.arriving_.fetch_add(int64_t(mail.works.size()), std::memory_order_relaxed);
    counters_.queued.set(int64_t(queue_.size()));
    dismiss(owned);
    owned.lane->leave();
    owned.target = nullptr;
    owned.just_moved = owned.last_response_ns != 0;
    --moving_;
    {
      std::lock_guard roster(roster_mutex_);
      mail.lane = std::move(lanes_[i]);
      lanes_[i] = std::move(lanes_.back());
      lanes_.pop_back();
      counters_.lanes.set(int64_t(lanes_.size()));
    }
    release();
    target.post(std::move(mail));
  }
}

void Engine::dismiss(Owned& owned) {
  if (owned.lane->fd() >= 0) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, owned.lane->fd(), nullptr);
  if (owned.lane->grants_fd() >= 0) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, owned.lane->grants_fd(), nullptr);
  stream_lanes_ -= !owned.lane->polled();
  if (owned.writing) counters_.writing.add(-1);
  owned.writing = owned.watched = false;
}

}  // namespace sidepool
