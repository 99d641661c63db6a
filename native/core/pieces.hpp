// A request cut into pieces of about equal work, so that several engines can pool it.
#pragma once
#include <cstdint>
#include <vector>

#include "board.hpp"
#include "lines.hpp"
#include "pooling.hpp"

namespace sidepool {

// A task and the feature that it is part of.
struct TaskPart {
  uint32_t entry = 0;     // position of the feature within the request
  int64_t first_bag = 0;  // of the feature
  bool last = true;       // of the feature
};

// Appends the feature `whole` to `tasks` and `parts`, cut between bags into tasks of about `values` ids where it has many
// more. A bag is never split, so every sum keeps its order. Lengths are read once each and only to find the cuts: every task
// has its own range of values, which pooling checks its lengths against again. Where lengths are wrong the rest of the
// feature stays in one task, whose pooling refuses them as it would refuse the whole.
void cut(const PoolTask& whole, uint32_t entry, int64_t values, LineVector<PoolTask>& tasks, LineVector<TaskPart>& parts);

// Appends pieces of about `values` ids: consecutive tasks, small ones together.
void group(const LineVector<PoolTask>& tasks, int64_t values, LineVector<Piece>& pieces);

}  // namespace sidepool
