// What comes first, what is given up, and how much a ranker asks for at once: without clocks, against sorted lists and sums.
#include <algorithm>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "answer_times.hpp"
#include "check.hpp"
#include "clock.hpp"
#include "receive_window.hpp"
#include "work_queue.hpp"

using namespace sidepool;

namespace {

constexpr uint64_t kMs = 1'000'000;

EngineLane* owner(uint64_t i) { return reinterpret_cast<EngineLane*>(64 * (i + 1)); }

bool goes_before(Order order, const Work& a, const Work& b) {
  if (order == Order::edf && a.priority != b.priority) return a.priority > b.priority;
  if (order == Order::edf && a.deadline_ns != b.deadline_ns) return a.deadline_ns < b.deadline_ns;
  return a.received_ns != b.received_ns ? a.received_ns < b.received_ns : a.arrival < b.arrival;
}

Work random_work(std::mt19937_64& rng, uint64_t now) {
  Work work;
  work.received_ns = now;
  work.deadline_ns = now + rng() % 20;
  work.cost_ns = rng() % 8;
  work.priority = int32_t(rng() % 3) - 1;
  work.slot = uint32_t(rng() % 64);
  work.owner = owner(rng() % 3);
  return work;
}

void work_leaves_the_queue_in_order(Order order) {
  std::mt19937_64 rng(1);
  for (int round = 0; round < 300; ++round) {
    WorkQueue queue(order);
    std::vector<Work> list;
    for (uint64_t n = 1; n < 60; ++n) {
      const uint64_t now = 1000 + n / 4;
      Work work = random_work(rng, now);
      // Late if it were answered after all that goes before it.
      uint64_t end = now + work.cost_ns;
      work.arrival = UINT64_MAX;
      for (const Work& each : list) end += goes_before(order, each, work) ? each.cost_ns : 0;
      CHECK(queue.hopeless(work, now) == (end >= work.deadline_ns));
      if (n % 5 == 0) work.received_ns -= 3;  // it comes with its lane from another engine
      queue.push(work);
      work.arrival = n;
      list.push_back(work);
      std::sort(list.begin(), list.end(), [order](const Work& a, const Work& b) { return goes_before(order, a, b); });
      if (rng() % 3 == 0) {
        const Work next = queue.pop();
        CHECK(next.arrival == list.front().arrival && next.slot == list.front().slot);
        list.erase(list.begin());
      }
      if (rng() % 20 == 0) {
        const std::vector<Work> taken = queue.take(owner(1));
        CHECK(size_t(std::erase_if(list, [](const Work& each) { return each.owner == owner(1); })) == taken.size());
      }
    }
    for (const Work& each : list) CHECK(queue.pop().arrival == each.arrival);
    CHECK(queue.empty());
  }
}

void service_times_are_learnt_and_a_wrong_one_is_given_up() {
  ServiceTime time;
  for (int i = 0; i < 200; ++i) time.learn(1000 * 25, 1000), time.learn(5000 + 25 * 10, 10);
  CHECK(std::abs(double(time.of(10'000)) - 255'000) < 3000);
  CHECK(std::abs(double(time.of(0)) - 5000) < 200);
  time.learn(1'000'000'000, 10);  // a stall
  CHECK(time.of(0) < 10'000);
  for (int i = 0; i < 16; ++i) time.doubt();
  CHECK(time.of(10'000) > 250'000);  // refusals beside answers change nothing
  for (int i = 0; i < 1000; ++i) time.doubt();
  CHECK(time.of(10'000) < 10);
}

void answer_times_follow_what_is_possible() {
  AnswerTimes times(2);
  times.answered(1, 1000, 50 * kMs);  // cold
  CHECK(times.expected_ns(1, 1000) == 0);
  for (int i = 0; i < 20; ++i) times.answered(1, 1000, kMs);
  CHECK(times.expected_ns(1, 1000) >= kMs && times.expected_ns(1, 1000) < 2 * kMs);
  CHECK(times.expected_ns(1, 100'000) == 0 && times.expected_ns(0, 1000) == 0);
  times.answered(1, 1000, 10'000 * kMs);
  CHECK(times.expected_ns(1, 1000) < 3 * kMs);
  for (int i = 0; i < 1000; ++i) times.doubt(1, 1000);
  CHECK(times.expected_ns(1, 1000) < 1000);
  const uint64_t minute = 60'000 * kMs;
  CHECK(times.least_delay_ns(0, 1000, 7, minute) == 7);
  CHECK(times.least_delay_ns(0, 1000, 9, minute + 1) == 7);
  CHECK(times.least_delay_ns(0, 1000, 9, minute * 3 / 2) == 7);
  CHECK(times.least_delay_ns(0, 1000, 9, minute * 2) == 9);  // the path has become longer
}

// A window of its least size, with `used` taken from it.
void close_to(ReceiveWindow& window, uint64_t used) {
  CHECK(window.try_take(used, {}));
  window.marked(0, 1);
  CHECK(window.bytes() == std::max<uint64_t>(ReceiveWindow::kLeast, uint64_t(double(used) * 0.7)));
}

void the_window_gives_room_to_the_most_urgent() {
  ReceiveWindow window(kMs);
  close_to(window, ReceiveWindow::kLeast);
  const uint64_t half = ReceiveWindow::kLeast / 2;
  CHECK(!window.try_take(1, {9, 1}));
  const uint32_t late = window.stand(half, {0, 30}), soon = window.stand(half, {0, 10}), first = window.stand(half, {1, 90});
  const uint32_t gone = window.stand(half, {0, 5}), large = window.stand(4 * ReceiveWindow::kLeast, {0, 20});
  CHECK(window.waiting() == 5);
  window.withdraw(gone);
  window.give_back(ReceiveWindow::kLeast);
  CHECK(window.granted(first) && window.granted(soon));
  // The large one comes next: nobody passes it, and it goes alone.
  CHECK(!window.granted(late) && !window.granted(large));
  window.give_back(half);
  CHECK(!window.granted(late) && !window.granted(large));
  CHECK(!window.try_take(1, {0, 25}) && window.try_take(1, {0, 15}));
  window.give_back(1);
  window.give_back(half);
  CHECK(window.granted(large) && !window.granted(late));
  window.withdraw(late);
  CHECK(window.used() == 4 * ReceiveWindow::kLeast && window.waiting() == 0);
  // One that is granted and does not want it any more.
  const uint32_t idle = window.stand(half, {0, 1});
  window.give_back(4 * ReceiveWindow::kLeast);
  CHECK(window.used() == half);
  window.withdraw(idle);
  CHECK(window.used() == 0);
}

void the_window_follows_delay_and_marks() {
  ReceiveWindow window(kMs);
  CHECK(window.try_take(10 << 20, {}));
  uint64_t now = kMs;
  for (int i = 0; i < 100; ++i) window.answered(100'000, 2 * kMs, kMs, now += kMs);
  CHECK(window.bytes() == ReceiveWindow::kOpen);
  // A single late answer is noise, lasting delay is not.
  window.answered(100'000, 200 * kMs, kMs, now += kMs);
  CHECK(window.bytes() == ReceiveWindow::kOpen);
  for (int i = 0; i < 20; ++i) window.answered(100'000, 4 * kMs, kMs, now += kMs);
  const uint64_t shrunk = window.bytes();
  CHECK(shrunk < 10 << 20 && shrunk >= 5 << 20);
  window.marked(kMs, now += kMs);
  window.marked(kMs, now + 1);  // of the same time: once is enough
  CHECK(window.bytes() == uint64_t(double(shrunk) * 0.7));
  for (int i = 0; i < 3000; ++i) window.answered(100'000, 50 * kMs, kMs, now += 50 * kMs);
  CHECK(window.bytes() == ReceiveWindow::kLeast);
  // It grows only while it holds somebody back.
  window.give_back(10 << 20);
  for (int i = 0; i < 100; ++i) window.answered(100'000, kMs, kMs, now += kMs);
  CHECK(window.bytes() == ReceiveWindow::kLeast);
  CHECK(window.try_take(1ull << 40, {}));
  for (int i = 0; i < 3000; ++i) window.answered(1 << 20, kMs, kMs, now += kMs);
  CHECK(window.bytes() > 100 << 20);
  window.give_back(1ull << 40);
}

// Threads that take, wait, give up and give back: never more than the window, and nothing is left at the end.
void the_window_holds_whatever_threads_do() {
  ReceiveWindow window(kMs);
  close_to(window, 2 * ReceiveWindow::kLeast);
  const uint64_t bytes = window.bytes();
  window.give_back(2 * ReceiveWindow::kLeast);
  std::atomic<uint64_t> held{0};
  std::atomic<int> beyond{0}, taken{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 rng(t);
      for (int i = 0; i < 2000; ++i) {
        const uint64_t mine = 1 + rng() % (bytes / 2);
        const Urgency urgency{int32_t(rng() % 2), rng() % 100};
        if (!window.try_take(mine, urgency)) {
          const uint32_t place = window.stand(mine, urgency);
          if (!window.wait(place, now_ns() + (rng() % 4 == 0 ? 0 : 1'000 * kMs))) {
            window.withdraw(place);
            continue;
          }
        }
        taken.fetch_add(1);
        if (held.fetch_add(mine) + mine > bytes) beyond.fetch_add(1);
        if (rng() % 8 == 0) std::this_thread::yield();
        held.fetch_sub(mine);
        window.give_back(mine);
      }
    });
  for (auto& t : threads) t.join();
  CHECK(beyond.load() == 0);
  CHECK(taken.load() > 8 * 1000);
  CHECK(window.used() == 0 && window.waiting() == 0);
}

}  // namespace

int main() {
  return run_tests({
      {"edf: work leaves the queue in order", [] { work_leaves_the_queue_in_order(Order::edf); }},
      {"fcfs: work leaves the queue in order", [] { work_leaves_the_queue_in_order(Order::fcfs); }},
      {"service times are learnt, and a wrong one is given up", service_times_are_learnt_and_a_wrong_one_is_given_up},
      {"answer times follow what is possible", answer_times_follow_what_is_possible},
      {"the window gives room to the most urgent", the_window_gives_room_to_the_most_urgent},
      {"the window follows delay and marks", the_window_follows_delay_and_marks},
      {"the window holds whatever threads do", the_window_holds_whatever_threads_do},
  });
}
