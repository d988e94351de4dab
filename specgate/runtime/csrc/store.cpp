// Requests and waiting. store_io.cpp has the transfers.
#include "store.h"

#include <algorithm>

#include "error.h"

namespace specgate {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

std::vector<uint32_t> classes_of(const std::vector<StoredBlock>& blocks) {
  std::vector<uint32_t> out;
  out.reserve(blocks.size());
  for (const StoredBlock& block : blocks) out.push_back(block.shape_class);
  return out;
}

std::vector<int64_t> bytes_of(const std::vector<BlockFormat>& formats) {
  std::vector<int64_t> out;
  for (const BlockFormat& format : formats) out.push_back(static_cast<int64_t>(format.block_bytes));
  return out;
}

/// One more of those counted, while it lives. (the mutex is held when it begins and ends)
struct Counted {
  explicit Counted(int& count) : count_(count) { ++count_; }
  ~Counted() { --count_; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  int& count_;
};

}  // namespace

Store::Store(StoreConfig config) : config_(std::move(config)), timeline_(config_.timeline) {
  if (!config_.memory.empty() && (!config_.ledger.resident_host || config_.memory.size() != config_.blocks.size())) {
    refuse("memory= is for a store of blocks in memory and names the place of each: leave it out");
  }
  if (config_.price_scale >= 0 && config_.eviction != "priced") {
    refuse("price_scale=" + std::to_string(config_.price_scale) + " needs eviction=priced, not " + config_.eviction +
           ": only a price tells what a slot is worth");
  }
  if (config_.workers < 1) refuse("workers=" + std::to_string(config_.workers) + " must be 1 or more");
  ledger_ = std::make_unique<Ledger>(classes_of(config_.blocks), bytes_of(config_.formats), config_.device_slots,
                                     config_.host_slots, config_.eviction, config_.host_eviction, config_.ledger);
  copying_.resize(config_.blocks.size());
  if (config_.trust) trust_.emplace(config_.blocks.size());
  int64_t slots = 0;
  for (const int64_t count : config_.device_slots) {
    first_slot_.push_back(slots);
    slots += count;
  }
  if (config_.device < 0) {
    device_ = make_cpu_device(slots);
  } else {
#ifdef SPECGATE_CUDA
    device_ = make_cuda_device(config_.device, slots, config_.piece_bytes);
#else
    refuse("device=cuda:" + std::to_string(config_.device) +
           " needs a build with CUDA: install nvcc and build specgate again, or choose device=cpu");
#endif
  }
  try {
    allocate();
    workers_ = std::make_unique<TaskPool>(config_.workers);
    if (!config_.ledger.resident_host) {
      reader_ = std::make_unique<FileReader>(config_.paths, config_.reader,
                                             [this](ReadResult&& result) { read_done(std::move(result)); });
    }
  } catch (...) {
    workers_.reset();
    device_->stop();
    free_all();
    throw;
  }
}

Store::~Store() { close(); }

void Store::require_open() const {
  if (closing_) {
    throw StoreFailure(StoreFailure::Kind::Closed, "the expert store is closed: open a new one");
  }
  if (!broken_.empty()) throw StoreFailure(StoreFailure::Kind::Io, broken_);
}

bool Store::demand(const std::vector<uint32_t>& blocks) {
  const auto lock = spin_lock(mutex_, callers_);
  require_open();
  ledger_->demand(blocks);
  ++counters_.acquires;
  if (trust_) trust_->used(blocks, clock_of_use());
  if (config_.price_scale >= 0) {
    pricer_.event(now_ns(), counters_.stall_ns - stall_seen_ns_);
    stall_seen_ns_ = counters_.stall_ns;
  }
  if (ledger_->ready(blocks, false)) return true;
  if (!errors_.empty()) {
    for (const uint32_t b : blocks) errors_.erase(b);
  }
  pump();
  for (const uint32_t b : blocks) {
    const Block& block = ledger_->block(b);
    if (block.device == Place::Loading && !copying_[b]) {
      copying_[b] = device_->hurry(first_slot_[block.shape_class] + block.slot);
    }
  }
  return ready(blocks);
}

bool Store::ready(const std::vector<uint32_t>& blocks) const {
  if (!device_->issued_is_enough()) return ledger_->ready(blocks, false);
  return ledger_->ready(blocks, true) && std::all_of(blocks.begin(), blocks.end(), [this](uint32_t b) {
    return ledger_->block(b).device == Place::Present || copying_[b];  // a DIRECT job is LOADING while it reads
  });
}

std::string Store::failure_of(const std::vector<uint32_t>& blocks) {
  if (errors_.empty()) return {};
  for (const uint32_t b : blocks) {
    const auto found = errors_.find(b);
    if (found != errors_.end()) return found->second;
  }
  return {};
}

void Store::give_up(const std::vector<uint32_t>& blocks) {
  ledger_->release(blocks);
  for (const uint32_t b : blocks) errors_.erase(b);
  ++counters_.failures;
  pump();
  changed_.notify_all();
}

bool Store::someone_waits() const {
  return waiting_ > 0 || closing_ || !broken_.empty() || (draining_ > 0 && !busy_ && flights_.empty());
}

bool Store::wait(const std::vector<uint32_t>& blocks, int milliseconds) {
  std::unique_lock lock = spin_lock(mutex_, callers_);
  const Counted counted(waiting_);
  const int64_t begin = now_ns();
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  bool good = false;
  for (;;) {
    if (closing_ || !broken_.empty()) {
      ledger_->release(blocks);
      require_open();
    }
    const std::string failure = failure_of(blocks);
    if (!failure.empty()) {
      give_up(blocks);
      throw StoreFailure(StoreFailure::Kind::Io, failure);
    }
    good = ready(blocks);
    if (good || changed_.wait_until(lock, until) == std::cv_status::timeout) break;
  }
  const int64_t end = now_ns();
  counters_.stall_ns += end - begin;
  ++counters_.stalls;
  timeline_.add({begin, end, blocks.empty() ? 0 : blocks[0], 3, 0, 0, 0});
  return good || ready(blocks);
}

std::vector<int64_t> Store::slots(const std::vector<uint32_t>& blocks, uintptr_t stream) {
  const auto lock = spin_lock(mutex_, callers_);
  require_open();
  std::vector<int64_t> out, loading;
  out.reserve(blocks.size());
  for (const uint32_t b : blocks) {
    const Block& block = ledger_->block(b);
    if (block.slot < 0) refuse("expert block " + std::to_string(b) + " is not on the device: acquire it first");
    out.push_back(block.slot);
    if (block.device == Place::Loading) loading.push_back(first_slot_[block.shape_class] + block.slot);
  }
  if (!loading.empty()) device_->await(loading, stream);
  return out;
}

void Store::release(const std::vector<uint32_t>& blocks, uintptr_t stream) {
  const auto lock = spin_lock(mutex_, callers_);
  if (closing_) return;
  if (device_->is_cuda()) {
    std::vector<int64_t> keys;
    keys.reserve(blocks.size());
    for (const uint32_t b : blocks) {
      if (b >= ledger_->size()) continue;  // release() below says what is wrong
      const Block& block = ledger_->block(b);
      if (block.slot >= 0) keys.push_back(first_slot_[block.shape_class] + block.slot);
    }
    device_->used(keys, stream);
  }
  ledger_->release(blocks);
  if (ledger_->wants() > 0) pump_later();
}

Asked Store::prefetch(uint32_t block, double p, int64_t deadline, Target target) {
  const std::lock_guard lock(mutex_);
  require_open();
  victims_.clear();
  const Asked asked = ask({block, p, deadline, target});
  if (asked == Asked::Queued) pump();
  return asked;
}

void Store::advance(int64_t now) {
  const auto lock = spin_lock(mutex_, callers_);
  require_open();
  advance_clock(now);
}

void Store::advance_clock(int64_t now) {
  // under the lock: a read that a demand wants again must not be cancelled
  for (const int64_t id : ledger_->advance(now)) reader_->cancel(static_cast<uint64_t>(id));
}

bool Store::drain(int milliseconds) {
  std::unique_lock lock(mutex_);
  const Counted counted(draining_);
  require_open();
  pump();
  return changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                           [this] { return closing_ || (!busy_ && flights_.empty()); });
}

