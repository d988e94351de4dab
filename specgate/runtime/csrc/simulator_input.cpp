#include "simulator_input.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace specgate::sim {

namespace {

[[noreturn]] void refuse(const std::string& why) { throw StoreFailure(StoreFailure::Kind::Config, why); }

std::string text(int64_t number) { return std::to_string(number); }

bool is_time(double value) { return std::isfinite(value) && value >= 0; }

void check_time(const std::string& name, double value) {
  if (!is_time(value)) {
    refuse(name + "=" + std::to_string(value) + " is no time: give nanoseconds, 0 or more.");
  }
}

void check_rate(const std::string& name, double value) {
  if (!(std::isfinite(value) && value > 0)) {
    refuse(name + "=" + std::to_string(value) + " moves nothing: give a number above 0.");
  }
}

void check_number(const std::string& name, double value, double least, double most) {
  if (!(value >= least && value <= most)) {
    refuse(name + "=" + std::to_string(value) + " makes no sense: give a number from " +
           std::to_string(least) + " to " + std::to_string(most) + ".");
  }
}

void check_calls(const Calls& c) {
  if (c.layers < 1 || c.experts < 1 || c.layers * c.experts > (int64_t{1} << 30)) {
    refuse(text(c.layers) + " layers of " + text(c.experts) +
           " experts cannot be simulated: give at least one of each.");
  }
  if (c.event_start[0] != 0) {
    refuse("the first event's experts begin at " + text(c.event_start[0]) + ": make it 0.");
  }
  for (int64_t n = 0; n < c.events(); ++n) {
    if (c.event_start[n + 1] < c.event_start[n]) {
      refuse("event " + text(n) + " ends before it begins: make the workload anew.");
    }
  }
  for (int64_t n = 0; n < c.events(); ++n) {
    int64_t last = -1;
    for (int64_t i = c.event_start[n]; i < c.event_start[n + 1]; ++i) {
      const int64_t expert = c.expert[i];
      if (expert < 0 || expert >= c.experts) {
        refuse("event " + text(n) + " asks for expert " + text(expert) + ", and a layer has " +
               text(c.experts) + ": make the workload anew.");
      }
      if (expert <= last) {
        refuse("event " + text(n) + " names expert " + text(expert) +
               " out of order: sort each event's experts.");
      }
      last = expert;
    }
  }
  for (int64_t s = 0; s < c.steps; ++s) {
    const int64_t low = s ? c.document[s - 1] : 0;
    if (c.document[s] < low || c.document[s] > low + 1 || (s == 0 && c.document[s] != 0)) {
      refuse("step " + text(s) + " belongs to document " + text(c.document[s]) +
             ": number documents 0, 1, ... in order.");
    }
  }
}

void check_forecasts(const Calls& c) {
  if (!c.point_start) return;
  const int64_t points = c.steps * (c.layers + 1);
  if (c.point_start[0] != 0) {
    refuse("the first point's forecasts begin at " + text(c.point_start[0]) + ": make it 0.");
  }
  for (int64_t point = 0; point < points; ++point) {
    if (c.point_start[point + 1] < c.point_start[point]) {
      refuse("the forecasts of point " + text(point) + " end before they begin: make them anew.");
    }
  }
  for (int64_t point = 0; point < points; ++point) {
    const int64_t first = c.point_start[point], last = c.point_start[point + 1];
    auto where = [&] { return "the forecasts of point " + text(point); };
    for (int64_t i = first; i < last; ++i) {
      if (c.foreseen[i] < 0 || c.foreseen[i] >= c.experts) {
        refuse(where() + " name expert " + text(c.foreseen[i]) + ", and a layer has " + text(c.experts) +
               ": make them anew.");
      }
      if (!(c.p[i] >= 0 && c.p[i] <= 1)) {
        refuse(where() + " say p=" + std::to_string(c.p[i]) + ": probabilities are 0 to 1.");
      }
      const bool sorted = i == first || c.horizon[i] > c.horizon[i - 1] ||
                          (c.horizon[i] == c.horizon[i - 1] && c.p[i] <= c.p[i - 1]);
      if (c.horizon[i] < 1 || !sorted) {
        refuse(where() + " are not sorted by horizon (1, 2, ...) and falling probability: sort them.");
      }
    }
  }
}

void check_costs(const Calls& calls, const CostTable& c) {
  if (c.expert_bytes < 1) {
    refuse("expert_bytes=" + text(c.expert_bytes) + " is no size: give a positive number.");
  }
  if (c.link_chunk_bytes < 0) {
    refuse("link_chunk_bytes=" + text(c.link_chunk_bytes) + " is negative: 0 means never.");
  }
  check_rate("link_bytes_per_ns", c.link_bytes_per_ns);
  check_rate("file_bytes_per_ns", c.file_bytes_per_ns);
  check_time("link_latency_ns", c.link_latency_ns);
  check_time("file_latency_ns", c.file_latency_ns);
  check_time("event_ns", c.event_ns);
  check_time("forecast_ns", c.forecast_ns);
  if (!(c.forecast_share > 0 && c.forecast_share <= 1)) {
    refuse("forecast_share=" + std::to_string(c.forecast_share) + " is no share of the link: give more than 0, up to 1.");
  }
  if (!is_time(c.link_slowdown)) {
    refuse("link_slowdown=" + std::to_string(c.link_slowdown) + " slows nothing down: give a number from 0.");
  }
  for (int64_t n = 0; n < calls.events(); ++n) {
    if (!is_time(c.pre_ns[n])) check_time("pre_ns_N[" + text(n) + "]", c.pre_ns[n]);
    if (!is_time(c.exec_ns[n])) check_time("exec_ns_N[" + text(n) + "]", c.exec_ns[n]);
    if (c.launch_ns && !is_time(c.launch_ns[n])) check_time("launch_ns_N[" + text(n) + "]", c.launch_ns[n]);
    if (c.host_pre_ns && !is_time(c.host_pre_ns[n])) {
      check_time("host_pre_ns_N[" + text(n) + "]", c.host_pre_ns[n]);
    }
    if (c.host_exec_ns && !is_time(c.host_exec_ns[n])) {
      check_time("host_exec_ns_N[" + text(n) + "]", c.host_exec_ns[n]);
    }
  }
}

void check_rules(const Calls& calls, const CostTable& costs, const RuleTable& r) {
  if (!(std::isfinite(r.half_life) && r.half_life > 0)) {
    refuse("half_life=" + std::to_string(r.half_life) + " must be a positive number of steps.");
  }
  if (r.depth < 1 || r.depth > 255) refuse("depth=" + text(r.depth) + " is no horizon: choose 1 to 255.");
  if (r.low_bytes < 0 || (r.low_bytes > 0 && r.low_bytes >= costs.expert_bytes)) {
    refuse("low_bytes=" + text(r.low_bytes) + " is not less than expert_bytes=" + text(costs.expert_bytes) +
           ": give fewer, or 0 for no approximate copies.");
  }
  check_number("discount", r.discount, 0, 1);
  for (const double factor : {r.load_rise, r.full_rise, r.host_rise, r.price_scale, r.price_floor}) {
    check_number("a factor", factor, 0, 1e300);
  }
  if (std::isnan(r.entropy_high) || std::isnan(r.backlog_high) || std::isnan(r.mass)) {
    refuse("entropy_high, backlog_high or mass is no number: give one.");
  }
  if (!(std::isfinite(r.intercept) && std::isfinite(r.slope) && r.slope >= 0)) {
    refuse("intercept=" + std::to_string(r.intercept) + " and slope=" + std::to_string(r.slope) +
           " must be finite and the slope not negative: fit them anew.");
  }
  if (r.eviction == Evict::Static && static_cast<int64_t>(r.weights.size()) != calls.layers * calls.experts) {
    refuse(text(static_cast<int64_t>(r.weights.size())) + " weights do not fit " + text(calls.layers) +
           " layers of " + text(calls.experts) + " experts: give one for each.");
  }
  if (r.prefetch == Fetch::Threshold && static_cast<int64_t>(r.thresholds.size()) != calls.layers) {
    refuse(text(static_cast<int64_t>(r.thresholds.size())) + " thresholds do not fit " + text(calls.layers) +
           " layers: give one for each.");
  }
}

void check_warm(const Calls& calls, const std::vector<int64_t>& blocks, const std::string& name) {
  std::vector<bool> seen(static_cast<size_t>(calls.layers * calls.experts));
  for (const int64_t b : blocks) {
    if (b < 0 || b >= static_cast<int64_t>(seen.size()) || seen[static_cast<size_t>(b)]) {
      refuse(name + " names block " + text(b) + " twice, or there is none: blocks are layer * " +
             text(calls.experts) + " + expert, up to " + text(static_cast<int64_t>(seen.size()) - 1) + ".");
    }
    seen[static_cast<size_t>(b)] = true;
  }
}

void check_room(const Calls& calls, const Room& room) {
  const auto pools = static_cast<int64_t>(room.slots.size());
  if (pools != 1 && pools != calls.layers) {
    refuse(text(pools) + " numbers of slots do not fit " + text(calls.layers) +
           " layers: give one for all or one for each.");
  }
  for (const int64_t slots : room.slots) {
    if (slots < 0) refuse(text(slots) + " slots make no sense: give 0 or more.");
  }
  if (room.host_slots < 0) refuse("host_slots=" + text(room.host_slots) + " makes no sense: give 0 or more.");
  auto pool = [&](int64_t layer) { return static_cast<size_t>(pools == 1 ? 0 : layer); };
  for (int64_t n = 0; n < calls.events(); ++n) {
    const int64_t size = calls.event_start[n + 1] - calls.event_start[n], layer = n % calls.layers;
    if (size > room.slots[pool(layer)]) {
      throw StoreFailure(StoreFailure::Kind::Budget,
                         "Event " + text(n) + " (step " + text(n / calls.layers) + ", layer " + text(layer) +
                             ") needs " + text(size) + " experts at once and there are " +
                             text(room.slots[pool(layer)]) + " slots for it: give it at least " + text(size) +
                             ".");
    }
  }
  check_warm(calls, room.warm, "warm");
  check_warm(calls, room.warm_host, "warm_host");
  std::vector<int64_t> left = room.slots;
  for (const int64_t b : room.warm) {
    if (left[pool(b / calls.experts)]-- == 0) {
      throw StoreFailure(StoreFailure::Kind::Budget, text(static_cast<int64_t>(room.warm.size())) +
                                                         " warm blocks do not fit the slots: give fewer.");
    }
  }
  if (static_cast<int64_t>(room.warm_host.size()) > room.host_slots) {
    throw StoreFailure(StoreFailure::Kind::Budget, text(static_cast<int64_t>(room.warm_host.size())) +
                                                       " warm blocks do not fit " + text(room.host_slots) +
                                                       " places in host memory: give fewer.");
  }
}

template <class T, size_t count>
T find(const char* field, const std::string& name, const std::pair<const char*, T> (&known)[count]) {
  std::string choices;
  for (const auto& [key, value] : known) {
    if (name == key) return value;
    choices += (choices.empty() ? "" : ", ") + std::string(key);
  }
  refuse(std::string(field) + "=" + name + " is unknown: choose one of " + choices + ".");
}

}  // namespace

Evict evict_of(const std::string& name) {
  static const std::pair<const char*, Evict> known[] = {
      {"none", Evict::None}, {"lru", Evict::Lru},       {"lfu", Evict::Lfu},
      {"lfru", Evict::Lfru}, {"lru2", Evict::Lru2},     {"static", Evict::Static},
      {"forecast", Evict::Forecast}, {"belady", Evict::Belady}, {"priced", Evict::Priced}};
  return find("eviction", name, known);
}

Fetch fetch_of(const std::string& name) {
  static const std::pair<const char*, Fetch> known[] = {{"none", Fetch::None},
                                                        {"threshold", Fetch::Threshold},
                                                        {"top", Fetch::Top},
                                                        {"cumulative", Fetch::Cumulative},
                                                        {"priced", Fetch::Priced}};
  return find("prefetch", name, known);
}

void check(const Calls& calls, const CostTable& costs, const RuleTable& rules, const Room& room) {
  check_calls(calls);
  check_forecasts(calls);
  check_costs(calls, costs);
  check_rules(calls, costs, rules);
  check_room(calls, room);
}

}  // namespace specgate::sim
