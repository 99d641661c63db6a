#include "serve.hpp"

#include "clock.hpp"

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

Fault pool_all(const TableSet& tables, const ServeInput& input, ResponseSink& sink, TableCounters* counters) {
  const ParsedRequest& request = *input.request;
  const size_t features = request.entries.size();
  BagCursor cursor(request);
  BagInput upcoming = features > 0 ? cursor.next(request.entries[0]) : BagInput{};
  size_t used = 0;
  for (size_t i = 0; i < features; ++i) {
    const FeatureEntry& entry = request.entries[i];
    Fault fault = check_entry(tables, entry);
    if (fault.status != Status::ok) return fault;
    const Feature& feature = tables.feature(int32_t(entry.feature));
    const Table& table = tables.table(feature.table);
    const size_t block = block_bytes(feature, table.dim, request.header.batch, entry.value_count);
    if (block > input.payload_capacity - used)
      return {Status::rejected, Reason::too_large, int32_t(entry.feature), -1, int64_t(used + block)};
    const BagInput bags = upcoming;
    if (i + 1 < features) {
      upcoming = cursor.next(request.entries[i + 1]);
      if (check_entry(tables, request.entries[i + 1]).status == Status::ok)
        prefetch_feature(tables.table(tables.feature(int32_t(request.entries[i + 1].feature)).table), upcoming);
    }
    PoolCounts counts;
    fault = pool_feature(table, feature.pooling, bags, reinterpret_cast<float*>(input.payload + used), table.dim, counts);
    if (counters != nullptr) {
      TableCounters& c = counters[feature.table];
      c.lookups.add();
      c.rows.add(counts.rows_read);
      c.bytes.add(counts.rows_read * int64_t(row_bytes(table.format, table.dim)));
      c.out_of_range.add(counts.out_of_range);
    }
    if (fault.status != Status::ok) {
      fault.feature = int32_t(entry.feature);
      return fault;
    }
    used += block;
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
