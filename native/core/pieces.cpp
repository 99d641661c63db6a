#include "pieces.hpp"

#include <algorithm>

namespace sidepool {
namespace {

struct Range {
  int64_t first_bag, bags, first_value, values;
};

PoolTask part_of(const PoolTask& whole, const Range& range) {
  PoolTask task = whole;
  task.batch = int32_t(range.bags);
  task.values += range.first_value;
  task.value_count = range.values;
  if (task.lengths != nullptr) task.lengths += range.first_bag;
  if (task.weights != nullptr) task.weights += range.first_value;
  task.out += (task.pooling == Pooling::none ? range.first_value : range.first_bag) * task.out_stride_bytes;
  return task;
}

}  // namespace

void cut(const PoolTask& whole, uint32_t entry, int64_t values, LineVector<PoolTask>& tasks, LineVector<TaskPart>& parts) {
  Range range{0, 0, 0, 0};
  // What is left beyond a cut should be worth a task of its own.
  if (whole.value_count >= 2 * values) {
    for (int64_t bag = 0; bag + 1 < whole.batch; ++bag) {
      const int64_t length =
          whole.lengths != nullptr ? __atomic_load_n(whole.lengths + bag, __ATOMIC_RELAXED) : whole.fixed_length;
      const int64_t left = whole.value_count - range.first_value - range.values;
      if (length < 0 || length > left) break;
      ++range.bags;
      range.values += length;
      if (range.values < values) continue;
      if (left - length < values / 2) break;
      tasks.push_back(part_of(whole, range));
      parts.push_back({entry, range.first_bag, false});
      range = {range.first_bag + range.bags, 0, range.first_value + range.values, 0};
    }
  }
  range.bags = whole.batch - range.first_bag;
  range.values = whole.value_count - range.first_value;
  tasks.push_back(part_of(whole, range));
  parts.push_back({entry, range.first_bag, true});
}

void group(const LineVector<PoolTask>& tasks, int64_t values, LineVector<Piece>& pieces) {
  uint32_t first = 0;
  int64_t sum = 0;
  for (uint32_t i = 0; i < tasks.size(); ++i) {
    sum += tasks[i].value_count;
    if (sum < values && i + 1 < tasks.size()) continue;
    pieces.push_back({first, i + 1, sum, 0});
    first = i + 1;
    sum = 0;
  }
}

}  // namespace sidepool
