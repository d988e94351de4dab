// Reads pieces of files into memory, many at a time: the file tier of the expert store.
//
// Linux only. The reads are made by io_uring where the kernel lets it be used, else by a few threads that
// call pread. Where offset, length and destination allow, they pass by the page cache (O_DIRECT); see
// read_plan.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "error.h"

namespace specgate {

class ReadEngine;
class ReadQueue;

/// Bytes [offset, offset + length) of a file, to be placed at `at` bytes from the request's destination.
struct Segment {
  int file = 0;  ///< position in the list of paths
  uint64_t offset = 0, length = 0;
  uint64_t at = 0;
};

struct ReadRequest {
  uint64_t id = 0;  ///< the caller's; unique among the requests not yet reported
  std::vector<Segment> segments;
  std::byte* destination = nullptr;  ///< must stay until the request is reported
  uint64_t capacity = 0;             ///< bytes from `destination` that may be written
  std::optional<uint32_t> crc;       ///< CRC-32C of the segments' bytes, in the order given
};

struct ReadResult {
  enum Status { Ok, Failed, Cancelled };

  uint64_t id = 0;
  Status status = Ok;
  StoreFailure::Kind kind = StoreFailure::Kind::Io;  ///< of a failure: Io, Corrupt or Memory
  std::string error;                                 ///< of a failure: one sentence that names the file
  int64_t started_ns = 0;   ///< std::chrono::steady_clock when its first read began; 0: none did
  int64_t finished_ns = 0;  ///< and just before this report
};

/// What to pretend of one read, in tests.
struct ReadFault {
  int error = 0;                ///< the read fails with this errno
  uint64_t limit = UINT64_MAX;  ///< the read ends after so many bytes
};

/// Counts since the reader was made, and what is under way now.
struct ReadStats {
  uint64_t submitted = 0, ok = 0, failed = 0, cancelled = 0;  ///< requests
  uint64_t reads = 0, direct_reads = 0, retries = 0;          ///< reads asked of the kernel
  uint64_t bytes = 0;                                         ///< read, repeated and padding bytes included
  uint64_t bytes_wanted = 0;                                  ///< delivered by requests that ended Ok
  uint64_t bytes_bounced = 0;                  ///< that went through an aligned buffer of the reader's own
  uint64_t queued = 0;                         ///< requests not yet begun
  uint64_t running = 0;                        ///< requests begun and not yet reported
  uint64_t in_flight = 0, peak_in_flight = 0;  ///< reads
};

class FileReader {
 public:
  struct Options {
    enum Backend { Auto, Uring, Pread };

    Backend backend = Auto;
    bool direct = true;  ///< O_DIRECT where the file system allows it
    int depth = 32;      ///< io_uring: reads in flight
    int threads = 4;     ///< pread: reads in flight; io_uring: threads that check sums and copy, beside one
    uint64_t chunk = 1 << 20;  ///< the longest single read, bytes, a multiple of 4096
    /// Tests only: asked before each read (file, offset, length) what to pretend. Called from reader threads.
    std::function<ReadFault(int, uint64_t, uint64_t)> fault;
  };

  /// Called once per request, from a reader thread; must not throw. It may submit and cancel, not destroy.
  using Done = std::function<void(ReadResult&&)>;

  /// Opens all files. Throws StoreFailure(Io) if one is missing or no regular file, StoreFailure(Config) for
  /// options that make no sense or Uring where the kernel refuses it.
  FileReader(std::vector<std::string> paths, Options options, Done done);
  /// close(). In a child made by fork, which has none of the threads, everything is left as it is.
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  /// Queues a request, first in, first out; from any thread; waits for no read. Throws StoreFailure(Config)
  /// for a request that no file could satisfy (nothing is queued then), StoreFailure(Closed) after close().
  void submit(ReadRequest request);
  /// True if the request will be reported as Cancelled (which may happen before this returns): its reads that
  /// have not begun never will, those under way are waited for. False if it is unknown, reported or already
  /// decided otherwise.
  bool cancel(uint64_t id);
  /// Cancels everything, waits for all reports, joins the threads and closes the files. From any thread but a
  /// reader's; again does nothing.
  void close();

  ReadStats stats() const;
  const char* backend() const;          ///< "io_uring" or "pread"
  const std::string& fallback() const;  ///< why Auto chose pread, or empty
  bool direct(int file) const;          ///< whether reads of it pass by the page cache, as far as known yet
  uint64_t size(int file) const;        ///< bytes when opened

 private:
  std::string fallback_;
  std::unique_ptr<ReadQueue> queue_;
  std::unique_ptr<ReadEngine> engine_;
  std::once_flag closed_;
  const int process_;
};

}  // namespace specgate
