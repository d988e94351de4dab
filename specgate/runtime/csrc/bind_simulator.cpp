// The simulator for Python: specgate/runtime/simulator.py hands over arrays, costs and rules.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <utility>

#include "bind.h"
#include "error.h"
#include "simulator.h"

namespace nb = nanobind;

namespace specgate {

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kPiece = 1 << 16;  // events between two looks at Ctrl-C

double real(nb::handle object, const char* name) { return nb::cast<double>(object.attr(name)); }
int64_t whole(nb::handle object, const char* name) { return nb::cast<int64_t>(object.attr(name)); }
std::string word(nb::handle object, const char* name) { return nb::cast<std::string>(object.attr(name)); }

std::vector<double> numbers(nb::handle object, const char* name) {
  nb::object value = object.attr(name);
  if (value.is_none()) return {};
  return nb::cast<std::vector<double>>(value.attr("ravel")().attr("tolist")());
}

sim::RuleTable rules_of(nb::handle r) {
  sim::RuleTable t;
  t.eviction = sim::evict_of(word(r, "eviction"));
  t.prefetch = sim::fetch_of(word(r, "prefetch"));
  const std::string admission = word(r, "admission");
  if (admission != "always" && admission != "gate") {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "admission=" + admission + " is unknown: choose always or gate.");
  }
  t.gate = admission == "gate";
  t.adaptive = nb::cast<bool>(r.attr("adaptive"));
  t.half_life = real(r, "half_life");
  t.mass = real(r, "mass");
  t.entropy_high = real(r, "entropy_high");
  t.backlog_high = real(r, "backlog_high");
  t.load_rise = real(r, "load_rise");
  t.full_rise = real(r, "full_rise");
  t.host_rise = real(r, "host_rise");
  t.discount = real(r, "discount");
  t.intercept = real(r, "intercept");
  t.slope = real(r, "slope");
  t.price_scale = real(r, "price_scale");
  t.price_floor = real(r, "price_floor");
  t.width = whole(r, "width");
  t.depth = whole(r, "depth");
  t.low_bytes = whole(r, "low_bytes");
  if (t.eviction == sim::Evict::Static) t.weights = numbers(r, "weights_LE");
  if (t.prefetch == sim::Fetch::Threshold) t.thresholds = numbers(r, "thresholds_L");
  return t;
}

/// A simulator and the arrays that it reads.
class Held {
 public:
  Held(nb::handle workload, nb::handle costs, nb::handle rules, std::vector<int64_t> slots,
       int64_t host_slots, std::vector<int64_t> warm, std::vector<int64_t> warm_host) {
    sim::Calls calls;
    calls.layers = whole(workload, "layers");
    calls.experts = whole(workload, "experts");
    calls.top_k = whole(workload, "top_k");
    const auto document = hold<int32_t>(workload, "document_S");
    calls.steps = static_cast<int64_t>(document.size());
    calls.document = document.data();
    const auto start = hold<int64_t>(workload, "event_start_N1");
    const auto expert = hold<int32_t>(workload, "expert_M");
    fits("event_start_N1", start.size(), calls.events() + 1);
    fits("expert_M", expert.size(), calls.events() ? start.data()[calls.events()] : 0);
    calls.event_start = start.data();
    calls.expert = expert.data();
    nb::object forecasts = workload.attr("forecasts");
    if (!forecasts.is_none()) {
      const auto points = hold<int64_t>(forecasts, "start_P1");
      const auto horizon = hold<uint8_t>(forecasts, "horizon_M");
      const auto foreseen = hold<int32_t>(forecasts, "expert_M");
      const auto p = hold<float>(forecasts, "p_M");
      const int64_t count = calls.steps * (calls.layers + 1);
      fits("forecasts.start_P1", points.size(), count + 1);
      const int64_t entries = points.data()[count];
      fits("forecasts.horizon_M", horizon.size(), entries);
      fits("forecasts.expert_M", foreseen.size(), entries);
      fits("forecasts.p_M", p.size(), entries);
      calls.point_start = points.data();
      calls.horizon = horizon.data();
      calls.foreseen = foreseen.data();
      calls.p = p.data();
    }
    sim::CostTable table;
    table.expert_bytes = whole(costs, "expert_bytes");
    table.link_chunk_bytes = whole(costs, "link_chunk_bytes");
    table.link_bytes_per_ns = real(costs, "link_bytes_per_ns");
    table.link_latency_ns = real(costs, "link_latency_ns");
    table.forecast_share = real(costs, "forecast_share");
    table.file_bytes_per_ns = real(costs, "file_bytes_per_ns");
    table.file_latency_ns = real(costs, "file_latency_ns");
    table.event_ns = real(costs, "event_ns");
    table.forecast_ns = real(costs, "forecast_ns");
    const auto pre = hold<double>(costs, "pre_ns_N"), exec = hold<double>(costs, "exec_ns_N");
    fits("pre_ns_N", pre.size(), calls.events());
    fits("exec_ns_N", exec.size(), calls.events());
    table.pre_ns = pre.data();
    table.exec_ns = exec.data();
    table.link_slowdown = real(costs, "link_slowdown");
    for (const auto& [name, place] : {std::pair{"launch_ns_N", &table.launch_ns},
                                      std::pair{"host_pre_ns_N", &table.host_pre_ns},
                                      std::pair{"host_exec_ns_N", &table.host_exec_ns}}) {
      if (costs.attr(name).is_none()) continue;
      const auto times = hold<double>(costs, name);
      fits(name, times.size(), calls.events());
      *place = times.data();
    }
    const sim::RuleTable rule_table = rules_of(rules);
    const sim::Room room{std::move(slots), host_slots, std::move(warm), std::move(warm_host)};
    const nb::gil_scoped_release free;
    simulator_ = std::make_unique<sim::Simulator>(calls, table, rule_table, room);
  }

