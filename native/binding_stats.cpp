#include "binding_stats.hpp"

#include <nanobind/stl/string.h>

#include "binding_rdma.hpp"

namespace sidepool {
namespace {

const char* status_name(size_t status) {
  static const char* const names[] = {"OK", "REJECTED", "OVERLOADED", "DEADLINE", "TRANSPORT", "FRAME", "PLAN", "SHARD", "DRAINING", "INTERNAL"};
  return names[status];
}

nb::dict histogram(const std::vector<const Histogram*>& parts) {
  nb::list bounds, counts;
  int64_t sum = 0;
  for (size_t b = 0; b < Histogram::kBuckets; ++b) {
    int64_t n = 0;
    for (const Histogram* h : parts) n += h->count(b);
    if (b + 1 < Histogram::kBuckets) bounds.append(int64_t(1) << b);
    counts.append(n);
  }
  for (const Histogram* h : parts) sum += h->sum_us();
  nb::dict d;
  d["bounds"] = bounds;
  d["counts"] = counts;
  d["sum"] = sum;
  return d;
}

}  // namespace

nb::dict server_stats(SidecarServer& server) {
  nb::dict d;
  const auto tables = server.published().get();
  d["epoch"] = tables ? tables->epoch() : 0;
  nb::list engines, lanes, table_list;
  int64_t statuses[kStatusCount] = {};
  std::vector<const Histogram*> queue, pool, blackout;
  for (const auto& engine : server.engines()) {
    const EngineCounters& c = engine->counters();
    nb::dict e;
    e["lanes"] = c.lanes.get();
    e["queued"] = c.queued.get();
    e["in_flight"] = engine->in_flight();
    e["served"] = c.served.get();
    e["shed"] = c.shed.get();
    e["shed_on_arrival"] = c.shed_on_arrival.get();
    e["helped"] = c.helped.get();
    e["busy_ns"] = c.busy_ns.get();
    e["moved"] = c.moved.get();
    if (const RdmaDomain* rdma = engine->rdma()) e["rdma"] = rdma_counters(rdma->counters(), rdma->thread_domain());
    engines.append(e);
    for (size_t s = 0; s < kStatusCount; ++s) statuses[s] += c.statuses[s].get();
    queue.push_back(&c.queue);
    pool.push_back(&c.pool);
    blackout.push_back(&c.blackout);
  }
  SidecarServer::Direct& direct = server.direct();
  std::vector<LaneStats> lane_stats = server.lane_stats();
  {
    std::lock_guard lock(direct.mutex);
    for (size_t s = 0; s < kStatusCount; ++s) statuses[s] += direct.counters.statuses[s].get();
    if (direct.lane.received.get() > 0)
      lane_stats.push_back({0, "grpc", -1, direct.lane.received.get(), direct.lane.sent.get(), direct.lane.request_bytes.get(),
                            direct.lane.response_bytes.get(), 0, direct.counters.pool.sum_us() * 1000, 0, 0, 0, 0, 0, 0, 0});
  }
  pool.push_back(&direct.counters.pool);
  for (const LaneStats& l : lane_stats) {
    nb::dict e;
    e["id"] = l.id;
    e["kind"] = l.kind;
    e["engine"] = l.engine;
    e["received"] = l.received;
    e["sent"] = l.sent;
    e["request_bytes"] = l.request_bytes;
    e["response_bytes"] = l.response_bytes;
    e["credit_waits"] = l.credit_waits;
    e["busy_ns"] = l.busy_ns;
    e["queued"] = l.queued;
    e["queued_bytes"] = l.queued_bytes;
    e["in_flight"] = l.in_flight;
    e["leaving_bytes"] = l.leaving_bytes;
    e["grants"] = l.grants;
    e["grant_us"] = l.grant_us;
    e["late_bytes"] = l.late_bytes;
    lanes.append(e);
  }
  const auto sums = server.table_stats();
  for (size_t i = 0; i < sums.size(); ++i) {
    nb::dict e;
    e["table"] = i;
    e["lookups"] = sums[i][0];
    e["rows"] = sums[i][1];
    e["bytes"] = sums[i][2];
    e["out_of_range"] = sums[i][3];
    e["bags"] = sums[i][4];
    nb::list top;
    for (const auto& [row, count] : server.top_rows(i)) top.append(nb::make_tuple(row, count));
    e["top_rows"] = top;
    e["rows_ahead"] = tables && int32_t(i) < tables->table_count() ? tables->table(int32_t(i)).rows_ahead.load() : 0;
    table_list.append(e);
  }
  nb::dict status_dict;
  for (size_t s = 0; s < kStatusCount; ++s) status_dict[status_name(s)] = statuses[s];
  d["engines"] = engines;
  d["lanes"] = lanes;
  d["tables"] = table_list;
  d["statuses"] = status_dict;
  d["queue_us"] = histogram(queue);
  d["pool_us"] = histogram(pool);
  d["blackout_us"] = histogram(blackout);
  return d;
}

nb::dict client_stats(LookupClient& client) {
  nb::dict d;
  const auto& t = client.totals();
  d["lookups"] = t.lookups.load();
  d["samples"] = t.samples.load();
  d["refused_parts"] = t.refused_parts.load();
  d["out_of_range"] = t.out_of_range.load();
  d["failovers"] = t.failovers.load();
  d["hedges"] = t.hedges.load();
  d["degraded"] = t.degraded.load();
  d["refused"] = t.refused.load();
  d["shed"] = t.shed.load();
  const ReceiveWindow& window = client.window();
  nb::dict w;
  if (window.bytes() == ReceiveWindow::kOpen)
    w["bytes"] = nb::none();
  else
    w["bytes"] = window.bytes();
  w["used_bytes"] = window.used();
  w["waiting"] = window.waiting();
  w["waits"] = window.totals().waits.load();
  w["shrunk"] = window.totals().shrunk.load();
  w["marks"] = window.totals().marks.load();
  d["window"] = w;
  nb::dict statuses;
  for (size_t s = 0; s < kStatusCount; ++s) statuses[status_name(s)] = t.statuses[s].load();
  d["statuses"] = statuses;
  nb::list lanes;
  for (size_t s = 0; s < client.sidecar_count(); ++s) {
    const auto lane = client.lane(int32_t(s));
    nb::dict l;
    l["sidecar"] = s;
    l["alive"] = lane && !lane->dead();
    l["kind"] = lane ? lane->kind() : "";
    l["lost"] = lane && lane->dead() ? lane->why_lost() : "";
    l["in_flight_bytes"] = client.in_flight_bytes(int32_t(s));
    if (lane) {
      const auto& c = lane->counters();
      l["sent"] = c.sent.load();
      l["received"] = c.received.load();
      l["request_bytes"] = c.request_bytes.load();
      l["response_bytes"] = c.response_bytes.load();
      l["credit_waits"] = c.credit_waits.load();
    }
    lanes.append(l);
  }
  d["lanes"] = lanes;
  nb::list rdma;
  if (const auto ranker = client.rdma())
    for (const auto& engine : ranker->engines()) {
      nb::dict e = rdma_counters(*engine.counters, engine.thread_domain);
      e["lanes"] = engine.lanes;
      rdma.append(e);
    }
  d["rdma"] = rdma;
  return d;
}

}  // namespace sidepool
