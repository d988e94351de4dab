#include "read_queue.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "crc32c.h"
#include "read_plan.h"

namespace specgate {
namespace {

[[noreturn]] void config(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

}  // namespace

int64_t steady_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

ReadQueue::ReadQueue(const std::vector<std::string>& paths, const FileReader::Options& options,
                     FileReader::Done done)
    : context_(options), done_(std::move(done)) {
  for (const std::string& path : paths) {
    context_.files.push_back(std::make_unique<OpenFile>(path, options.direct));
  }
}

/// Throws for what no file could satisfy: the caller's mistake.
void ReadQueue::check(const ReadRequest& request) const {
  const std::string name = "read request " + std::to_string(request.id);
  for (const Segment& segment : request.segments) {
    if (segment.file < 0 || static_cast<std::size_t>(segment.file) >= context_.files.size()) {
      config(name + " asks for file " + std::to_string(segment.file) + " of " +
             std::to_string(context_.files.size()) + ": give a position in the list of paths");
    }
    if (segment.at > request.capacity || segment.length > request.capacity - segment.at) {
      config(name + " puts " + std::to_string(segment.length) + " bytes at " + std::to_string(segment.at) +
             " of a destination of " + std::to_string(request.capacity) + " bytes: give it more room");
    }
    if (segment.length != 0 && request.destination == nullptr) {
      config(name + " has no destination: give it one");
    }
  }
}

/// A sentence if a file is too short for the request.
std::string ReadQueue::beyond_end(const ReadRequest& request) const {
  for (const Segment& segment : request.segments) {
    const OpenFile& file = *context_.files[segment.file];
    if (segment.offset <= file.size() && segment.length <= file.size() - segment.offset) continue;
    std::string changed = file.changed();
    if (!changed.empty()) return changed;
    return "'" + file.path() + "' has " + std::to_string(file.size()) + " bytes and " +
           std::to_string(segment.length) + " were asked for at byte " + std::to_string(segment.offset) +
           ": it is incomplete or its index is another file's, make it again";
  }
  return {};
}

void ReadQueue::submit(ReadRequest request) {
  check(request);
  auto made = std::make_unique<Pending>();
  Pending* const pending = made.get();
  pending->request = std::move(request);
  pending->error = beyond_end(pending->request);
  if (!pending->error.empty()) {
    pending->state = Pending::Failed;
  } else {
    for (const Segment& s : pending->request.segments) {
      const OpenFile& file = *context_.files[s.file];
      std::byte* const to = pending->request.destination + s.at;
      for (const Piece& piece : plan_reads(s.offset, s.length, reinterpret_cast<uintptr_t>(to), file.direct(),
                                           file.memory_alignment(), context_.options.chunk)) {
        pending->transfers.emplace_back(pending, s.file, piece.offset, piece.length,
                                        to + (piece.offset - s.offset));
      }
    }
  }
  const std::size_t transfers = pending->transfers.size();
  {
    const std::lock_guard lock(mutex_);
    if (closed_) {
      throw StoreFailure(StoreFailure::Kind::Closed,
                         "the file reader is closed: submit reads before closing it");
    }
    const uint64_t id = pending->request.id;
    if (!live_.try_emplace(id, std::move(made)).second) {
      config("read request " + std::to_string(id) +
             " is under way already: give each request an id of its own");
    }
    ++counts_.submitted;
    if (transfers == 0) {
      reports_.push_back(pending);
    } else {
      queue_.push_back(pending);
      pending->place = std::prev(queue_.end());
      pending->queued = true;
    }
  }
  if (transfers <= 1)
    changed_.notify_one();
  else
    changed_.notify_all();
}

ReadQueue::Work ReadQueue::take_locked() {
  if (!reports_.empty()) {
    Pending* const pending = reports_.front();
    reports_.pop_front();
    return {nullptr, pending};
  }
  if (queue_.empty()) return {};
  Pending* const pending = queue_.front();
  if (pending->next == 0) pending->started_ns = steady_ns();
  Transfer* const transfer = &pending->transfers[pending->next++];
  ++pending->running;
  if (pending->next == pending->transfers.size()) unqueue(pending);
  return {transfer, nullptr};
}

ReadQueue::Work ReadQueue::take() {
  const std::lock_guard lock(mutex_);
  return take_locked();
}

ReadQueue::Work ReadQueue::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return closed_ || !reports_.empty() || !queue_.empty(); });
  return take_locked();
}

bool ReadQueue::drained() {
  const std::lock_guard lock(mutex_);
  return closed_ && reports_.empty() && queue_.empty();
}

void ReadQueue::unqueue(Pending* pending) {
  if (!pending->queued) return;
  queue_.erase(pending->place);
  pending->queued = false;
}

