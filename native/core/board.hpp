// Where an engine offers pieces of a large subrequest to engines that have nothing to do.
//
// Every engine has a seat; an offer lies on the owner's seat while it is open. A piece is claimed by one atomic addition,
// by the owner as by helpers, first to last. The owner works like everyone else: it waits only for pieces that a helper has
// begun, never for one that nobody took. What an offer points to belongs to the owner; helpers touch it only between
// `enter` and `leave`, and `close` returns when the last one has left. No lock, no allocation.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "pooling.hpp"

namespace sidepool {

// Tasks `[first, end)` of an offer, pooled one after the other by one thread.
struct Piece {
  uint32_t first = 0;
  uint32_t end = 0;
  int64_t values = 0;
  uint32_t done = 0;  // set with release once all tasks are pooled, or one of them was refused
};

// Pools the tasks of a piece up to the first that is refused, then says so in `done`.
void pool_piece(PoolTask* tasks, Piece& piece);

class Offer {
 public:
  // Owner: let others in. The memory must stay as it is until `close` has returned.
  void open(PoolTask* tasks, Piece* pieces, uint32_t count);
  // Owner: nobody claims a further piece; returns once every helper has left.
  void close();

  // Helper: true when the offer is open, and it stays valid until `leave`.
  bool enter();
  void leave() { inside_.fetch_sub(1, std::memory_order_release); }
  // Owner, or helper inside: pool the next piece that nobody has, and return it; null when there is none.
  const Piece* pool_next();

  // The CPU that the owner ran on when it opened the offer.
  int cpu() const { return cpu_; }
  // Whether a helper would find something to do; a glance without effect.
  bool has_pieces() const;

 private:
  // Each on its own line: every claim writes `next_`, and helpers come and go without disturbing it.
  alignas(64) std::atomic<uint32_t> next_{0};
  alignas(64) std::atomic<uint32_t> inside_{0};
  alignas(64) std::atomic<uint32_t> count_{0};  // 0: closed
  PoolTask* tasks_ = nullptr;
  Piece* pieces_ = nullptr;
  int cpu_ = -1;
};

// The seats of all engines of a sidecar; outlives them.
class Board {
 public:
  explicit Board(size_t engines) : seats_(std::make_unique<Seat[]>(engines)), count_(engines) {}

  // Before any offer is made: where the engine says that it sleeps, and the eventfd that wakes it.
  void sit(size_t engine, const std::atomic<uint32_t>* sleeping, int doorbell);

  Offer& offer(size_t engine) { return seats_[engine].offer; }
  bool shared() const { return count_ > 1; }

  // An open offer of another engine, entered; null where there is none. The caller leaves it.
  Offer* enter(size_t engine);
  bool has_pieces(size_t engine) const;
  // Whether another engine is not asleep, busy or not.
  bool anyone_awake(size_t engine) const;
  // Ring for up to `most` sleeping engines.
  void wake(size_t engine, size_t most);

 private:
  struct Seat {
    Offer offer;
    const std::atomic<uint32_t>* sleeping = nullptr;
    int doorbell = -1;
  };

  std::unique_ptr<Seat[]> seats_;
  size_t count_;
};

}  // namespace sidepool
