// Byte credits: what the receiving end lets the sending end have under way. Used by the rdma and tcp lanes.
#pragma once
#include <algorithm>

#include "frames.hpp"

namespace sidepool {

// Byte credits of one direction, both counters since the lane began. Whoever owns that direction calls them.
class SendCredit {
 public:
  explicit SendCredit(uint64_t limit) : limit_(limit) {}
  void grant(uint64_t limit) { limit_ = std::max(limit_, limit); }  // a late grant says nothing new
  bool covers(uint64_t bytes) const { return sent_ + bytes <= limit_; }
  void spend(uint64_t bytes) { sent_ += bytes; }
  uint64_t limit() const { return limit_; }

 private:
  uint64_t limit_, sent_ = 0;
};

class ReceiveCredit {
 public:
  explicit ReceiveCredit(uint64_t window) : window_(window), granted_(window) {}
  // False: the peer has sent more than it was granted.
  bool arrived(uint64_t bytes) { return (arrived_ += bytes) <= granted_; }
  void consumed(uint64_t bytes) { consumed_ += bytes; }
  // Worth telling: a quarter of the window, so that a stream needs few grants and never waits for one.
  bool due() const { return consumed_ + window_ - granted_ >= window_ / 4; }
  uint64_t grant() { return granted_ = consumed_ + window_; }
  uint64_t window() const { return window_; }

 private:
  const uint64_t window_;
  uint64_t granted_, arrived_ = 0, consumed_ = 0;
};

// The window of an end whose slots are this large: what is asked for, at least two slots, since up to a quarter of a window may
// be consumed and not granted again yet; 0: four slots, what one large lookup keeps under way (client.cpp).
inline uint64_t window_for(uint64_t wanted_bytes, uint64_t slot_bytes) {
  return wanted_bytes == 0 ? 4 * slot_bytes : std::clamp(wanted_bytes, 2 * slot_bytes, kMaxSlots * slot_bytes);
}

}  // namespace sidepool