/// No more of its transfers begin. If none runs, some thread has to report it.
void ReadQueue::drop(Pending* pending, Pending::State state) {
  pending->state.store(state, std::memory_order_release);
  unqueue(pending);
  dropped_.fetch_add(1, std::memory_order_acq_rel);
}

bool ReadQueue::cancel(uint64_t id) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(id);
    if (found == live_.end()) return false;
    Pending* const pending = found->second.get();
    if (pending->state == Pending::Cancelled) return true;
    if (!pending->active()) return false;
    const bool waits_for_report = pending->transfers.empty();
    drop(pending, Pending::Cancelled);
    if (pending->running == 0 && !waits_for_report) reports_.push_back(pending);
  }
  changed_.notify_one();
  return true;
}

void ReadQueue::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    for (auto& [id, pending] : live_) {
      if (!pending->active()) continue;
      const bool waits_for_report = pending->transfers.empty();
      drop(pending.get(), Pending::Cancelled);
      if (pending->running == 0 && !waits_for_report) reports_.push_back(pending.get());
    }
  }
  changed_.notify_all();
}

void ReadQueue::close_files() {
  for (const auto& file : context_.files) file->close();
}

void ReadQueue::finish(Transfer* transfer) {
  Pending* const pending = transfer->owner();
  transfer->finish(context_, pending->request.crc && pending->active());
  {
    const std::lock_guard lock(mutex_);
    if (!transfer->error().empty() && pending->active()) {
      pending->error = transfer->error();
      pending->kind = transfer->kind();
      drop(pending, Pending::Failed);
    }
    if (--pending->running != 0 || pending->queued) return;
    if (pending->active()) pending->state.store(Pending::Deciding, std::memory_order_release);
  }
  report(pending);
}

/// All bytes have come: are they of the files that were opened, and are they whole?
void ReadQueue::verify(Pending* pending, ReadResult& result) const {
  const std::vector<Segment>& segments = pending->request.segments;
  for (std::size_t i = 0; i < segments.size() && result.error.empty(); ++i) {
    const auto same = [&](const Segment& s) { return s.file == segments[i].file; };
    if (std::find_if(segments.begin(), segments.begin() + i, same) != segments.begin() + i) continue;
    result.error = context_.files[segments[i].file]->changed();
  }
  if (!result.error.empty() || !pending->request.crc) return;
  uint32_t crc = 0;
  for (const Transfer& transfer : pending->transfers) {
    crc = crc32c_combine(crc, transfer.crc(), transfer.length());
  }
  if (crc == *pending->request.crc) return;
  result.kind = StoreFailure::Kind::Corrupt;
  const std::string path = segments.empty() ? "" : context_.files[segments[0].file]->path();
  const uint64_t begin = segments.empty() ? 0 : segments[0].offset;
  result.error = "'" + path + "' holds damaged bytes at byte " + std::to_string(begin) + " (checksum " +
                 hex(crc) + ", expected " + hex(*pending->request.crc) + "): copy or make the file again";
}

void ReadQueue::report(Pending* pending) {
  ReadResult result;
  result.id = pending->request.id;
  result.started_ns = pending->started_ns;
  {
    const std::lock_guard lock(mutex_);  // a request without reads may still be cancelled up to here
    if (pending->active()) pending->state.store(Pending::Deciding, std::memory_order_release);
  }
  const int state = pending->state.load(std::memory_order_acquire);
  if (state == Pending::Deciding) {
    verify(pending, result);
  } else if (state == Pending::Failed) {
    result.kind = pending->kind;
    result.error = std::move(pending->error);
  }
  if (state == Pending::Cancelled)
    result.status = ReadResult::Cancelled;
  else
    result.status = result.error.empty() ? ReadResult::Ok : ReadResult::Failed;
  std::unique_ptr<Pending> last;  // freed after the lock
  {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(result.id);
    last = std::move(found->second);
    live_.erase(found);
    if (result.status == ReadResult::Ok) {
      ++counts_.ok;
      for (const Transfer& transfer : last->transfers) counts_.bytes_wanted += transfer.length();
    } else {
      ++(result.status == ReadResult::Failed ? counts_.failed : counts_.cancelled);
    }
  }
  result.finished_ns = steady_ns();
  done_(std::move(result));
}

ReadStats ReadQueue::stats() const {
  ReadStats stats;
  {
    const std::lock_guard lock(mutex_);
    stats = counts_;
    for (const auto& [id, pending] : live_) ++(pending->started_ns == 0 ? stats.queued : stats.running);
  }
  stats.reads = context_.reads;
  stats.direct_reads = context_.direct_reads;
  stats.retries = context_.retries;
  stats.bytes = context_.bytes;
  stats.bytes_bounced = context_.bounced;
  stats.in_flight = context_.in_flight;
  stats.peak_in_flight = context_.peak;
  return stats;
}

}  // namespace specgate
