// The speculation kernel for Python: specgate/runtime/speculate.py hands over addresses of its tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <functional>
#include <map>

#include "bind.h"
#include "error.h"
#include "speculate.h"

namespace nb = nanobind;

namespace specgate {

namespace {

/// Python's names of the fields, and where they are.
struct Fields {
  std::map<std::string, int32_t*> whole;
  std::map<std::string, float*> real;
  std::map<std::string, std::function<void(uintptr_t)>> tensors;

  explicit Fields(SpeculationModel& m) {
    SpeculationSizes& s = m.sizes;
    SpeculationWeights& w = m.weights;
    SpeculationState& t = m.state;
    whole = {{"layers", &s.layers},
             {"experts", &s.experts},
             {"top_k", &s.top_k},
             {"horizons", &s.horizons},
             {"batch", &s.batch},
             {"vocab", &s.vocab},
             {"hidden", &s.hidden},
             {"routers", &s.routers},
             {"width", &s.width},
             {"depth", &s.depth},
             {"token_dim", &s.token_dim},
             {"state_dim", &s.state_dim},
             {"decays", &s.decays},
             {"heads", &s.heads},
             {"head_width", &s.head_width},
             {"context", &s.context},
             {"table_rows", &s.table_rows},
             {"table_columns", &s.table_columns},
             {"scale_experts", &s.scale_experts},
             {"softmax", &s.softmax},
             {"wraps", &s.wraps},

             {"bf16", &s.bf16}};
    real = {{"router_eps", &s.router_eps},
            {"unit_eps", &s.unit_eps},
            {"slow", &s.slow},
            {"mean_0", &s.mean_0},
            {"mean_1", &s.mean_1}};
    add("router", w.router), add("router_bias", w.router_bias), add("correction", w.correction);
    add("corrected", w.corrected), add("trust", w.trust), add("first", w.first),
        add("first_bias", w.first_bias);
    add("gate", w.gate), add("gate_bias", w.gate_bias), add("more", w.more), add("more_bias", w.more_bias);
    add("last", w.last), add("last_bias", w.last_bias), add("attend", w.attend),
        add("attend_bias", w.attend_bias);
    add("penalty", w.penalty), add("token", w.token), add("expert", w.expert), add("start", w.start);
    add("decay", w.decay), add("table", w.table), add("row", w.row), add("column", w.column);
    add("scale", w.scale), add("offset", w.offset), add("threshold", w.threshold);
    add("state.ids", t.ids), add("state.count", t.count), add("state.live", t.live);
    add("state.experts", t.experts), add("state.weights", t.weights), add("state.use", t.use);
    add("state.run", t.run), add("state.means", t.means), add("state.unit", t.unit),
        add("state.slow", t.slow);
    add("state.memory", t.memory);
  }

