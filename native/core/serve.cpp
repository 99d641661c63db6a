#include "serve.hpp"

#include "clock.hpp"
#include "pooling.hpp"

namespace sidepool {
namespace {

// Walks the sections of a request feature by feature.
class BagCursor {
 public:
  explicit BagCursor(const ParsedRequest& request)
      : request_(request), lengths_(request.lengths), values_(request.values), weights_(request.weights) {}

  BagInput next(const FeatureEntry& entry) {
    BagInput input;
    input.batch = int32_t(request_.header.batch);
    input.values = values_;
    input.value_count = int64_t(entry.value_count);
    values_ += entry.value_count;
    input.fixed_length = entry.fixed_length;
    if (entry.fixed_length < 0) {
      input.lengths = lengths_;
      lengths_ += request_.header.batch;
    }
    if (entry.flags & kWeightedEntry) {
      input.weights = weights_;
      weights_ += entry.value_count;
    }
    return input;
  }

 private:
  const ParsedRequest& request_;
  const int32_t* lengths_;
  const int64_t* values_;
  const float* weights_;
};

Fault check_entry(const TableSet& tables, const FeatureEntry& entry) {
  if (entry.feature >= uint32_t(tables.feature_count()) || tables.feature(int32_t(entry.feature)).table < 0)
    return {Status::rejected, Reason::unknown_feature, int32_t(entry.feature), -1, int64_t(entry.feature)};
  const bool weighted = (entry.flags & kWeightedEntry) != 0;
  if (weighted != tables.feature(int32_t(entry.feature)).weighted)
    return {Status::rejected, weighted ? Reason::weights_unexpected : Reason::weights_missing, int32_t(entry.feature), -1, 0};
  return {};
}

void describe(ResponseHeader& header, const Fault& fault) {
  header.status = int32_t(fault.status);
  header.reason = int32_t(fault.reason);
  header.fault_feature = fault.feature;
  header.fault_bag = fault.bag;
  header.fault_value = fault.value;
}

struct Work {
  int32_t table;
  size_t block;  // bytes of the response
};

// What to pool, for every feature of the request; refuses a request that names features or sizes it must not.
// Both vectors keep their memory from lookup to lookup.
Fault plan_work(const TableSet& tables, const ServeInput& input, std::vector<PoolTask>& tasks, std::vector<Work>& work) {
  const ParsedRequest& request = *input.request;
  tasks.clear();
  work.clear();
  BagCursor cursor(request);
  size_t used = 0;
  for (const FeatureEntry& entry : request.entries) {
    const Fault fault = check_entry(tables, entry);
    if (fault.status != Status::ok) return fault;
    const Feature& feature = tables.feature(int32_t(entry.feature));
    const Table& table = tables.table(feature.table);
    const size_t block = block_bytes(feature, table.dim, request.header.batch, entry.value_count);
    if (block > input.payload_capacity - used)
      return {Status::rejected, Reason::too_large, int32_t(entry.feature), -1, int64_t(used + block)};
    tasks.push_back(pool_task(table, feature.pooling, cursor.next(entry), reinterpret_cast<float*>(input.payload + used), table.dim,
                              feature.padding_index));
    work.push_back({feature.table, block});
    used += block;
  }
  return {};
}

Fault pool_all(const TableSet& tables, const ServeInput& input, ResponseSink& sink, TableCounters* counters) {
  thread_local std::vector<PoolTask> tasks;
  thread_local std::vector<Work> work;
  Fault fault = plan_work(tables, input, tasks, work);
  if (fault.status != Status::ok) return fault;
  Lookahead ahead(tasks.data(), tasks.size());
  size_t used = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    PoolCounts counts;
    fault = pool(tasks[i], ahead, counts);
    if (counters != nullptr) {
      TableCounters& c = counters[work[i].table];
      c.lookups.add();
      c.rows.add(counts.rows_read);
      c.bytes.add(counts.rows_read * tasks[i].row_bytes);
      c.out_of_range.add(counts.out_of_range);
    }
    if (fault.status != Status::ok) {
      fault.feature = int32_t(input.request->entries[i].feature);
      return fault;
    }
    used += work[i].block;
    sink.progress(uint32_t(i + 1), used);
  }
  return {};
}

}  // namespace

ResponseHeader serve(const TableSet* tables, const ServeInput& input, ResponseSink& sink, TableCounters* counters) {
  const RequestHeader& request = input.request->header;
  ResponseHeader header;
  header.slot = request.slot;
  header.lookup_id = request.lookup_id;
  header.epoch = request.epoch;
  header.batch = request.batch;
  header.received_ns = input.received_ns;
  header.started_ns = now_ns();
  if (tables == nullptr || uint64_t(tables->epoch()) != request.epoch) {
    Fault fault{Status::plan, Reason::none, -1, -1, tables == nullptr ? 0 : tables->epoch()};
    describe(header, fault);
  } else {
    describe(header, pool_all(*tables, input, sink, counters));
  }
  header.finished_ns = now_ns();
  return header;
}

}  // namespace sidepool
