// A lane whose frames the owner carries (grpc): requests queue up for `take`, responses come back through `deliver`.
#include <chrono>
#include <condition_variable>
#include <deque>

#include "client_lane.hpp"

namespace sidepool {
namespace {

class QueuedLane final : public ExternalLane {
 public:
  explicit QueuedLane(const LaneLimits& limits)
      : ExternalLane(limits),
        memory_(Mapping::anonymous(limits.slots * (limits.request_bytes + limits.response_bytes))),
        controls_(std::make_unique<SlotControl[]>(limits.slots)) {}

  const char* kind() const override { return "grpc"; }
  std::byte* request(uint32_t slot) override { return memory_.data() + slot * limits_.request_bytes; }
  std::byte* response(uint32_t slot) override {
    return memory_.data() + limits_.slots * limits_.request_bytes + slot * limits_.response_bytes;
  }

  bool take(Request& out, double timeout_s) override {
    std::unique_lock lock(mutex_);
    ready_.wait_for(lock, std::chrono::duration<double>(timeout_s), [this] { return !queue_.empty() || dead(); });
    if (queue_.empty() || dead()) return false;
    const Queued item = queue_.front();
    queue_.pop_front();
    out.ticket = item.lookup_id << 8 | item.slot;
    out.frame.assign(reinterpret_cast<const char*>(request(item.slot)), item.bytes);
    const uint64_t now = now_ns();
    out.budget_ns = item.deadline_ns > now ? item.deadline_ns - now : 0;
    return true;
  }

  void deliver(uint64_t ticket, const std::byte* frames, size_t bytes, Status status) override {
    std::lock_guard lock(mutex_);
    const uint32_t slot = uint32_t(ticket & 0xff);
    if (slot >= limits_.slots || slots_[slot].lookup_id.load() != ticket >> 8) return;
    if (control(slot).word.load() & kSlotDone) return;
    uint32_t done = 0;
    ResponseHeader last;
    if (status == Status::ok) status = unpack(slot, frames, bytes, last, done);
    if (status != Status::ok) {
      last.status = int32_t(status);
      last.lookup_id = ticket >> 8;
    }
    std::memcpy(response(slot), &last, sizeof last);
    counters_.response_bytes.fetch_add(int64_t(bytes), std::memory_order_relaxed);
    mark_done(slot, done);
  }

 protected:
  SlotControl& control(uint32_t slot) override { return controls_[slot]; }

  Status send(uint32_t slot, size_t bytes, uint64_t deadline_ns) override {
    std::lock_guard lock(mutex_);
    queue_.push_back({slot, slots_[slot].lookup_id.load(), bytes, deadline_ns});
    ready_.notify_one();
    return Status::ok;
  }

 private:
  struct Queued {
    uint32_t slot;
    uint64_t lookup_id;
    size_t bytes;
    uint64_t deadline_ns;
  };

  Status unpack(uint32_t slot, const std::byte* frames, size_t bytes, ResponseHeader& last, uint32_t& done) {
    const std::vector<size_t>& offsets = slots_[slot].offsets;
    const uint32_t features = uint32_t(offsets.size() - 1);
    for (size_t at = 0; at < bytes;) {
      if (bytes - at < sizeof last) return Status::frame;
      std::memcpy(&last, frames + at, sizeof last);
      if (check_response_header(last, features) != Status::ok || last.frame_bytes > bytes - at) return Status::frame;
      const size_t payload = last.frame_bytes - sizeof last;
      if (payload != offsets[last.first + last.count] - offsets[last.first]) return Status::frame;
      std::memcpy(response(slot) + sizeof last + offsets[last.first], frames + at + sizeof last, payload);
      at += last.frame_bytes;
      done = last.first + last.count;
      if (last.flags & kLastPiece) return at == bytes ? Status::ok : Status::frame;
    }
    return Status::frame;
  }

  Mapping memory_;
  std::unique_ptr<SlotControl[]> controls_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Queued> queue_;
};

}  // namespace

std::shared_ptr<ExternalLane> make_external_lane(const LaneLimits& limits) { return std::make_shared<QueuedLane>(limits); }

}  // namespace sidepool