  void run() {
    for (bool more = true; more;) {
      {
        const nb::gil_scoped_release free;
        more = simulator_->run(kPiece);
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

  bool advance() {
    for (;;) {
      sim::Simulator::Pause pause;
      {
        const nb::gil_scoped_release free;
        pause = simulator_->advance(kPiece);
      }
      if (pause != sim::Simulator::Pause::More) return pause == sim::Simulator::Pause::Point;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

  nb::list observe() const {
    nb::list out;
    for (const float x : simulator_->observe()) out.append(x);
    return out;
  }

  sim::Simulator& simulator() { return *simulator_; }

 private:
  template <class T>
  Array<T> hold(nb::handle object, const char* name) {
    nb::object value = object.attr(name);
    Array<T> array;
    if (!nb::try_cast(value, array, false)) {  // no copy: nobody would keep it
      throw StoreFailure(StoreFailure::Kind::Config,
                         std::string(name) + " is no contiguous array of the right type in one dimension: "
                                             "make it with specgate.policy.");
    }
    kept_.push_back(std::move(value));
    return array;
  }

  static void fits(const char* name, size_t size, int64_t wanted) {
    if (static_cast<int64_t>(size) != wanted) {
      throw StoreFailure(StoreFailure::Kind::Config,
                         std::string(name) + " has " + std::to_string(size) + " entries where " +
                             std::to_string(wanted) + " are needed: make workload and costs for each other.");
    }
  }

  std::vector<nb::object> kept_;
  std::unique_ptr<sim::Simulator> simulator_;
};

nb::dict tallies(Held& held) {
  nb::dict out;
  const std::vector<sim::Tally>& all = held.simulator().tallies();
  auto add = [&](const char* name, auto field) {
    nb::list values;
    for (const sim::Tally& tally : all) values.append(tally.*field);
    out[name] = values;
  };
  using T = sim::Tally;
  add("steps", &T::steps), add("hits", &T::hits), add("late", &T::late), add("host_hits", &T::host_hits);
  add("misses", &T::misses), add("low_hits", &T::low_hits), add("demand_bytes", &T::demand_bytes);
  add("prefetch_bytes", &T::prefetch_bytes), add("wasted_bytes", &T::wasted_bytes);
  add("file_bytes", &T::file_bytes), add("evictions", &T::evictions), add("prefetches", &T::prefetches);
  add("stale", &T::stale), add("refused", &T::refused), add("late_ns", &T::late_ns);
  add("stall_ns", &T::stall_ns), add("compute_ns", &T::compute_ns), add("total_ns", &T::total_ns);
  add("link_busy_ns", &T::link_busy_ns);
  return out;
}

}  // namespace

void bind_simulator(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Held>(m, "Simulator", "Simulates a workload; see specgate.runtime.simulator.")
      .def(nb::init<nb::handle, nb::handle, nb::handle, std::vector<int64_t>, int64_t, std::vector<int64_t>,
                    std::vector<int64_t>>(),
           "workload"_a, "costs"_a, "rules"_a, "slots"_a, "host_slots"_a, "warm"_a, "warm_host"_a)
      .def("run", &Held::run)
      .def("reset", [](Held& self) { self.simulator().reset(); })
      .def("advance", &Held::advance)
      .def("act", [](Held& self, double threshold, int64_t depth) { self.simulator().act(threshold, depth); })
      .def("observe", &Held::observe)
      .def("tallies", &tallies)
      .def("resident", [](Held& self) { return self.simulator().resident(); })
      .def("point", [](Held& self) { return self.simulator().point(); })
      .def("event", [](Held& self) { return self.simulator().event(); })
      .def("in_use", [](Held& self) { return self.simulator().in_use(); })
      .def("now", [](Held& self) { return self.simulator().now(); });
}

}  // namespace specgate
