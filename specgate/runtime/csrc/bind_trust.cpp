// Trust in forecasts for Python: specgate/runtime/trust.py hands over a workload's arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bind.h"
#include "error.h"
#include "simulator_trust.h"

namespace nb = nanobind;

namespace specgate {

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// A Trust, and how many events it has seen.
struct Learner {
  int64_t layers, experts, seen = 0;
  Trust trust;

  Learner(int64_t layers, int64_t experts)
      : layers(layers), experts(experts), trust(static_cast<size_t>(layers * experts)) {}

  void read(const Array<int32_t>& document_S, const Array<int64_t>& event_start_N1, const Array<int32_t>& expert_M,
            const Array<int64_t>& point_start_P1, const Array<uint8_t>& horizon_M, const Array<int32_t>& foreseen_M,
            const Array<float>& p_M, const Out<int32_t>& new_expert_M, const Out<float>& new_p_M) {
    sim::Calls calls;
    calls.layers = layers, calls.experts = experts;
    calls.steps = static_cast<int64_t>(document_S.size());
    calls.document = document_S.data(), calls.event_start = event_start_N1.data(), calls.expert = expert_M.data();
    calls.point_start = point_start_P1.data(), calls.horizon = horizon_M.data();
    calls.foreseen = foreseen_M.data(), calls.p = p_M.data();
    const int64_t points = calls.steps * (layers + 1);
    const bool fits = static_cast<int64_t>(event_start_N1.size()) == calls.events() + 1 &&
                      static_cast<int64_t>(point_start_P1.size()) == points + 1 &&
                      static_cast<int64_t>(expert_M.size()) == calls.event_start[calls.events()] &&
                      static_cast<int64_t>(p_M.size()) == calls.point_start[points] && horizon_M.size() == p_M.size() &&
                      foreseen_M.size() == p_M.size() && new_p_M.size() == p_M.size() &&
                      new_expert_M.size() == p_M.size();
    if (!fits) {
      throw StoreFailure(StoreFailure::Kind::Config,
                         "arrays of a workload of " + std::to_string(calls.steps) + " steps of " +
                             std::to_string(layers) + " layers do not fit together: make them with specgate.policy.");
    }
    const auto inside = [&](const Array<int32_t>& experts_M) {
      return std::all_of(experts_M.data(), experts_M.data() + experts_M.size(),
                         [&](int32_t e) { return e >= 0 && e < experts; });
    };
    if (!inside(expert_M) || !inside(foreseen_M)) {
      throw StoreFailure(StoreFailure::Kind::Config, "an expert is none of the " + std::to_string(experts) +
                                                         " of a layer: the forecasts are another model's.");
    }
    const nb::gil_scoped_release free;
    sim::trusted(calls, seen, trust, new_expert_M.data(), new_p_M.data());
    seen += calls.events();
  }
};

}  // namespace

void bind_trust(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Learner>(m, "Trust", "Learns how far forecasts may be trusted; see specgate.runtime.trust.")
      .def(nb::init<int64_t, int64_t>(), "layers"_a, "experts"_a)
      .def("read", &Learner::read, "document_S"_a, "event_start_N1"_a, "expert_M"_a, "point_start_P1"_a, "horizon_M"_a,
           "foreseen_M"_a, "p_M"_a, "new_expert_M"_a, "new_p_M"_a)
      .def("total", [](const Learner& self) {
        const Trust::Seen seen = self.trust.total();
        return nb::make_tuple(seen.said, seen.stated, seen.used);
      });
}

}  // namespace specgate
