// Requests: demand, release, prefetch, advance. ledger_jobs.cpp has the transfers.
#include "ledger.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "error.h"

namespace specgate {

namespace {

constexpr size_t kFew = 16;

[[noreturn]] void refuse(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

std::vector<uint32_t> checked_classes(std::vector<uint32_t> block_class, const std::vector<int64_t>& block_bytes,
                                      const std::vector<int64_t>& device_slots,
                                      const std::vector<int64_t>& host_slots) {
  const size_t classes = block_bytes.size();
  if (block_class.empty()) refuse("a store of no experts: give at least one");
  if (classes == 0 || device_slots.size() != classes || host_slots.size() != classes) {
    refuse("sizes for " + std::to_string(classes) + " shapes, device slots for " +
           std::to_string(device_slots.size()) + " and host slots for " + std::to_string(host_slots.size()) +
           ": give one of each per shape");
  }
  for (const uint32_t c : block_class) {
    if (c >= classes) refuse("shape " + std::to_string(c) + " of an expert is not one of " + std::to_string(classes));
  }
  for (size_t c = 0; c < classes; ++c) {
    if (block_bytes[c] <= 0) refuse("an expert of " + std::to_string(block_bytes[c]) + " bytes: give its size");
    if (device_slots[c] < 1) {
      throw StoreFailure(StoreFailure::Kind::Budget, std::to_string(device_slots[c]) +
                                                         " device slots for a shape of expert: at least 1 is needed");
    }
    if (host_slots[c] < 0) refuse(std::to_string(host_slots[c]) + " host slots: give 0 or more");
  }
  return block_class;
}

std::set<int64_t> numbers(int64_t count) {
  std::set<int64_t> all;
  for (int64_t i = 0; i < count; ++i) all.insert(all.end(), i);
  return all;
}

}  // namespace

Ledger::Ledger(std::vector<uint32_t> block_class, std::vector<int64_t> block_bytes, std::vector<int64_t> device_slots,
               std::vector<int64_t> host_slots, const std::string& policy, const std::string& host_policy,
               LedgerOptions options)
    : block_bytes_(std::move(block_bytes)),
      device_slots_(std::move(device_slots)),
      host_slots_(std::move(host_slots)),
      options_(options),
      block_class_(checked_classes(std::move(block_class), block_bytes_, device_slots_, host_slots_)),
      policy_(policy_kind(policy), block_class_, static_cast<uint32_t>(block_bytes_.size()), options.half_life),
      host_policy_(policy_kind(host_policy), block_class_, static_cast<uint32_t>(block_bytes_.size()),
                   options.half_life),
      pinned_(block_bytes_.size(), 0),
      waiting_(block_bytes_.size(), 0) {
  if (options_.max_reads < 1) refuse("max_reads=" + std::to_string(options_.max_reads) + " must be 1 or more");
  if (options_.max_pending < 0) refuse("max_pending=" + std::to_string(options_.max_pending) + " must not be negative");
  if (options_.prefetch_copy_bytes < 0 || options_.prefetch_read_bytes < 0) {
    refuse("prefetch_copy_bytes=" + std::to_string(options_.prefetch_copy_bytes) + " and prefetch_read_bytes=" +
           std::to_string(options_.prefetch_read_bytes) + " must not be negative");
  }
  blocks_.resize(block_class_.size());
  std::vector<int64_t> peers(block_bytes_.size(), 0);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b].shape_class = block_class_[b];
    if (!options_.resident_host) continue;
    blocks_[b].host = Place::Present;
    blocks_[b].slab = peers[block_class_[b]]++;
  }
  for (size_t c = 0; c < block_bytes_.size(); ++c) {
    free_slots_.push_back(numbers(device_slots_[c]));
    free_slabs_.push_back(numbers(options_.resident_host ? 0 : host_slots_[c]));
  }
}

void Ledger::check_id(uint32_t b) const {
  if (b >= blocks_.size()) {
    refuse("expert block " + std::to_string(b) + " does not exist: there are " + std::to_string(blocks_.size()));
  }
}

