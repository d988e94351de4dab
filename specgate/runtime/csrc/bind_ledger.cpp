// The Ledger for Python: the same calls as specgate.runtime.reference.Ledger, so that one test suite drives both.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "error.h"
#include "ledger.h"

namespace nb = nanobind;

namespace specgate {

namespace {

const char* const kPlaces[] = {"ABSENT", "LOADING", "PRESENT"};
const char* const kLevels[] = {"DEMAND", "PREFETCH"};
const char* const kTargets[] = {"DEVICE", "HOST"};
const char* const kJobs[] = {"READ", "COPY", "DIRECT"};
const char* const kAsked[] = {"queued", "merged", "demanded", "resident", "stale", "refused"};

template <typename E>
const char* name(const char* const* names, E value) {
  return names[static_cast<int>(value)];
}

Target target_of(const std::string& text) {
  if (text == "device") return Target::Device;
  if (text == "host") return Target::Host;
  throw StoreFailure(StoreFailure::Kind::Config, "target=" + text + " is unknown: choose device or host");
}

JobStatus status_of(const std::string& text) {
  if (text == "OK") return JobStatus::Ok;
  if (text == "FAILED") return JobStatus::Failed;
  if (text == "CANCELLED") return JobStatus::Cancelled;
  throw StoreFailure(StoreFailure::Kind::Config, "status=" + text + " is unknown: choose OK, FAILED or CANCELLED");
}

nb::object job_tuple(const std::optional<Job>& job) {
  if (!job) return nb::none();
  nb::object make = nb::module_::import_("specgate.runtime.reference").attr("Job");
  return make(job->id, name(kJobs, job->kind), job->block, job->slab, job->slot, name(kLevels, job->level));
}

nb::tuple state(const Ledger& ledger, uint32_t b) {
  if (b >= ledger.size()) {
    throw StoreFailure(StoreFailure::Kind::Config, "expert block " + std::to_string(b) + " does not exist: there are " +
                                                       std::to_string(ledger.size()));
  }
  const Block& block = ledger.block(b);
  nb::object want = nb::none();
  if (block.want) {
    const Want& w = *block.want;
    want = nb::make_tuple(name(kLevels, w.level), name(kTargets, w.target), w.p, w.deadline, w.seq);
  }
  return nb::make_tuple(name(kPlaces, block.device), block.slot, block.pins, name(kPlaces, block.host), block.slab,
                        block.host_pins, want);
}

}  // namespace

nb::dict counters_dict(const Counters& c) {
  nb::dict out;
  out["hit"] = c.hit;
  out["late"] = c.late;
  out["host_hit"] = c.host_hit;
  out["miss"] = c.miss;
  out["promoted"] = c.promoted;
  out["merged"] = c.merged;
  out["stale"] = c.stale;
  out["overflow"] = c.overflow;
  out["evictions"] = c.evictions;
  out["host_evictions"] = c.host_evictions;
  out["useful_bytes"] = c.useful_bytes;
  out["wasted_bytes"] = c.wasted_bytes;
  out["late_bytes"] = c.late_bytes;
  out["copied_bytes_demand"] = c.copied_bytes[0];
  out["copied_bytes_prefetch"] = c.copied_bytes[1];
  out["read_bytes_demand"] = c.read_bytes[0];
  out["read_bytes_prefetch"] = c.read_bytes[1];
  out["wasted_read_bytes"] = c.wasted_read_bytes;
  return out;
}

void bind_ledger(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Ledger>(m, "Ledger", "The store's state machine; see specgate.runtime.reference.Ledger.")
      .def(
          "__init__",
          [](Ledger* self, std::vector<uint32_t> block_class, std::vector<int64_t> block_bytes,
             std::vector<int64_t> device_slots, std::vector<int64_t> host_slots, const std::string& policy,
             const std::string& host_policy, int64_t max_pending, int64_t max_reads, int64_t prefetch_copy_bytes,
             int64_t prefetch_read_bytes, double half_life, bool resident_host) {
            new (self) Ledger(std::move(block_class), std::move(block_bytes), std::move(device_slots),
                              std::move(host_slots), policy, host_policy,
                              {max_pending, max_reads, prefetch_copy_bytes, prefetch_read_bytes, half_life,
                               resident_host});
          },
          "block_class"_a, "block_bytes"_a, "device_slots"_a, "host_slots"_a, "policy"_a = "lru",
          "host_policy"_a = "lru", nb::kw_only(), "max_pending"_a = 1024, "max_reads"_a = 8,
          "prefetch_copy_bytes"_a = int64_t{64} << 20, "prefetch_read_bytes"_a = int64_t{64} << 20,
          "half_life"_a = 64.0, "resident_host"_a = false)
      .def("demand", &Ledger::demand, "blocks"_a)
      .def("release", &Ledger::release, "blocks"_a)
      .def(
          "prefetch",
          [](Ledger& self, uint32_t block, double p, int64_t deadline, const std::string& target) {
            return name(kAsked, self.prefetch(block, p, deadline, target_of(target)));
          },
          "block"_a, "p"_a, "deadline"_a, "target"_a = "device")
      .def("advance", &Ledger::advance, "now"_a)
      .def("next_job", [](Ledger& self) { return job_tuple(self.next_job()); })
      .def("complete",
           [](Ledger& self, int64_t id, const std::string& status) { self.complete(id, status_of(status)); },
           "id"_a, "status"_a = "OK")
      .def("sent", &Ledger::sent, "id"_a)
      .def("ready", &Ledger::ready, "blocks"_a, "issued"_a = false)
      .def("take_failed", &Ledger::take_failed)
      .def("stats", [](const Ledger& self) { return counters_dict(self.counters()); })
      .def("state", &state, "block"_a)
      .def("set_weights",
           [](Ledger& self, const std::vector<double>& weights) {
             self.policy().set_weights(weights);
             self.host_policy().set_weights(weights);
           })
      .def("set_future",
           [](Ledger& self, const std::vector<std::vector<uint32_t>>& events) {
             self.policy().set_future(events);
             self.host_policy().set_future(events);
           })
      .def(
          "set_reuse",
          [](Ledger& self, uint32_t experts, double half_life, double discount, double intercept, double slope) {
            const Reuse reuse{experts, half_life, discount, intercept, slope};
            self.policy().set_reuse(reuse);
            self.host_policy().set_reuse(reuse);
          },
          "experts"_a, "half_life"_a = 64.0, "discount"_a = 0.99, "intercept"_a = 0.0, "slope"_a = 1.0)
      .def("invariants", &Ledger::check);
}

}  // namespace specgate
