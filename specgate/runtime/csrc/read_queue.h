// The requests of one reader: queued, under way, reported once each. Threads of an engine take work from it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "file_reader.h"
#include "transfer.h"

namespace specgate {

/// One request from submit() to its report.
struct Pending {
  enum State { Active, Cancelled, Failed, Deciding };

  ReadRequest request;
  std::vector<Transfer> transfers;
  std::size_t next = 0;     // the first transfer not yet taken
  std::size_t running = 0;  // taken and not finished
  bool queued = false;      // has transfers to take, and `place` is its position in the queue
  std::list<Pending*>::iterator place;
  std::atomic<int> state{Active};  // changed under the queue's mutex, read without
  StoreFailure::Kind kind = StoreFailure::Kind::Io;
  std::string error;
  int64_t started_ns = 0;

  bool active() const { return state.load(std::memory_order_acquire) == Active; }
};

/// Drives transfers, on threads of its own.
class ReadEngine {
 public:
  virtual ~ReadEngine() = default;
  virtual const char* name() const = 0;
  /// There is something new: work, a cancellation or the end. Does not wait.
  virtual void wake() = 0;
  /// Joins the threads, which end once the queue is closed and empty. Again does nothing.
  virtual void stop() = 0;
};

class ReadQueue {
 public:
  /// What a thread is to do: drive a transfer, or report a request of which nothing is under way.
  struct Work {
    Transfer* transfer = nullptr;
    Pending* report = nullptr;
    explicit operator bool() const { return transfer != nullptr || report != nullptr; }
  };

  ReadQueue(const std::vector<std::string>& paths, const FileReader::Options& options, FileReader::Done done);

  // For FileReader. cancel(): whether the request will be reported as Cancelled.
  void submit(ReadRequest request);
  bool cancel(uint64_t id);
  void close();
  void close_files();  ///< once no thread reads
  const OpenFile& file(int file) const { return *context_.files.at(static_cast<std::size_t>(file)); }
  ReadStats stats() const;

  // For engines.
  TransferContext& context() { return context_; }
  Work take();     ///< nothing, if there is nothing to do now
  Work wait();     ///< waits; nothing, if there never will be
  bool drained();  ///< closed, and nothing is left to take
  void finish(
      Transfer* transfer);  ///< after its end, or when its request is no longer active; reports the last
  void report(Pending* pending);
  /// Grows with every request that ends before all of its transfers do: some of those may be cancelled.
  uint64_t dropped() const { return dropped_.load(std::memory_order_acquire); }

 private:
  void check(const ReadRequest& request) const;
  std::string beyond_end(const ReadRequest& request) const;
  Work take_locked();
  void unqueue(Pending* pending);
  void drop(Pending* pending, Pending::State state);
  void verify(Pending* pending, ReadResult& result) const;

  TransferContext context_;
  const FileReader::Done done_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<uint64_t, std::unique_ptr<Pending>> live_;
  std::list<Pending*> queue_;
  std::deque<Pending*> reports_;
  std::atomic<uint64_t> dropped_{0};
  ReadStats counts_;
  bool closed_ = false;
};

int64_t steady_ns();

}  // namespace specgate