void Ledger::check_ids(const std::vector<uint32_t>& blocks) const {
  const auto twice = [](uint32_t b) {
    refuse("expert block " + std::to_string(b) + " is named twice: name each once");
  };
  for (const uint32_t b : blocks) check_id(b);
  if (blocks.size() <= kFew) {  // no allocation on the way of a decoded token
    for (size_t i = 0; i < blocks.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        if (blocks[i] == blocks[j]) twice(blocks[i]);
      }
    }
    return;
  }
  std::vector<uint32_t> sorted(blocks);
  std::sort(sorted.begin(), sorted.end());
  const auto same = std::adjacent_find(sorted.begin(), sorted.end());
  if (same != sorted.end()) twice(*same);
}

void Ledger::queue(uint32_t b) {
  const Want& want = *blocks_[b].want;
  if (want.level == Level::Demand) {
    demands_.emplace(want.seq, b);
  } else {
    prefetches_.emplace(want.deadline, -want.p, want.seq, b);
    weakest_.emplace(want.p, -want.deadline, -want.seq, b);
  }
}

void Ledger::unqueue(uint32_t b) {
  const Want& want = *blocks_[b].want;
  if (want.level == Level::Demand) {
    demands_.erase({want.seq, b});
  } else {
    prefetches_.erase({want.deadline, -want.p, want.seq, b});
    weakest_.erase({want.p, -want.deadline, -want.seq, b});
  }
}

void Ledger::drop_want(uint32_t b) {
  if (blocks_[b].job < 0) unqueue(b);
  blocks_[b].want.reset();
  settle(b);
}

void Ledger::settle(uint32_t b) {
  Block& block = blocks_[b];
  const bool demanded = block.want && block.want->level == Level::Demand;
  const bool waits = demanded && block.device == Place::Absent;
  waiting_[block.shape_class] += static_cast<int64_t>(waits) - static_cast<int64_t>(block.waits);
  block.waits = waits;
  if (block.device == Place::Present && block.pins == 0) {
    policy_.join(b);
  } else {
    policy_.leave(b);
  }
  if (options_.resident_host) return;
  if (block.host == Place::Present && block.host_pins == 0 && !demanded) {
    host_policy_.join(b);
  } else {
    host_policy_.leave(b);
  }
}

void Ledger::set_demand(uint32_t b) {
  Block& block = blocks_[b];
  if (block.want && block.want->level == Level::Demand) return;
  const bool flying = block.job >= 0;
  if (block.want) ++counters_.promoted;
  if (block.want && !flying) unqueue(b);
  if (flying) {  // its bytes count as demand from now on
    Job& job = jobs_.at(block.job);
    if (!job.sent) count_job(job, -1);
    job.level = Level::Demand;
    job.sent = false;
    count_job(job, 1);
    if (job.kind == JobKind::Read) block.host_origin = Level::Demand;
  }
  const int64_t deadline = block.want ? block.want->deadline : now_;
  const double p = block.want ? block.want->p : 1.0;
  block.want = Want{Level::Demand, Target::Device, p, deadline, seq_++};
  if (!flying) queue(b);
}

void Ledger::demand(const std::vector<uint32_t>& blocks) {
  check_ids(blocks);
  std::vector<int64_t> pinned = pinned_;
  for (const uint32_t b : blocks) pinned[blocks_[b].shape_class] += blocks_[b].pins == 0;
  for (size_t c = 0; c < pinned.size(); ++c) {
    if (pinned[c] > device_slots_[c]) {
      throw StoreFailure(StoreFailure::Kind::Budget,
                         std::to_string(pinned[c]) + " experts are needed at once and the budget holds " +
                             std::to_string(device_slots_[c]) + ": raise the budget or ask for fewer at a time");
    }
  }
  pinned_ = std::move(pinned);
  ++tick_;
  policy_.advance(tick_);
  host_policy_.advance(tick_);
  for (const uint32_t b : blocks) {
    Block& block = blocks_[b];
    const int64_t bytes = block_bytes_[block.shape_class];
    ++block.pins;
    settle(b);
    policy_.use(b, tick_);
    host_policy_.use(b, tick_);
    block.host_used |= block.host != Place::Absent;
    const bool foreseen = block.device != Place::Absent && block.origin == Level::Prefetch && !block.used;
    if (foreseen) counters_.useful_bytes += bytes;
    if (block.device == Place::Present) {
      ++counters_.hit;
      block.used = true;
      continue;
    }
    if (block.device == Place::Loading) {
      ++counters_.late;
      if (foreseen) counters_.late_bytes += bytes;
      block.used = true;
    } else if (block.host == Place::Present) {
      ++counters_.host_hit;
    } else {
      ++counters_.miss;
    }
    set_demand(b);
    settle(b);
  }
}

