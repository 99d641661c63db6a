#include <utility>

#include "engine.hpp"

namespace sidepool {

void Published::set(std::shared_ptr<const TableSet> tables) {
  std::lock_guard lock(mutex_);
  previous_ = std::exchange(tables_, std::move(tables));
  version_.fetch_add(1, std::memory_order_release);
}

void Published::retire_previous() {
  std::lock_guard lock(mutex_);
  previous_ = nullptr;
  version_.fetch_add(1, std::memory_order_release);
}

std::shared_ptr<const TableSet> Published::get() const {
  std::lock_guard lock(mutex_);
  return tables_;
}

Published::Both Published::both() const {
  std::lock_guard lock(mutex_);
  return {tables_, previous_};
}

}  // namespace sidepool
