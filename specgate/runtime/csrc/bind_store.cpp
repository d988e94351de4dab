// The threaded store for Python; specgate/runtime/store.py is its face.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <thread>

#include "bind.h"
#include "error.h"
#include "store.h"

namespace nb = nanobind;

namespace specgate {

nb::dict counters_dict(const Counters& counters);  // bind_ledger.cpp

namespace {

constexpr int kSliceMs = 50;  // between two looks at Python's signals

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using SegmentTuple = std::tuple<int, uint64_t, uint64_t, uint64_t>;
using BlockTuple = std::tuple<uint32_t, std::vector<SegmentTuple>, std::optional<uint32_t>, uint64_t>;
using FaultTuple = std::tuple<uint64_t, int, uint64_t>;  // offset, errno, limit

std::vector<StoredBlock> stored_blocks(const std::vector<BlockTuple>& tuples) {
  std::vector<StoredBlock> out;
  out.reserve(tuples.size());
  for (const auto& [shape_class, segments, crc, compressed] : tuples) {
    StoredBlock block{shape_class, {}, crc, compressed};
    for (const auto& [file, offset, length, at] : segments) block.segments.push_back({file, offset, length, at});
    out.push_back(std::move(block));
  }
  return out;
}

FileReader::Options::Backend backend_of(const std::string& text) {
  if (text == "auto") return FileReader::Options::Auto;
  if (text == "io_uring") return FileReader::Options::Uring;
  if (text == "pread") return FileReader::Options::Pread;
  throw StoreFailure(StoreFailure::Kind::Config, "reader=" + text + " is unknown: choose auto, io_uring or pread");
}

/// Reads of the given offsets fail, end early or (a negative errno: milliseconds) come late; for tests.
std::function<ReadFault(int, uint64_t, uint64_t)> faults_of(std::vector<FaultTuple> faults) {
  if (faults.empty()) return {};
  return [faults = std::move(faults)](int, uint64_t offset, uint64_t length) {
    for (const auto& [at, error, limit] : faults) {
      if (at < offset || at >= offset + length) continue;
      if (error >= 0) return ReadFault{error, limit};
      std::this_thread::sleep_for(std::chrono::milliseconds(-error));
    }
    return ReadFault{};
  };
}

/// Waits for what was demanded, and lets Ctrl-C through.
std::vector<int64_t> acquire(Store& store, const std::vector<uint32_t>& blocks, uintptr_t stream) {
  bool ready = false;
  {
    const nb::gil_scoped_release free;
    ready = store.demand(blocks);
  }
  while (!ready) {
    {
      const nb::gil_scoped_release free;
      ready = store.wait(blocks, kSliceMs);
    }
    if (!ready && PyErr_CheckSignals() != 0) {
      store.release(blocks, stream);
      throw nb::python_error();
    }
  }
  try {
    return store.slots(blocks, stream);
  } catch (...) {
    store.release(blocks, stream);
    throw;
  }
}

bool drain(Store& store, double seconds) {
  const int slices = static_cast<int>(seconds * 1000.0 / kSliceMs) + 1;
  for (int i = 0; i < slices; ++i) {
    {
      const nb::gil_scoped_release free;
      if (store.drain(kSliceMs)) return true;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
  return false;
}

nb::object arena(nb::object self, uint32_t shape_class) {
  Store& store = nb::cast<Store&>(self);
  const auto slots = static_cast<size_t>(store.device_slots(shape_class));
  const size_t bytes = store.format(shape_class).slot_bytes;
  const bool cuda = store.device().is_cuda();
  return nb::cast(nb::ndarray<uint8_t>(store.arena(shape_class), {slots, bytes}, self, {}, nb::dtype<uint8_t>(),
                                       cuda ? nb::device::cuda::value : nb::device::cpu::value,
                                       cuda ? store.device().ordinal() : 0),
                  nb::rv_policy::reference);
}

/// The encoded bytes of a block of a store in memory, to be written.
nb::object slab(nb::object self, uint32_t b) {
  Store& store = nb::cast<Store&>(self);
  const size_t bytes = store.format(store.block(b).shape_class).block_bytes;
  return nb::cast(nb::ndarray<uint8_t>(store.slab(b), {bytes}, self, {}, nb::dtype<uint8_t>(), nb::device::cpu::value),
                  nb::rv_policy::reference);
}

/// Nanoseconds that demand + slots, and release, of blocks on the device take here, without Python.
std::pair<std::vector<int64_t>, std::vector<int64_t>> time_hits(Store& store, const std::vector<uint32_t>& blocks,
                                                               int rounds, uintptr_t stream) {
  std::vector<int64_t> acquire_ns, release_ns;
  for (int i = 0; i < rounds; ++i) {
    const int64_t begin = now_ns();
    if (!store.demand(blocks)) {
      store.release(blocks, stream);
      throw StoreFailure(StoreFailure::Kind::Config, "the experts to time are not on the device: acquire them first");
    }
    store.slots(blocks, stream);
    const int64_t middle = now_ns();
    store.release(blocks, stream);
    release_ns.push_back(now_ns() - middle);
    acquire_ns.push_back(middle - begin);
  }
  return {acquire_ns, release_ns};
}

nb::list timeline(const Store& store) {
  nb::list out;
  for (const Span& span : store.timeline()) {
    out.append(nb::make_tuple(span.begin_ns, span.end_ns, span.block, span.kind, span.level, span.status, span.bytes));
  }
  return out;
}

nb::dict stats(const Store& store) {
  nb::dict out = counters_dict(store.counters());
  const StoreCounters own = store.store_counters();
  out["acquires"] = own.acquires;
  out["stalls"] = own.stalls;
  out["stall_ns"] = own.stall_ns;
  out["failures"] = own.failures;
  out["followed"] = own.followed;
  out["lost"] = own.lost;
  out["unworthy"] = own.unworthy;
  out["forecasts_judged"] = own.forecasts.said;
  out["forecasts_stated"] = own.forecasts.stated;
  out["forecasts_true"] = own.forecasts.used;
  out["device_bytes"] = store.device_bytes();
  out["host_bytes"] = store.host_bytes();
  return out;
}

const char* const kAsked[] = {"queued", "merged", "demanded", "resident", "stale", "refused"};
const char* const kPlaces[] = {"ABSENT", "LOADING", "PRESENT"};

std::vector<Foreknown> foreknown(const Column<uint32_t>& blocks, const Column<double>& p,
                                 const Column<int64_t>& deadlines) {
  if (p.size() != blocks.size() || deadlines.size() != blocks.size()) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "blocks, p and deadlines of forecasts must be of one length: there are " +
                           std::to_string(blocks.size()) + ", " + std::to_string(p.size()) + " and " +
                           std::to_string(deadlines.size()));
  }
  std::vector<Foreknown> all;
  all.reserve(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) all.push_back({blocks(i), p(i), deadlines(i), Target::Device});
  return all;
}

}  // namespace

void bind_store(nb::module_& m) {
  using namespace nb::literals;
  m.def("cuda_devices", &cuda_devices, "How many CUDA devices there are; 0 without a driver.");
  nb::class_<Store>(m, "Store", "The threaded expert store; see specgate.runtime.store.ExpertStore.")
      .def(
          "__init__",
          [](Store* self, std::vector<std::string> paths, const std::vector<BlockTuple>& blocks,
             std::vector<BlockFormat> formats, std::vector<int64_t> device_slots, std::vector<int64_t> host_slots,
             std::string eviction, std::string host_eviction, int64_t max_pending, int64_t max_reads,
             int64_t prefetch_copy_bytes, int64_t prefetch_read_bytes, double half_life, int device, bool poison,
             size_t timeline, int workers, const std::string& reader, bool direct, int depth, int threads,
             std::vector<FaultTuple> faults, bool in_memory, const std::vector<uintptr_t>& memory,
             int64_t piece_bytes, double price_scale, double price_floor, int64_t prefetch_depth, bool trust) {
            StoreConfig config;
            config.paths = std::move(paths);
            config.blocks = stored_blocks(blocks);
            for (const uintptr_t at : memory) config.memory.push_back(reinterpret_cast<std::byte*>(at));
            config.formats = std::move(formats);
            config.device_slots = std::move(device_slots);
            config.host_slots = std::move(host_slots);
            config.eviction = std::move(eviction);
            config.host_eviction = std::move(host_eviction);
            config.ledger = {max_pending, max_reads, prefetch_copy_bytes, prefetch_read_bytes, half_life, in_memory};
            config.device = device;
            config.poison = poison;
            config.timeline = timeline;
            config.workers = workers;
            if (piece_bytes < 0) {
              throw StoreFailure(StoreFailure::Kind::Config,
                                 "piece_bytes=" + std::to_string(piece_bytes) + " must be 0 or more");
            }
            config.piece_bytes = static_cast<size_t>(piece_bytes);
            config.price_scale = price_scale;
            config.price_floor = price_floor;
            config.trust = trust;
            config.prefetch_depth = prefetch_depth;
            config.reader.backend = backend_of(reader);
            config.reader.direct = direct;
            config.reader.depth = depth;
            config.reader.threads = threads;
            config.reader.fault = faults_of(std::move(faults));
            const nb::gil_scoped_release free;
            new (self) Store(std::move(config));
          },
          "paths"_a, "blocks"_a, "formats"_a, "device_slots"_a, "host_slots"_a, nb::kw_only(), "eviction"_a = "lru",
          "host_eviction"_a = "lru", "max_pending"_a = 1024, "max_reads"_a = 8,
          "prefetch_copy_bytes"_a = int64_t{64} << 20, "prefetch_read_bytes"_a = int64_t{64} << 20,
          "half_life"_a = 64.0, "device"_a = -1, "poison"_a = false, "timeline"_a = 0, "workers"_a = 2,
          "reader"_a = "auto", "direct"_a = true, "depth"_a = 32, "threads"_a = 4,
          "faults"_a = std::vector<FaultTuple>{}, "in_memory"_a = false,
          "memory"_a = std::vector<uintptr_t>{}, "piece_bytes"_a = int64_t{4} << 20, "price_scale"_a = -1.0, "price_floor"_a = 0.0,
          "prefetch_depth"_a = 0, "trust"_a = false)
      .def("acquire", &acquire, "blocks"_a, "stream"_a = 0)
      .def("release", &Store::release, "blocks"_a, "stream"_a = 0, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "prefetch",
          [](Store& self, uint32_t block, double p, int64_t deadline, bool host) {
            const nb::gil_scoped_release free;
            return kAsked[static_cast<int>(self.prefetch(block, p, deadline, host ? Target::Host : Target::Device))];
          },
          "block"_a, "p"_a, "deadline"_a, "host"_a = false)
      .def(
          "prefetch_all",
          [](Store& self, const std::vector<std::tuple<uint32_t, double, int64_t>>& foreknown) {
            std::vector<Foreknown> all;
            all.reserve(foreknown.size());
            for (const auto& [block, p, deadline] : foreknown) all.push_back({block, p, deadline, Target::Device});
            const nb::gil_scoped_release free;
            self.prefetch_all(all);
          },
          "foreknown"_a)
      .def(
          "prefetch_many",
          [](Store& self, const Column<uint32_t>& blocks, const Column<double>& p, const Column<int64_t>& deadlines) {
            const std::vector<Foreknown> all = foreknown(blocks, p, deadlines);
            const nb::gil_scoped_release free;
            self.prefetch_all(all);
          },
          "blocks"_a, "p"_a, "deadlines"_a)
      .def(
          "foresee",
          [](Store& self, const Column<uint32_t>& blocks, const Column<double>& p, const Column<int64_t>& deadlines) {
            std::vector<Foreknown> all = foreknown(blocks, p, deadlines);
            const nb::gil_scoped_release free;
            self.foresee(std::move(all));
          },
          "blocks"_a, "p"_a, "deadlines"_a)
      .def("follow",
           [](Store& self, std::shared_ptr<ForecastRing> ring, uint32_t first_block, uint32_t experts,
              uint32_t layers) { self.follow(std::move(ring), first_block, experts, layers); },
           "ring"_a, "first_block"_a, "experts"_a, "layers"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("unfollow", &Store::unfollow, nb::call_guard<nb::gil_scoped_release>())
      .def("advance", &Store::advance, "now"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("drain", &drain, "seconds"_a = 60.0, "Waits until nothing moves; False after so many seconds.")
      .def("close", &Store::close, nb::call_guard<nb::gil_scoped_release>())
      .def("closed", &Store::closed)
      .def("arena", [](nb::handle self, uint32_t c) { return arena(nb::borrow(self), c); }, "shape_class"_a = 0)
      .def("slab", [](nb::handle self, uint32_t b) { return slab(nb::borrow(self), b); }, "block"_a)
      .def("state",
           [](const Store& self, uint32_t b) {
             const Block block = self.block(b);
             return nb::make_tuple(kPlaces[static_cast<int>(block.device)], block.slot, block.pins,
                                   kPlaces[static_cast<int>(block.host)], block.slab);
           })
      .def("time_hits", &time_hits, "blocks"_a, "rounds"_a, "stream"_a = 0, nb::call_guard<nb::gil_scoped_release>())
      .def("stats", &stats)
      .def("timeline", &timeline)
      .def("reader_backend", &Store::reader_backend)
      .def("set_weights", &Store::set_weights)
      .def("set_future", &Store::set_future)
      .def(
          "set_reuse",
          [](Store& self, uint32_t experts, double half_life, double discount, double intercept, double slope) {
            self.set_reuse({experts, half_life, discount, intercept, slope});
          },
          "experts"_a, "half_life"_a, "discount"_a, "intercept"_a, "slope"_a)
      .def("invariants", &Store::check);
}

}  // namespace specgate
