// Transfers: which starts next, and what follows when one ends.
#include <stdexcept>

#include "error.h"
#include "ledger.h"

namespace specgate {

namespace {
constexpr int kDemand = static_cast<int>(Level::Demand), kPrefetch = static_cast<int>(Level::Prefetch);
}

JobKind Ledger::step(const Block& block) const {
  if (block.host == Place::Present) return JobKind::Copy;
  return host_slots_[block.shape_class] == 0 ? JobKind::Direct : JobKind::Read;
}

bool Ledger::within_limits(JobKind kind, Level level, int64_t bytes) const {
  const bool copy = kind == JobKind::Copy;
  if (!copy && reads_[kDemand] + reads_[kPrefetch] >= options_.max_reads) return false;
  if (level == Level::Demand || (copy ? copies_ : reads_)[kPrefetch] == 0) return true;  // one is always allowed
  return copy ? copy_flight_[kPrefetch] + bytes <= options_.prefetch_copy_bytes
              : read_flight_[kPrefetch] + bytes <= options_.prefetch_read_bytes;
}

/// Whether a slot is left over for a forecast when each waiting demand has got one.
bool Ledger::spare_slot(uint32_t c) const {
  return static_cast<int64_t>(free_slots_[c].size()) + policy_.evictable_count(c) > waiting_[c];
}

std::optional<Job> Ledger::next_job() {
  Passed closed;
  for (const auto& [seq, b] : demands_) {
    const JobKind kind = step(blocks_[b]);
    if (within_limits(kind, Level::Demand, bytes(b))) {
      if (auto job = start(b, kind)) return job;
    }
    (kind == JobKind::Copy ? closed.copy : closed.read) = true;
  }
  closed.copy |= copies_[kDemand] > 0;
  closed.read |= reads_[kDemand] > 0;
  for (const auto& entry : prefetches_) {
    if (closed.copy && closed.read) return std::nullopt;
    const uint32_t b = std::get<3>(entry);
    const JobKind kind = step(blocks_[b]);
    bool& way = kind == JobKind::Copy ? closed.copy : closed.read;
    if (way) continue;
    if (!within_limits(kind, Level::Prefetch, bytes(b))) {
      way = true;  // later ones do not pass it
    } else if (kind == JobKind::Read || spare_slot(blocks_[b].shape_class)) {
      if (auto job = start(b, kind)) return job;
    }
  }
  return std::nullopt;
}

std::optional<Job> Ledger::start(uint32_t b, JobKind kind) {
  Block& block = blocks_[b];
  const Level level = block.want->level;
  Job job{-1, kind, b, -1, -1, level};
  if (kind == JobKind::Read) {
    job.slab = take_slab(b, level);
    if (job.slab < 0) return std::nullopt;
  } else {
    job.slot = take_slot(b, level);
    if (job.slot < 0) return std::nullopt;
    job.slab = kind == JobKind::Copy ? block.slab : -1;
  }
  job.id = next_id_++;
  unqueue(b);
  block.job = job.id;
  if (kind == JobKind::Read) {
    block.host = Place::Loading;
    block.slab = job.slab;
    block.host_origin = level;
    block.host_used = false;
  } else {
    block.device = Place::Loading;
    block.slot = job.slot;
    block.origin = level;
    block.used = level == Level::Demand;
    block.p = block.want->p;
    block.deadline = block.want->deadline;
    block.host_used |= kind == JobKind::Copy;
    if (kind == JobKind::Copy && !options_.resident_host) ++block.host_pins;
  }
  if (kind != JobKind::Read) counters_.copied_bytes[static_cast<int>(level)] += bytes(b);
  if (kind != JobKind::Copy) counters_.read_bytes[static_cast<int>(level)] += bytes(b);
  count_job(job, 1);
  jobs_.emplace(job.id, job);
  settle(b);
  return job;
}

void Ledger::count_job(const Job& job, int64_t sign) {
  const int level = static_cast<int>(job.level);
  const bool copy = job.kind == JobKind::Copy;
  (copy ? copies_ : reads_)[level] += sign;
  (copy ? copy_flight_ : read_flight_)[level] += sign * bytes(job.block);
}

int64_t Ledger::take_slot(uint32_t b, Level level) {
  const uint32_t c = blocks_[b].shape_class;
  if (free_slots_[c].empty()) {
    const int64_t victim = policy_.victim(c);
    if (victim < 0) return -1;
    const Block& least = blocks_[static_cast<size_t>(victim)];
    if (level == Level::Prefetch) {
      // not in the place of what was foreseen at least as surely and is still to come
      const bool foreseen = least.origin == Level::Prefetch && !least.used && least.deadline >= now_;
      if (foreseen && least.p >= blocks_[b].want->p) return -1;
      if (!policy_.admits(b, static_cast<uint32_t>(victim))) return -1;
    }
    evict_device(static_cast<uint32_t>(victim));
  }
  const int64_t slot = *free_slots_[c].begin();
  free_slots_[c].erase(free_slots_[c].begin());
  return slot;
}

int64_t Ledger::take_slab(uint32_t b, Level level) {
  const uint32_t c = blocks_[b].shape_class;
  if (free_slabs_[c].empty()) {
    const int64_t victim = host_policy_.victim(c);
    if (victim < 0) return -1;
    if (level == Level::Prefetch) {
      if (blocks_[static_cast<size_t>(victim)].want) return -1;  // or two forecasts would read each other out for ever
      if (!host_policy_.admits(b, static_cast<uint32_t>(victim))) return -1;
    }
    evict_host(static_cast<uint32_t>(victim));
  }
  const int64_t slab = *free_slabs_[c].begin();
  free_slabs_[c].erase(free_slabs_[c].begin());
  return slab;
}

void Ledger::evict_device(uint32_t b) {
  Block& block = blocks_[b];
  ++counters_.evictions;
  if (block.origin == Level::Prefetch && !block.used) counters_.wasted_bytes += bytes(b);
  free_slots_[block.shape_class].insert(block.slot);
  block.device = Place::Absent;
  block.slot = -1;
  settle(b);
}

void Ledger::evict_host(uint32_t b) {
  Block& block = blocks_[b];
  ++counters_.host_evictions;
  if (block.host_origin == Level::Prefetch && !block.host_used) counters_.wasted_read_bytes += bytes(b);
  free_slabs_[block.shape_class].insert(block.slab);
  block.host = Place::Absent;
  block.slab = -1;
  settle(b);
}

void Ledger::fail(uint32_t b) {
  Block& block = blocks_[b];
  const bool asked = block.pins > 0 || (block.want && block.want->level == Level::Demand);
  block.want.reset();
  if (asked && !block.failed) {
    block.failed = true;
    failed_.push_back(b);
  }
}

void Ledger::sent(int64_t id) {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) return;
  Job& job = found->second;
  if (job.sent || job.kind != JobKind::Copy || job.level != Level::Prefetch) return;
  count_job(job, -1);
  job.sent = true;
}

