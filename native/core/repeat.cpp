#include "repeat.hpp"

#include "clock.hpp"

namespace sidepool {

uint64_t repeat_lookups(LookupClient& client, const Part& part, int64_t out_width, uint64_t count, int threads) {
  std::atomic<uint64_t> taken{0};
  std::atomic<Status> failed{Status::ok};
  const auto run = [&] {
    std::vector<float> out(size_t(part.fixed_batch * out_width));
    LookupCall call;
    call.parts = &part;
    call.part_count = 1;
    call.out = {reinterpret_cast<std::byte*>(out.data()), out_width, nullptr, OutputFormat::fp32};
    call.budget_ns = 60'000'000'000;  // far beyond any lookup; one that hangs must end
    while (taken.fetch_add(1, std::memory_order_relaxed) < count && failed.load(std::memory_order_relaxed) == Status::ok)
      if (const Status status = client.lookup(call).status; status != Status::ok) failed.store(status);
  };
  const uint64_t begin = now_ns();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run);
  run();
  for (std::thread& thread : others) thread.join();
  const uint64_t spent = now_ns() - begin;
  if (failed.load() != Status::ok) throw Error(failed.load(), "a repeated lookup failed");
  return spent;
}

}  // namespace sidepool
