// The file tier for Python: the checksum, and the file reader by itself, for tests and measurements.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <unordered_map>

#include "bind.h"
#include "crc32c.h"
#include "error.h"
#include "file_reader.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace specgate {

namespace {

constexpr std::chrono::milliseconds kSlice{50};     // between looks for Ctrl-C
constexpr std::size_t kWorthReleasing = 256 << 10;  // bytes of a checksum for which the GIL is given away

using Readable = nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>;
using Writable = nb::ndarray<nb::device::cpu, nb::c_contig>;
using SegmentTuple = std::tuple<int, uint64_t, uint64_t, uint64_t>;    // file, offset, length, at
using FaultTuple = std::tuple<int, uint64_t, int, uint64_t, int64_t>;  // file, offset, errno, limit, times

FileReader::Options::Backend backend_of(const std::string& text) {
  if (text == "auto") return FileReader::Options::Auto;
  if (text == "io_uring") return FileReader::Options::Uring;
  if (text == "pread") return FileReader::Options::Pread;
  throw StoreFailure(StoreFailure::Kind::Config,
                     "backend=" + text + " is unknown: choose auto, io_uring or pread");
}

/// The next `times` reads that cover byte `offset` of a file fail with `errno`, or end after `limit` bytes.
std::function<ReadFault(int, uint64_t, uint64_t)> faults_of(const std::vector<FaultTuple>& tuples) {
  if (tuples.empty()) return {};
  struct Rule {
    explicit Rule(const FaultTuple& t) : tuple(t), left(std::get<4>(t)) {}
    FaultTuple tuple;
    std::atomic<int64_t> left;
  };
  std::vector<std::shared_ptr<Rule>> rules;
  for (const FaultTuple& tuple : tuples) rules.push_back(std::make_shared<Rule>(tuple));
  return [rules](int file, uint64_t offset, uint64_t length) {
    for (const auto& rule : rules) {
      const auto& [its_file, at, error, limit, times] = rule->tuple;
      if (file == its_file && offset <= at && at - offset < length && rule->left.fetch_sub(1) > 0) {
        return ReadFault{error, limit};
      }
    }
    return ReadFault{};
  };
}

uint32_t checksum(const Readable& buffer, uint32_t seed) {
  const void* const data = buffer.data();
  const std::size_t bytes = buffer.nbytes();
  if (bytes < kWorthReleasing) return crc32c(data, bytes, seed);
  const nb::gil_scoped_release free;
  return crc32c(data, bytes, seed);
}

/// A FileReader that keeps its reports, and the memory they are about, until they are asked for.
class CollectingReader {
 public:
  CollectingReader(const std::vector<std::string>& paths, const FileReader::Options& options)
      : reader_(paths, options, [this](ReadResult&& result) {
          const std::lock_guard lock(mutex_);
          results_.push_back(std::move(result));
          changed_.notify_all();
        }) {}

  /// Under the GIL, as wait(): nobody sees a report before its memory is noted.
  void submit(uint64_t id, const std::vector<SegmentTuple>& segments, Writable destination,
              std::optional<uint32_t> crc) {
    if (kept_.count(id) != 0) {
      throw StoreFailure(
          StoreFailure::Kind::Config,
          "read request " + std::to_string(id) +
              " has not been collected yet: wait for it, or give each request an id of its own");
    }
    ReadRequest request{id, {}, static_cast<std::byte*>(destination.data()), destination.nbytes(), crc};
    for (const auto& [file, offset, length, at] : segments) {
      request.segments.push_back({file, offset, length, at});
    }
    reader_.submit(std::move(request));
    kept_.emplace(id, std::move(destination));
  }

  /// Reports since the last call; waits until there is one, at most `timeout` seconds (without: as long as
  /// needed).
  std::vector<ReadResult> wait(std::optional<double> timeout) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      std::chrono::duration<double> slice = kSlice;
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (timeout) slice = std::min(slice, std::chrono::duration<double>(*timeout) - waited);
      std::vector<ReadResult> results = collect(slice);
      for (const ReadResult& result : results) kept_.erase(result.id);
      if (!results.empty() || kept_.empty() || (timeout && slice.count() <= 0)) return results;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

  void close() {
    const nb::gil_scoped_release free;
    reader_.close();
  }

  FileReader& reader() { return reader_; }

