#include "serve.hpp"

#include <algorithm>

#include "clock.hpp"
#include "pieces.hpp"
#include "pooling.hpp"
#include "top_rows.hpp"

namespace sidepool {
namespace {

// Twice the engines that a sidecar may have; bounds what an engine keeps for cutting (about 100 KiB).
constexpr int64_t kMaxPieces = 512;
const size_t kCacheBytes = last_level_cache_bytes();

// Walks the sections of a request feature by feature.
class BagCursor {
 public:
  explicit BagCursor(const ParsedRequest& request)
      : request_(request), lengths_(request.lengths), values_(request.values), weights_(request.weights) {}

  BagInput next(const FeatureEntry& entry) {
    BagInput input;
    input.batch = int32_t(entry.bag_count(request_.header.batch));
    input.values = values_;
    input.value_count = int64_t(entry.value_count);
    values_ += entry.value_count;
    input.fixed_length = entry.fixed_length;
    if (entry.fixed_length < 0) {
      input.lengths = lengths_;
      lengths_ += input.batch;
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
  if (tables.held(entry.feature, entry.shard) == nullptr)
    return {Status::rejected, Reason::unknown_feature, int32_t(entry.feature), -1, int64_t(entry.feature)};
  const bool weighted = (entry.flags & kWeightedEntry) != 0;
  if ((entry.flags & kRowsEntry) && !weighted) return {};
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

// What to pool and where it goes. The vectors keep their memory from lookup to lookup.
struct Plan {
  LineVector<PoolTask> features;  // one per feature of the request
  LineVector<size_t> ends;        // bytes of the response up to the end of each feature
  LineVector<PoolTask> tasks;     // the same, cut for sharing
  LineVector<TaskPart> parts;     // what each of `tasks` is part of
  LineVector<Piece> pieces;
};

// Plans every feature of the request; refuses one that names features or sizes it must not.
Fault plan_features(const TableSet& tables, const ServeInput& input, Plan& plan) {
  const ParsedRequest& request = *input.request;
  plan.features.clear();
  plan.ends.clear();
  // Room for any cut of as many features: whether a lookup is shared, and how it is cut, changes from one to the next.
  const size_t most = request.entries.size() + size_t(kMaxPieces);
  plan.tasks.reserve(most);
  plan.parts.reserve(most);
  plan.pieces.reserve(most);
  BagCursor cursor(request);
  const OutputFormat output = request.header.output_format;
  size_t used = 0;
  for (const FeatureEntry& entry : request.entries) {
    const Fault fault = check_entry(tables, entry);
    if (fault.status != Status::ok) return fault;
    const Feature& feature = tables.feature(int32_t(entry.feature));
    const Table& table = *tables.held(entry.feature, entry.shard);
    const size_t block = block_bytes(entry, feature.pooling, table.dim, request.header.batch, output);
    if (block > input.payload_capacity - used)
      return {Status::rejected, Reason::too_large, int32_t(entry.feature), -1, int64_t(used + block)};
    plan.features.push_back(pool_task(table, block_pooling(entry, feature.pooling), cursor.next(entry), input.payload + used,
                                      table.dim, entry.format(output), feature.padding_index));
    used += block;
    plan.ends.push_back(used);
  }
  stream_results(plan.features.data(), plan.features.size(), used, kCacheBytes);
  return {};
}

// Takes note of tasks that were pooled, in the order of the request: counts, and tells the sink of features complete.
class Settlement {
 public:
  Settlement(const TableSet& tables, const ParsedRequest& request, const Plan& plan, ResponseSink& sink, TableCounters* counters)
      : tables_(tables), request_(request), plan_(plan), sink_(sink), counters_(counters) {}

  Fault settle(const PoolTask& task, const TaskPart& part) {
    const FeatureEntry& entry = request_.entries[part.entry];
    const uint32_t feature = entry.feature;
    if (counters_ != nullptr) {
      TableCounters& c = counters_[tables_.feature(int32_t(feature)).table + entry.shard];
      c.lookups.add(part.first_bag == 0);
      if (c.top && task.program == nullptr) c.top->sample(task.values, task.value_count, task.rows);
      c.rows.add(task.rows_read);
      c.bytes.add(task.rows_read * task.row_bytes);
      c.out_of_range.add(task.out_of_range);
      if (part.last && task.reason == Reason::none) c.bags.add(entry.bag_count(request_.header.batch));
    }
    Fault fault = fault_of(task);
    if (fault.status != Status::ok) {
      fault.feature = int32_t(feature);
      if (fault.bag >= 0) fault.bag += part.first_bag;
      // The sender counts the values of the feature, not those of our part.
      if (fault.reason == Reason::lengths_exceed_values) fault.value = plan_.features[part.entry].value_count;
    } else if (part.last) {
      sink_.progress(part.entry + 1, plan_.ends[part.entry]);
    }
    return fault;
  }

 private:
  const TableSet& tables_;
  const ParsedRequest& request_;
  const Plan& plan_;
  ResponseSink& sink_;
  TableCounters* counters_;
};

Fault pool_alone(LineVector<PoolTask>& tasks, Settlement& settlement) {
  Lookahead ahead(tasks.data(), tasks.size());
  for (uint32_t i = 0; i < tasks.size(); ++i) {
    PoolCounts counts;
    pool(tasks[i], ahead, counts);
    const Fault fault = settlement.settle(tasks[i], {i, 0, true});
    if (fault.status != Status::ok) return fault;
  }
  return {};
}

Fault settle_piece(const Plan& plan, const Piece& piece, Settlement& settlement) {
  for (uint32_t i = piece.first; i < piece.end; ++i) {
    const Fault fault = settlement.settle(plan.tasks[i], plan.parts[i]);
    if (fault.status != Status::ok) return fault;
  }
  return {};
}

// Pieces are claimed first to last, so a piece before the first refused one is always done in the end, and the first fault
// in the order of the request is the one that pooling alone would have met.
Fault pool_shared(Plan& plan, int64_t value_count, Sharing& sharing, Settlement& settlement) {
  const int64_t values = std::max(sharing.piece_values, value_count / kMaxPieces + 1);
  plan.tasks.clear();
  plan.parts.clear();
  plan.pieces.clear();
  for (uint32_t i = 0; i < plan.features.size(); ++i) cut(plan.features[i], i, values, plan.tasks, plan.parts);
  group(plan.tasks, values, plan.pieces);
  Offer& offer = sharing.board->offer(sharing.engine);
  offer.open(plan.tasks.data(), plan.pieces.data(), uint32_t(plan.pieces.size()));
  struct Closing {
    Offer& offer;
    ~Closing() { offer.close(); }
  } closing{offer};
  if (sharing.wake > 0) sharing.board->wake(sharing.engine, std::min(sharing.wake, plan.pieces.size() - 1));
  uint64_t mark = now_ns();
  int waited = 0;
  for (size_t next = 0; next < plan.pieces.size();) {
    if (const Piece* piece = offer.pool_next()) {
      const uint64_t now = now_ns();
      sharing.own_values += piece->values;
      sharing.own_ns += now - mark;
      mark = now;
    } else {
      pause_or_yield(waited);
    }
    while (next < plan.pieces.size() && std::atomic_ref(plan.pieces[next].done).load(std::memory_order_acquire) != 0) {
      const Fault fault = settle_piece(plan, plan.pieces[next++], settlement);
      if (fault.status != Status::ok) return fault;
    }
  }
  return {};
}

Fault pool_all(const TableSet& tables, const ServeInput& input, ResponseSink& sink, TableCounters* counters,
               Sharing* sharing) {
  thread_local Plan plan;
  const Fault fault = plan_features(tables, input, plan);
  if (fault.status != Status::ok) return fault;
  Settlement settlement(tables, *input.request, plan, sink, counters);
  return sharing != nullptr ? pool_shared(plan, int64_t(input.request->header.value_count), *sharing, settlement)
                            : pool_alone(plan.features, settlement);
}

}  // namespace

ResponseHeader serve(const TableSet* tables, const ServeInput& input, ResponseSink& sink, TableCounters* counters,
                     Sharing* sharing) {
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
    describe(header, pool_all(*tables, input, sink, counters, sharing));
  }
  header.finished_ns = now_ns();
  return header;
}

}  // namespace sidepool
