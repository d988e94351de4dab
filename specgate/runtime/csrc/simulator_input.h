// What a simulation is given: calls, forecasts, costs, rules, room. specgate/policy/{workload,costs,rules}.py
// say what each field means; arrays belong to the caller.
//
// L layers, E experts of a layer, S steps, N = S * L events, M entries, P = S * (L + 1) points.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace specgate::sim {

struct Calls {
  int64_t layers = 0, experts = 0, top_k = 0, steps = 0;
  const int64_t* event_start = nullptr;  // [N + 1]
  const int32_t* expert = nullptr;       // [M], ascending within an event
  const int32_t* document = nullptr;     // [S], ascending
  // Forecasts; null without
  const int64_t* point_start = nullptr;  // [P + 1]
  const uint8_t* horizon = nullptr;
  const int32_t* foreseen = nullptr;
  const float* p = nullptr;

  int64_t events() const { return steps * layers; }
  int64_t documents() const { return steps ? document[steps - 1] + 1 : 0; }
};

struct CostTable {
  int64_t expert_bytes = 1, link_chunk_bytes = 0;
  double link_bytes_per_ns = 1, link_latency_ns = 0, file_bytes_per_ns = 1, file_latency_ns = 0;
  double event_ns = 0, forecast_ns = 0;
  double forecast_share = 1;  // of the link's speed that a forecast's copy reaches
  const double* pre_ns = nullptr;   // [N]
  const double* exec_ns = nullptr;  // [N]
  const double* launch_ns = nullptr;  // [N]; null: none
  double link_slowdown = 0;           // of the host's work while the link copies what no event waits for
  const double* host_pre_ns = nullptr;   // [N], of pre_ns; null: 0
  const double* host_exec_ns = nullptr;  // [N], of exec_ns; null: 0
};

enum class Evict { None, Lru, Lfu, Lfru, Lru2, Static, Forecast, Belady, Priced };
enum class Fetch { None, Threshold, Top, Cumulative, Priced };

struct RuleTable {
  Evict eviction = Evict::Lru;
  Fetch prefetch = Fetch::None;
  bool gate = false, adaptive = false;
  double half_life = 64, mass = 0, entropy_high = 1, backlog_high = 0;
  double load_rise = 0, full_rise = 0, host_rise = 0;
  double discount = 0.99, intercept = 0, slope = 1, price_scale = 1, price_floor = 0;
  int64_t width = 0, depth = 1, low_bytes = 0;
  std::vector<double> weights;     // [L * E], static
  std::vector<double> thresholds;  // [L], threshold
};

struct Room {
  std::vector<int64_t> slots;  // one number for all layers, or [L]
  int64_t host_slots = 0;
  std::vector<int64_t> warm;       // blocks on the device at first
  std::vector<int64_t> warm_host;  // blocks in host memory at first, the least recently used one first
};

/// From its name. Throws StoreFailure(Config) for another.
Evict evict_of(const std::string& name);
Fetch fetch_of(const std::string& name);

/// Throws StoreFailure(Config) for input that makes no sense, StoreFailure(Budget) for an event larger than
/// its slots.
void check(const Calls& calls, const CostTable& costs, const RuleTable& rules, const Room& room);

}  // namespace specgate::sim