 private:
  std::vector<ReadResult> collect(std::chrono::duration<double> slice) {
    const nb::gil_scoped_release free;
    std::unique_lock lock(mutex_);
    if (slice.count() > 0) changed_.wait_for(lock, slice, [this] { return !results_.empty(); });
    std::vector<ReadResult> results(std::make_move_iterator(results_.begin()),
                                    std::make_move_iterator(results_.end()));
    results_.clear();
    return results;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<ReadResult> results_;
  std::unordered_map<uint64_t, Writable> kept_;
  FileReader reader_;  // last: its threads use the rest
};

/// Reads a file from its beginning to its end in requests of `block` bytes, one per buffer under way; each
/// next one is submitted by the report of the one before, as the store does. Seconds from the first
/// submission to the last report.
double stream(const std::string& path, const FileReader::Options& options, uint64_t block,
              const std::vector<Writable>& buffers, const std::vector<uint32_t>& checksums) {
  std::mutex mutex;
  std::condition_variable changed;
  std::string error;
  std::size_t idle = 0;  // buffers with nothing more to read
  std::atomic<uint64_t> next{0};
  FileReader* reader = nullptr;
  uint64_t size = 0;
  const auto submit = [&](uint64_t buffer) {
    const uint64_t at = next.fetch_add(block);
    if (at >= size) return false;
    std::optional<uint32_t> crc;
    if (!checksums.empty()) crc = checksums.at(at / block);
    const Segment segment{0, at, std::min(block, size - at), 0};
    auto* const destination = static_cast<std::byte*>(buffers[buffer].data());
    reader->submit({buffer, {segment}, destination, buffers[buffer].nbytes(), crc});
    return true;
  };
  FileReader made({path}, options, [&](ReadResult&& result) {
    if (result.status == ReadResult::Ok && submit(result.id)) return;
    const std::lock_guard lock(mutex);
    if (result.status != ReadResult::Ok) error = result.error;
    ++idle;
    changed.notify_all();
  });
  reader = &made;
  size = made.size(0);
  const uint64_t blocks = (size + block - 1) / block;
  if (!checksums.empty() && checksums.size() != blocks) {
    throw StoreFailure(StoreFailure::Kind::Config, std::to_string(checksums.size()) +
                                                       " checksums were given for " + std::to_string(blocks) +
                                                       " blocks: give one for each");
  }
  const auto start = std::chrono::steady_clock::now();
  std::size_t never = 0;
  for (std::size_t buffer = 0; buffer < buffers.size(); ++buffer) never += !submit(buffer);
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return idle + never == buffers.size(); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  if (!error.empty()) throw StoreFailure(StoreFailure::Kind::Io, error);
  return seconds.count();
}

double time_reading(const std::string& path, uint64_t block, const std::vector<Writable>& buffers,
                    const std::vector<uint32_t>& checksums, const std::string& backend, int depth,
                    int threads, uint64_t chunk) {
  FileReader::Options options;
  options.backend = backend_of(backend);
  options.depth = depth;
  options.threads = threads;
  options.chunk = chunk;
  for (const Writable& buffer : buffers) {
    if (block == 0 || buffer.nbytes() < block) {
      throw StoreFailure(StoreFailure::Kind::Config,
                         "a buffer of " + std::to_string(buffer.nbytes()) + " bytes cannot take blocks of " +
                             std::to_string(block) + ": give buffers of a block each");
    }
  }
  const nb::gil_scoped_release free;
  return stream(path, options, block, buffers, checksums);
}

const char* status_name(const ReadResult& result) {
  switch (result.status) {
    case ReadResult::Ok:
      return "ok";
    case ReadResult::Failed:
      return "failed";
    default:
      return "cancelled";
  }
}

nb::dict stats_of(CollectingReader& self) {
  const ReadStats stats = self.reader().stats();
  nb::dict d;
  d["submitted"] = stats.submitted;
  d["ok"] = stats.ok;
  d["failed"] = stats.failed;
  d["cancelled"] = stats.cancelled;
  d["reads"] = stats.reads;
  d["direct_reads"] = stats.direct_reads;
  d["retries"] = stats.retries;
  d["bytes"] = stats.bytes;
  d["bytes_wanted"] = stats.bytes_wanted;
  d["bytes_bounced"] = stats.bytes_bounced;
  d["queued"] = stats.queued;
  d["running"] = stats.running;
  d["in_flight"] = stats.in_flight;
  d["peak_in_flight"] = stats.peak_in_flight;
  return d;
}

}  // namespace

void bind_file(nb::module_& m) {
  m.def("crc32c", &checksum, "buffer"_a.noconvert(), "seed"_a = 0,
        "CRC-32C of a contiguous buffer; seed: the checksum of the bytes before it.");
  m.def("crc32c_backend", &crc32c_backend, "sse4.2 or tables.");

  m.def(
      "time_reading", &time_reading, "path"_a, "block"_a, "buffers"_a.noconvert(),
      "checksums"_a = std::vector<uint32_t>{}, "backend"_a = "auto", "depth"_a = 32, "threads"_a = 4,
      "chunk"_a = uint64_t{1} << 20,
      "Seconds to read a whole file in requests of `block` bytes, one under way per buffer, without Python.");

  nb::class_<ReadResult>(m, "ReadResult", "How one read request ended.")
      .def_ro("id", &ReadResult::id)
      .def_prop_ro("status", &status_name, "ok, failed or cancelled")
      .def_ro("error", &ReadResult::error, "One sentence if it failed, else empty.")
      .def_prop_ro("corrupt",
                   [](const ReadResult& r) {
                     return r.status == ReadResult::Failed && r.kind == StoreFailure::Kind::Corrupt;
                   })
      .def_ro("started_ns", &ReadResult::started_ns, "Steady clock; 0 if no read of it began.")
      .def_ro("finished_ns", &ReadResult::finished_ns)
      .def("__repr__", [](const ReadResult& r) {
        return "ReadResult(id=" + std::to_string(r.id) + ", status='" + status_name(r) + "'" +
               (r.error.empty() ? "" : ", error=\"" + r.error + "\"") + ")";
      });

  nb::class_<CollectingReader>(m, "FileReader", "Reads pieces of files into memory, many at a time.")
      .def(
          "__init__",
          [](CollectingReader* self, const std::vector<std::string>& paths, const std::string& backend,
             bool direct, int depth, int threads, uint64_t chunk, const std::vector<FaultTuple>& faults) {
            FileReader::Options options;
            options.backend = backend_of(backend);
            options.direct = direct;
            options.depth = depth;
            options.threads = threads;
            options.chunk = chunk;
            options.fault = faults_of(faults);
            new (self) CollectingReader(paths, options);
          },
          "paths"_a, "backend"_a = "auto", "direct"_a = true, "depth"_a = 32, "threads"_a = 4,
          "chunk"_a = uint64_t{1} << 20, "faults"_a = std::vector<FaultTuple>{},
          "backend: auto, io_uring or pread. faults, for tests: (file, offset, errno, limit, times), see "
          "csrc/bind_file.cpp.")
      .def("submit", &CollectingReader::submit, "id"_a, "segments"_a, "destination"_a.noconvert(),
           "crc"_a = nb::none(),
           "Queues a request: segments of (file, offset, length, at) into a writable contiguous buffer, "
           "which is "
           "kept until its result is collected.")
      .def("wait", &CollectingReader::wait, "timeout"_a = nb::none(),
           "Results since the last call, at least one unless `timeout` seconds pass or none is due.")
      .def(
          "poll", [](CollectingReader& self) { return self.wait(0.0); }, "Results since the last call.")
      .def(
          "cancel", [](CollectingReader& self, uint64_t id) { return self.reader().cancel(id); }, "id"_a,
          "Whether the request will be reported as cancelled.")
      .def("close", &CollectingReader::close,
           "Cancels all requests, waits for their ends, joins the threads. Results can still be collected.")
      .def("stats", &stats_of)
      .def(
          "size", [](CollectingReader& self, int file) { return self.reader().size(file); }, "file"_a)
      .def(
          "direct", [](CollectingReader& self, int file) { return self.reader().direct(file); }, "file"_a,
          "Whether reads of the file pass by the page cache.")
      .def_prop_ro("backend", [](CollectingReader& self) { return self.reader().backend(); })
      .def_prop_ro(
          "fallback", [](CollectingReader& self) { return self.reader().fallback(); },
          "Why auto chose pread, or empty.")
      .def("__enter__", [](nb::object self) { return self; })
      .def("__exit__", [](CollectingReader& self, nb::args) { self.close(); });
}

}  // namespace specgate