void Store::close() {
  unfollow();
  stop_background();
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
  }
  changed_.notify_all();
  if (reader_) reader_->close();  // reports every read as cancelled
  {
    const std::lock_guard lock(mutex_);
    reader_.reset();  // its threads are gone, and closing_ keeps everyone else from it
  }
  workers_->stop();               // finishes what it decompresses
  device_->stop();                // waits for copies
  {
    std::unique_lock lock(mutex_);
    free_all();
    closed_ = true;
  }
  changed_.notify_all();
}

std::string Store::reader_backend() const {
  const std::lock_guard lock(mutex_);
  if (closing_) return "closed";
  return reader_ ? reader_->backend() : "memory";
}

Counters Store::counters() const {
  const std::lock_guard lock(mutex_);
  return ledger_->counters();
}

StoreCounters Store::store_counters() const {
  const std::lock_guard lock(mutex_);
  StoreCounters counters = counters_;
  if (trust_) counters.forecasts = trust_->total();
  return counters;
}

Block Store::block(uint32_t b) const {
  const std::lock_guard lock(mutex_);
  if (b >= ledger_->size()) {
    refuse("expert block " + std::to_string(b) + " does not exist: there are " + std::to_string(ledger_->size()));
  }
  return ledger_->block(b);
}

std::vector<Span> Store::timeline() const {
  const std::lock_guard lock(mutex_);
  return timeline_.spans();
}

void Store::set_weights(const std::vector<double>& weights) {
  const std::lock_guard lock(mutex_);
  ledger_->policy().set_weights(weights);
  ledger_->host_policy().set_weights(weights);
}

void Store::set_reuse(const Reuse& reuse) {
  const std::lock_guard lock(mutex_);
  ledger_->policy().set_reuse(reuse);
  ledger_->host_policy().set_reuse(reuse);
}

void Store::set_future(const std::vector<std::vector<uint32_t>>& events) {
  const std::lock_guard lock(mutex_);
  ledger_->policy().set_future(events);
  ledger_->host_policy().set_future(events);
}

void Store::check() const {
  const std::lock_guard lock(mutex_);
  ledger_->check();
  if (static_cast<int64_t>(flights_.size()) != ledger_->jobs_in_flight()) {
    throw std::logic_error("every job of the ledger is in flight");
  }
}

}  // namespace specgate
