// The simulator with every combination of rules on random calls: nothing is allocated while it runs, no slots
// are exceeded, what it counts adds up, equal runs are equal. Under the sanitizers: nothing is read or
// written out of place.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "error.h"
#include "simulator.h"

namespace {
std::atomic<int64_t> allocations{0};
}

void* operator new(std::size_t size) {
  ++allocations;
  if (void* found = std::malloc(size ? size : 1)) return found;
  throw std::bad_alloc();
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }

namespace {

using namespace specgate::sim;

/// Random calls and forecasts, and the arrays that they lie in.
struct Random {
  std::mt19937_64 random;
  std::vector<int64_t> event_start{0}, point_start{0};
  std::vector<int32_t> expert, document, foreseen;
  std::vector<uint8_t> horizon;
  std::vector<float> p;
  std::vector<double> pre, exec, launch;
  Calls calls;
  CostTable costs;
  RuleTable rules;
  Room room;

  int64_t below(int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

  explicit Random(uint64_t seed) : random(seed) {
    calls.layers = 1 + below(4);
    calls.experts = 2 + below(9);
    calls.top_k = 1 + below(std::min<int64_t>(4, calls.experts));
    calls.steps = 1 + below(60);
    for (int64_t s = 0; s < calls.steps; ++s) {
      document.push_back(s == 0 ? 0 : document.back() + (below(15) == 0));
    }
    for (int64_t n = 0; n < calls.events(); ++n) {
      std::vector<int32_t> all(static_cast<size_t>(calls.experts));
      for (size_t e = 0; e < all.size(); ++e) all[e] = static_cast<int32_t>(e);
      std::shuffle(all.begin(), all.end(), random);
      all.resize(static_cast<size_t>(below(calls.top_k + 1)));
      std::sort(all.begin(), all.end());
      expert.insert(expert.end(), all.begin(), all.end());
      event_start.push_back(static_cast<int64_t>(expert.size()));
      pre.push_back(static_cast<double>(below(100)));
      exec.push_back(static_cast<double>(below(100)));
      launch.push_back(static_cast<double>(below(200)));
    }
    for (int64_t point = 0; point < calls.steps * (calls.layers + 1); ++point) {
      for (int h = 1; h <= 6; ++h) {
        float last = 1;
        for (int64_t i = below(calls.experts + 1); i > 0; --i) {
          last *= static_cast<float>(below(100)) / 99;
          horizon.push_back(static_cast<uint8_t>(h));
          foreseen.push_back(static_cast<int32_t>(below(calls.experts)));
          p.push_back(last);
        }
      }
      point_start.push_back(static_cast<int64_t>(p.size()));
    }
    calls.event_start = event_start.data();
    calls.expert = expert.data();
    calls.document = document.data();
    calls.point_start = below(5) ? point_start.data() : nullptr;
    calls.horizon = horizon.data();
    calls.foreseen = foreseen.data();
    calls.p = p.data();
    costs.expert_bytes = 64;
    costs.link_chunk_bytes = below(3) * 16;
    costs.link_bytes_per_ns = 0.5 + static_cast<double>(below(40)) / 10;
    costs.link_latency_ns = static_cast<double>(below(20));
    costs.file_bytes_per_ns = 0.5 + static_cast<double>(below(20)) / 10;
    costs.forecast_ns = static_cast<double>(below(2) * below(300));
    costs.pre_ns = pre.data();
    costs.exec_ns = exec.data();
    costs.launch_ns = below(2) ? launch.data() : nullptr;
    costs.link_slowdown = below(2) ? static_cast<double>(below(20)) / 16 : 0;
    costs.host_pre_ns = below(2) ? pre.data() : nullptr;
    costs.host_exec_ns = below(2) ? exec.data() : nullptr;
    rules.eviction = static_cast<Evict>(below(9));
    rules.prefetch = static_cast<Fetch>(below(5));
    rules.gate = below(3) == 0;
    rules.adaptive = below(3) == 0;
    rules.half_life = 1 + static_cast<double>(below(30));
    rules.mass = 0.7;
    rules.entropy_high = 0.6;
    rules.backlog_high = 3;
    rules.full_rise = 0.1;
    rules.price_scale = 0.2;
    rules.width = 1 + below(3);
    rules.depth = 1 + below(6);
    rules.low_bytes = rules.prefetch == Fetch::Priced ? below(3) * 16 : 0;
    const auto blocks = static_cast<size_t>(calls.layers * calls.experts);
    if (rules.eviction == Evict::Static) rules.weights.assign(blocks, 1.0);
    if (rules.prefetch == Fetch::Threshold) rules.thresholds.assign(static_cast<size_t>(calls.layers), 0.4);
    const auto pools = static_cast<size_t>(below(2) ? 1 : calls.layers);
    for (size_t i = 0; i < pools; ++i) room.slots.push_back(calls.top_k + below(6));
    room.host_slots = below(2) ? static_cast<int64_t>(blocks) : below(static_cast<int64_t>(blocks));
  }
};

int64_t sum(const Simulator& simulator, int64_t Tally::*field) {
  int64_t total = 0;
  for (const Tally& tally : simulator.tallies()) total += tally.*field;
  return total;
}

double sum(const Simulator& simulator, double Tally::*field) {
  double total = 0;
  for (const Tally& tally : simulator.tallies()) total += tally.*field;
  return total;
}

void runs_add_up() {
  for (uint64_t seed = 0; seed < 600; ++seed) {
    Random given(seed);
    Simulator simulator(given.calls, given.costs, given.rules, given.room);
    const int64_t before = allocations;
    while (simulator.run(7)) {
    }
    CHECK(allocations == before);
    const int64_t asked = sum(simulator, &Tally::hits) + sum(simulator, &Tally::low_hits) +
                          sum(simulator, &Tally::late) + sum(simulator, &Tally::host_hits) +
                          sum(simulator, &Tally::misses);
    CHECK(asked == static_cast<int64_t>(given.expert.size()));
    CHECK(sum(simulator, &Tally::wasted_bytes) <= sum(simulator, &Tally::prefetch_bytes));
    const double total = sum(simulator, &Tally::total_ns);
    const double parts = sum(simulator, &Tally::compute_ns) + sum(simulator, &Tally::stall_ns);
    CHECK(std::abs(total - parts) <= 1e-9 * total);
    CHECK(std::abs(total - simulator.now()) <= 1e-9 * total);
    simulator.reset();
    while (simulator.run(1000)) {
    }
    CHECK(sum(simulator, &Tally::total_ns) == total);
  }
}

void steps_keep_to_the_slots() {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Random given(seed);
    Simulator simulator(given.calls, given.costs, given.rules, given.room);
    int64_t points = 0;
    while (simulator.advance(1'000'000) == Simulator::Pause::Point) {
      ++points;
      std::vector<int64_t> held(given.room.slots.size());
      for (const int64_t b : simulator.resident()) {
        ++held[held.size() == 1 ? 0 : static_cast<size_t>(b / given.calls.experts)];
      }
      for (size_t i = 0; i < held.size(); ++i) CHECK(held[i] <= given.room.slots[i]);
      for (const float seen : simulator.observe()) CHECK(std::isfinite(seen));
      simulator.act(static_cast<double>(given.below(11)) / 10, 1 + given.below(6));
    }
    CHECK(points <= given.calls.steps * (given.calls.layers + 1));
  }
}

void too_few_slots_are_refused() {
  Random given(1);
  given.room.slots.assign(1, 0);
  bool refused = false;
  try {
    Simulator simulator(given.calls, given.costs, given.rules, given.room);
  } catch (const specgate::StoreFailure& failure) {
    refused = failure.kind == specgate::StoreFailure::Kind::Budget;
  }
  CHECK(refused);
}

}  // namespace

int main() {
  runs_add_up();
  steps_keep_to_the_slots();
  too_few_slots_are_refused();
  return specgate::test::report("simulator");
}