void Ledger::release(const std::vector<uint32_t>& blocks) {
  check_ids(blocks);
  for (const uint32_t b : blocks) {
    if (blocks_[b].pins == 0) refuse("expert block " + std::to_string(b) + " is released and was not acquired");
  }
  for (const uint32_t b : blocks) {
    Block& block = blocks_[b];
    if (--block.pins > 0) continue;
    --pinned_[block.shape_class];
    if (block.want && block.want->level == Level::Demand && block.job < 0) drop_want(b);  // nobody waits any more
    settle(b);
  }
}

Asked Ledger::prefetch(uint32_t b, double p, int64_t deadline, Target target) {
  check_id(b);
  if (!(p >= 0 && p <= 1)) refuse("a forecast of p=" + std::to_string(p) + " is no probability: give 0 to 1");
  if (deadline < now_) {
    ++counters_.stale;
    return Asked::Stale;
  }
  Block& block = blocks_[b];
  if (target == Target::Host && host_slots_[block.shape_class] == 0 && !options_.resident_host) return Asked::Refused;
  policy_.hint(b, p, deadline);
  host_policy_.hint(b, p, deadline);
  if (block.device == Place::Present || (target == Target::Host && block.host == Place::Present)) {
    return Asked::Resident;
  }
  if (block.want) {
    if (block.want->level == Level::Demand) return Asked::Demanded;
    if (block.job < 0) unqueue(b);
    block.want->p = p;
    block.want->deadline = deadline;
    if (target == Target::Device) block.want->target = Target::Device;
    if (block.job < 0) queue(b);
    ++counters_.merged;
    return Asked::Merged;
  }
  if (static_cast<int64_t>(weakest_.size()) >= options_.max_pending) {
    ++counters_.overflow;
    if (weakest_.empty() || !(std::get<0>(*weakest_.begin()) < p)) return Asked::Refused;
    drop_want(std::get<3>(*weakest_.begin()));
  }
  block.want = Want{Level::Prefetch, target, p, deadline, seq_++};
  if (block.job < 0) queue(b);  // else: an unwanted READ is still on its way
  return Asked::Queued;
}

std::vector<int64_t> Ledger::advance(int64_t now) {
  if (now < now_) {
    refuse("the clock went back from " + std::to_string(now_) + " to " + std::to_string(now) + ": it only grows");
  }
  now_ = now;
  policy_.lapse(now);
  host_policy_.lapse(now);
  while (!prefetches_.empty() && std::get<0>(*prefetches_.begin()) < now) {
    drop_want(std::get<3>(*prefetches_.begin()));
    ++counters_.stale;
  }
  std::vector<int64_t> unwanted;
  for (const auto& [id, job] : jobs_) {
    if (job.kind != JobKind::Read) continue;
    std::optional<Want>& want = blocks_[job.block].want;
    if (want && want->level == Level::Prefetch && want->deadline < now) {
      want.reset();
      ++counters_.stale;
    }
    if (!want) unwanted.push_back(id);
  }
  std::sort(unwanted.begin(), unwanted.end());
  return unwanted;
}

bool Ledger::ready(const std::vector<uint32_t>& blocks, bool issued) const {
  bool all = true;
  for (const uint32_t b : blocks) {
    check_id(b);
    const Place place = blocks_[b].device;
    all &= place == Place::Present || (issued && place == Place::Loading);
  }
  return all;
}

std::vector<uint32_t> Ledger::take_failed() {
  std::vector<uint32_t> failed;
  failed.swap(failed_);
  std::sort(failed.begin(), failed.end());
  failed.erase(std::unique(failed.begin(), failed.end()), failed.end());
  for (const uint32_t b : failed) blocks_[b].failed = false;
  return failed;
}

}  // namespace specgate
