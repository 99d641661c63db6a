#include "board.hpp"

#include <sched.h>
#include <sys/eventfd.h>

#include "clock.hpp"

namespace sidepool {

void pool_piece(PoolTask* tasks, Piece& piece) {
  Lookahead ahead(tasks + piece.first, piece.end - piece.first);
  for (uint32_t i = piece.first; i < piece.end; ++i) {
    PoolCounts counts;
    if (pool(tasks[i], ahead, counts).status != Status::ok) break;
  }
  std::atomic_ref(piece.done).store(1, std::memory_order_release);
}

// A helper first counts itself in, then reads `count_`; the owner first clears `count_`, then reads how many are in. All
// four accesses are in one total order: either the helper finds the offer closed or the owner waits for it.
bool Offer::enter() {
  if (!has_pieces()) return false;
  inside_.fetch_add(1, std::memory_order_seq_cst);
  if (count_.load(std::memory_order_seq_cst) != 0) return true;
  leave();
  return false;
}

void Offer::open(PoolTask* tasks, Piece* pieces, uint32_t count) {
  tasks_ = tasks;
  pieces_ = pieces;
  cpu_ = sched_getcpu();
  next_.store(0, std::memory_order_relaxed);
  count_.store(count, std::memory_order_seq_cst);
}

void Offer::close() {
  count_.store(0, std::memory_order_seq_cst);
  for (int waited = 0; inside_.load(std::memory_order_seq_cst) != 0;) pause_or_yield(waited);
}

const Piece* Offer::pool_next() {
  const uint32_t count = count_.load(std::memory_order_acquire);
  // The check before the addition keeps `next_` from running round.
  if (next_.load(std::memory_order_relaxed) >= count) return nullptr;
  const uint32_t piece = next_.fetch_add(1, std::memory_order_relaxed);
  if (piece >= count) return nullptr;
  pool_piece(tasks_, pieces_[piece]);
  return &pieces_[piece];
}

bool Offer::has_pieces() const {
  return next_.load(std::memory_order_relaxed) < count_.load(std::memory_order_seq_cst);
}

void Board::sit(size_t engine, const std::atomic<uint32_t>* sleeping, int doorbell) {
  seats_[engine].sleeping = sleeping;
  seats_[engine].doorbell = doorbell;
}

Offer* Board::enter(size_t engine) {
  // Everyone begins behind itself, so that helpers spread over the offers.
  for (size_t i = 1; i < count_; ++i) {
    Offer& offer = seats_[(engine + i) % count_].offer;
    if (offer.enter()) return &offer;
  }
  return nullptr;
}

bool Board::has_pieces(size_t engine) const {
  for (size_t i = 1; i < count_; ++i) {
    if (seats_[(engine + i) % count_].offer.has_pieces()) return true;
  }
  return false;
}

bool Board::anyone_awake(size_t engine) const {
  for (size_t i = 1; i < count_; ++i) {
    if (seats_[(engine + i) % count_].sleeping->load(std::memory_order_relaxed) == 0) return true;
  }
  return false;
}

void Board::wake(size_t engine, size_t most) {
  for (size_t i = 1; i < count_ && most > 0; ++i) {
    const Seat& seat = seats_[(engine + i) % count_];
    if (seat.sleeping->load(std::memory_order_seq_cst) == 0) continue;
    eventfd_write(seat.doorbell, 1);
    --most;
  }
}

}  // namespace sidepool
