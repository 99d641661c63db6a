// Pooling: bags of row ids in, pooled vectors out. No Python, no allocation, lock or system call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "status.hpp"
#include "tables.hpp"

namespace sidepool {

// One feature of one subrequest. `values` and `lengths` may lie in memory a peer can still write: every word is
// read once, checked, then used.
struct BagInput {
  const int64_t* values = nullptr;
  int64_t value_count = 0;
  const int32_t* lengths = nullptr;  // null: every bag has fixed_length ids
  int32_t fixed_length = 1;
  int32_t batch = 0;
  const float* weights = nullptr;  // null: unweighted
};

struct PoolCounts {
  int64_t rows_read = 0;
  int64_t out_of_range = 0;
};

// One feature of one request: what to pool and, once it was pooled, how that ended. Plain data, see kernels.hpp.
struct PoolTask {
  const std::byte* base;  // null: the table was never added
  int64_t rows;
  int64_t row_bytes;
  int64_t dim;
  int64_t default_row;
  int64_t padding_index;  // kNoPadding: none
  const int64_t* values;
  int64_t value_count;
  const int32_t* lengths;
  const float* weights;
  std::byte* out;
  int64_t out_stride_bytes;
  int32_t fixed_length;
  int32_t batch;
  int32_t rows_ahead;  // how far ahead of its use a row's fetch starts
  int32_t row_lines;   // cache lines to fetch per row
  RowFormat format;
  OutOfRange policy;
  Pooling pooling;
  OutputFormat output;
  const Program* program;  // runs the bags in place of pooling them; `base` is null then
  bool streamed;  // results go past the caches: set by stream_results

  Reason reason;  // none: the whole feature was pooled
  int64_t bag;
  int64_t value;
  int64_t rows_read;
  int64_t out_of_range;
};

// `out` gets values of `output`, at any alignment; rows begin `out_stride` values apart.
PoolTask pool_task(const Table& table, Pooling pooling, const BagInput& input, void* out, int64_t out_stride,
                   OutputFormat output = OutputFormat::fp32, int64_t padding_index = kNoPadding);

// The last-level cache of this machine, bytes; 32 MiB where the kernel does not tell.
size_t last_level_cache_bytes();

// Lets the results of all tasks, `bytes` together, be written past the caches where they are fp32, do not fit
// `cache_bytes`, and their rows fill whole cache lines. Whoever reads so much finds nothing of it in a cache either way,
// and the lines need not be fetched to be written. Call before the first is pooled.
void stream_results(PoolTask* tasks, size_t count, size_t bytes, size_t cache_bytes);

// Starts fetching rows ahead of their use, over all features of a request: it stands some rows in front of the
// pooling, often in a later feature. Pass the same one to pool() for task after task, first to last.
struct Lookahead {
  Lookahead(const PoolTask* first, size_t count) : task(first), end(first + count) {}

  const PoolTask* task;
  const PoolTask* end;
  int64_t next = 0;       // the id of `task` whose row is fetched next
  int64_t in_flight = 0;  // rows fetched and not yet pooled
};

// Pool one feature: `task.out` gets `[batch, dim]` rows `out_stride_bytes` apart (for `none`: `[value_count, dim]`).
// Rows are added in fp32, in the order of their ids, and rounded to `output` when they are stored. Empty bags give zeros
// (torch's embedding_bag); a `sum` bag of one id is an exact copy of its row. Weights multiply the rows of sum and mean,
// and mean divides by the number of ids: Σ w·row ÷ count (not ÷ Σ w). max and none ignore them. Under policy `error` the
// first bad id stops with Status::rejected, id_out_of_range, bag, id. Under `zero` a bad id is as if it were absent: it
// adds nothing to sum, does not count for mean, cannot win max; `none` gives a row of zeros. So is an id that equals
// `padding_index`, whatever the policy, but `none` gives its row; neither is counted in rows_read. Lengths that are
// negative or do not add up stop with Status::rejected as well; nothing outside `out` is ever written, and what a stopped
// call left in `out` is unspecified. A table that was never added gives Status::internal. `Fault::feature` is left to the
// caller. No allocation, lock or system call.
Fault pool(PoolTask& task, Lookahead& ahead, PoolCounts& counts);
// What the call of pool() for this task returned.
Fault fault_of(const PoolTask& task);

// One feature alone.
Fault pool_feature(const Table& table, Pooling pooling, const BagInput& input, void* out, int64_t out_stride,
                   PoolCounts& counts, OutputFormat output = OutputFormat::fp32, int64_t padding_index = kNoPadding);

// The row an out-of-range id stands for under policy `hash`: the same function on every machine, for ever.
int64_t hashed_row(int64_t id, int64_t rows);

// SIMD levels: "avx512", "avx2", "neon", "scalar".
std::string simd_level();
std::vector<std::string> simd_levels();
void force_simd_level(const std::string& level);  // Error(plan) where it cannot run

}  // namespace sidepool