void Ledger::complete(int64_t id, JobStatus status) {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) {
    throw StoreFailure(StoreFailure::Kind::Config, "job " + std::to_string(id) + " is not in flight");
  }
  const Job job = found->second;
  jobs_.erase(found);
  if (!job.sent) count_job(job, -1);
  blocks_[job.block].job = -1;
  if (job.kind == JobKind::Read) {
    land_read(job, status);
  } else {
    land_copy(job, status);
  }
  Block& block = blocks_[job.block];
  if (block.want && block.want->level == Level::Demand && block.pins == 0) block.want.reset();  // nobody waits
  if (block.want) queue(job.block);
  settle(job.block);
}

void Ledger::land_copy(const Job& job, JobStatus status) {
  Block& block = blocks_[job.block];
  if (job.kind == JobKind::Copy && !options_.resident_host) --block.host_pins;
  if (status == JobStatus::Ok) {
    block.device = Place::Present;
    block.want.reset();
    policy_.insert(job.block, tick_);
    return;
  }
  if (block.origin == Level::Prefetch && !block.used) counters_.wasted_bytes += bytes(job.block);
  free_slots_[block.shape_class].insert(block.slot);
  block.device = Place::Absent;
  block.slot = -1;
  if (status == JobStatus::Failed) fail(job.block);
}

void Ledger::land_read(const Job& job, JobStatus status) {
  Block& block = blocks_[job.block];
  if (status == JobStatus::Ok) {
    block.host = Place::Present;
    host_policy_.insert(job.block, tick_);
    if (block.want && block.want->target == Target::Host) block.want.reset();
    return;
  }
  if (block.host_origin == Level::Prefetch && !block.host_used) counters_.wasted_read_bytes += bytes(job.block);
  free_slabs_[block.shape_class].insert(block.slab);
  block.host = Place::Absent;
  block.slab = -1;
  if (status == JobStatus::Failed) fail(job.block);
}

void Ledger::check() const {
  const auto require = [](bool good, const char* what) {
    if (!good) throw std::logic_error(what);
  };
  std::vector<std::set<int64_t>> slots(free_slots_), slabs(free_slabs_);
  std::vector<int64_t> pinned(pinned_.size(), 0);
  size_t flying = 0, waiting = 0;
  for (const Block& block : blocks_) {
    const uint32_t c = block.shape_class;
    require((block.device == Place::Absent) == (block.slot < 0), "a block has a slot exactly if it is on the device");
    if (block.slot >= 0) require(slots[c].insert(block.slot).second, "a slot is used twice");
    if (!options_.resident_host) {
      require((block.host == Place::Absent) == (block.slab < 0), "a block has a slab exactly if it is in host memory");
      if (block.slab >= 0) require(slabs[c].insert(block.slab).second, "a slab is used twice");
    }
    require(block.pins >= 0 && block.host_pins >= 0, "pins are not negative");
    pinned[c] += block.pins > 0;
    flying += block.job >= 0;
    waiting += block.want && block.job < 0;
    if (block.job >= 0) require(jobs_.count(block.job) == 1, "a block's job is in flight");
  }
  for (size_t c = 0; c < slots.size(); ++c) {
    require(static_cast<int64_t>(slots[c].size()) == device_slots_[c], "no slot is lost");
    require(options_.resident_host || static_cast<int64_t>(slabs[c].size()) == host_slots_[c], "no slab is lost");
    require(pinned[c] == pinned_[c] && pinned[c] <= device_slots_[c], "pinned blocks are within the budget");
  }
  require(flying == jobs_.size(), "every job belongs to one block");
  require(waiting == demands_.size() + prefetches_.size(), "every want without a job is queued");
  require(weakest_.size() == prefetches_.size(), "both orders of the queue hold the same");
}

}  // namespace specgate