  template <class T>
  void add(const char* name, T*& field) {
    tensors[name] = [&field](uintptr_t address) { field = reinterpret_cast<T*>(address); };
  }
};

[[noreturn]] void unknown(const std::string& name) {
  throw StoreFailure(StoreFailure::Kind::Config,
                     "speculation knows no '" + name + "': hand over what speculation_parts gave, unchanged");
}

SpeculationModel model_of(const nb::dict& sizes, const nb::dict& tensors) {
  SpeculationModel model;
  const Fields fields(model);
  for (const auto& [key, value] : sizes) {
    const std::string name = nb::cast<std::string>(key);
    if (const auto whole = fields.whole.find(name); whole != fields.whole.end()) {
      *whole->second = nb::cast<int32_t>(value);
    } else if (const auto real = fields.real.find(name); real != fields.real.end()) {
      *real->second = nb::cast<float>(value);
    } else {
      unknown(name);
    }
  }
  for (const auto& [key, value] : tensors) {
    const std::string name = nb::cast<std::string>(key);
    const auto found = fields.tensors.find(name);
    if (found == fields.tensors.end()) unknown(name);
    found->second(nb::cast<uintptr_t>(value));
  }
  return model;
}

/// backend: "cpu", "cuda" (option: most blocks, 0: what fits) or "emulated" (option: order of threads and
/// blocks).
std::unique_ptr<Speculation> make(const std::string& backend, const nb::dict& sizes, const nb::dict& tensors,
                                  int slots, int device, int option) {
  const SpeculationModel model = model_of(sizes, tensors);
  if (backend == "cpu") return make_speculation_cpu(model, slots);
  if (backend == "emulated") return make_speculation_emulated(model, slots, option);
#ifdef SPECGATE_CUDA
  if (backend == "cuda") return make_speculation_cuda(model, slots, device, option);
#endif
  throw StoreFailure(StoreFailure::Kind::Config,
                     "speculation on '" + backend + "' is not in this build (device " +
                         std::to_string(device) + "): build specgate with nvcc, or choose device=cpu");
}

Scalar scalar_of(int code) {
  if (code < 0 || code > 2)
    throw StoreFailure(StoreFailure::Kind::Config, "speculation takes float32, bfloat16 or float16");
  return static_cast<Scalar>(code);
}

void launch(Speculation& self, int layer, int batch, uintptr_t hidden, int hidden_type, uintptr_t experts,
            int experts_bytes, uintptr_t weights, int weights_type, uintptr_t ids, int ids_bytes,
            uintptr_t stream) {
  SpeculationInput input;
  input.layer = layer;
  input.batch = batch;
  input.hidden = reinterpret_cast<const void*>(hidden);
  input.hidden_type = scalar_of(hidden_type);
  input.experts = reinterpret_cast<const void*>(experts);
  input.experts_bytes = experts_bytes;
  input.weights = reinterpret_cast<const void*>(weights);
  input.weights_type = scalar_of(weights_type);
  input.ids = reinterpret_cast<const void*>(ids);
  input.ids_bytes = ids_bytes;
  nb::gil_scoped_release nogil;
  self.launch(input, stream);
}

/// (sequence, source_layer, ignored, [(layer, expert, p, ahead), ...]) or None.
nb::object taken(bool found, const Foreseen& foreseen) {
  if (!found) return nb::none();
  nb::list entries;
  for (const ForecastEntry& entry : foreseen.entries)
    entries.append(nb::make_tuple(entry.layer, entry.expert, entry.p, entry.ahead));
  return nb::make_tuple(foreseen.sequence, foreseen.source_layer, foreseen.ignored, entries);
}

}  // namespace

void bind_speculate(nb::module_& m) {
  nb::class_<ForecastRing>(m, "ForecastRing",
                           "Forecasts in the memory that a device writes and host threads poll.");
  nb::class_<ForecastReader>(m, "ForecastReader", "One reader's place in a ForecastRing.")
      .def("__init__", [](ForecastReader* at,
                          std::shared_ptr<ForecastRing> ring) { new (at) ForecastReader(std::move(ring)); })
      .def(
          "poll",
          [](ForecastReader& self) {
            Foreseen foreseen;
            const bool found = self.poll(foreseen);
            return taken(found, foreseen);
          },
          "The oldest forecast not seen yet: (sequence, source_layer, ignored, entries), or None.")
      .def(
          "poll_newest",
          [](ForecastReader& self) {
            Foreseen foreseen;
            const bool found = self.poll_newest(foreseen);
            return taken(found, foreseen);
          },
          "The same, skipping to the newest.")
      .def_prop_ro("lost", &ForecastReader::lost);
  nb::class_<Speculation>(m, "Speculation")
      .def("launch", &launch, nb::arg("layer"), nb::arg("batch"), nb::arg("hidden"), nb::arg("hidden_type"),
           nb::arg("experts"), nb::arg("experts_bytes"), nb::arg("weights"), nb::arg("weights_type"),
           nb::arg("ids"), nb::arg("ids_bytes"), nb::arg("stream"))
      .def_prop_ro("ring", [](const Speculation& self) { return self.ring(); });
  m.def("make_speculation", &make, nb::arg("backend"), nb::arg("sizes"), nb::arg("tensors"), nb::arg("slots"),
        nb::arg("device"), nb::arg("option"));
}

}  // namespace specgate
