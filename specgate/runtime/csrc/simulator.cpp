#include "simulator.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"

namespace specgate::sim {

namespace {

constexpr int64_t kRing = 1024;  // points waiting to be known; forecasts reach 255 events, 510 points at most
constexpr double kMemory = 64;   // events in which running means forget by half

const Calls& checked(const Calls& calls, const CostTable& costs, const RuleTable& rules, const Room& room) {
  check(calls, costs, rules, room);
  return calls;
}

}  // namespace

Simulator::Simulator(const Calls& calls, const CostTable& costs, const RuleTable& rules, const Room& room)
    : calls_(checked(calls, costs, rules, room)),
      costs_(costs),
      rules_(rules),
      room_(room),
      copy_ns_(costs.link_latency_ns + static_cast<double>(costs.expert_bytes) / costs.link_bytes_per_ns),
      read_ns_(costs.file_latency_ns + static_cast<double>(costs.expert_bytes) / costs.file_bytes_per_ns),
      low_ns_(costs.link_latency_ns + static_cast<double>(rules.low_bytes) / costs.link_bytes_per_ns),
      decay_(std::pow(2.0, -1.0 / kMemory)),
      eviction_(rules_, calls.layers, calls.experts, static_cast<int64_t>(room.slots.size())) {
  slows_ = costs.link_slowdown > 0;
  foresees_ = calls.point_start && (rules.prefetch != Fetch::None || rules.eviction == Evict::Forecast ||
                                    rules.eviction == Evict::Priced);
  const int64_t size = calls.layers * calls.experts;
  blocks_.resize(static_cast<size_t>(size));
  pools_.resize(room.slots.size());
  value_point_.resize(pools_.size());
  pool_value_.resize(pools_.size());
  known_.resize(kRing);
  tallies_.resize(static_cast<size_t>(calls.documents()));
  document_end_.resize(tallies_.size());
  for (int64_t s = 0; s < calls.steps; ++s) {
    document_end_[static_cast<size_t>(calls.document[s])] = (s + 1) * calls.layers;
  }
  for (auto* list : {&absent_, &reads_, &copies_, &late_}) list->reserve(static_cast<size_t>(calls.experts));
  if (rules.eviction == Evict::Belady) {
    next_use_.resize(static_cast<size_t>(calls.event_start[calls.events()]));
    first_use_.assign(static_cast<size_t>(size), std::numeric_limits<double>::infinity());
    for (int64_t n = calls.events() - 1; n >= 0; --n) {
      const int64_t first_block = n % calls.layers * calls.experts;
      for (int64_t i = calls.event_start[n]; i < calls.event_start[n + 1]; ++i) {
        double& next = first_use_[static_cast<size_t>(first_block + calls.expert[i])];
        next_use_[static_cast<size_t>(i)] = next;
        next = static_cast<double>(n);
      }
    }
  }
  lows_.reserve(rules.low_bytes > 0 ? blocks_.size() : 0);
  waiting_.init(blocks_.size());
  reset();
}

void Simulator::reset() {
  std::fill(blocks_.begin(), blocks_.end(), Block{});
  std::fill(tallies_.begin(), tallies_.end(), Tally{});
  std::fill(value_point_.begin(), value_point_.end(), kNone);
  for (size_t i = 0; i < pools_.size(); ++i) pools_[i] = {room_.slots[i], room_.slots[i], 0};
  eviction_.reset();
  waiting_.reset();
  host_.init(static_cast<int64_t>(blocks_.size()), room_.host_slots);
  for (const int64_t b : room_.warm_host) host_.insert(static_cast<uint32_t>(b));
  for (size_t b = 0; b < first_use_.size(); ++b) eviction_.first_use(static_cast<uint32_t>(b), first_use_[b]);
  for (const int64_t b : room_.warm) {
    blocks_[static_cast<size_t>(b)].place = Place::Present;
    --pools_[pool_of(static_cast<uint32_t>(b))].free;
    enter(static_cast<uint32_t>(b));
  }
  phase_ = Phase::Begin;
  n_ = 0;
  begun_ = point_ = link_block_ = file_block_ = kNone;
  file_orphan_ = upgrade_ = stopped_ = false;
  lows_.clear();
  means_ = {};
  now_ = until_ = router_ = link_free_ = file_free_ = 0;
  known_first_ = known_last_ = 0;
  launches_ = own_ = {};
  if (costs_.launch_ns && calls_.events()) launches_.end = costs_.launch_ns[0] + costs_.event_ns;
  tally_ = tallies_.data();
}

bool Simulator::run(int64_t events) {
  const int64_t end = calls_.events();
  for (; events > 0 && n_ < end; --events) step(false);
  return n_ < end;
}

Simulator::Pause Simulator::advance(int64_t events) {
  point_ = kNone;
  for (; n_ < calls_.events(); --events) {
    if (events == 0) return Pause::More;
    if (step(true)) return Pause::Point;
  }
  return Pause::End;
}

/// One event, or, if it pauses, what is left of it up to the next point.
bool Simulator::step(bool pauses) {
  switch (phase_) {
    case Phase::Begin:
      begin(pauses);
      phase_ = Phase::Before;
      [[fallthrough]];
    case Phase::Before:
      if (pass(pauses)) return true;
      router_ = now_;
      if (slows_ && costs_.launch_ns && n_ + 1 < calls_.events()) {
        launches_ = {router_ + (costs_.launch_ns[n_ + 1] + costs_.event_ns), 0};
      }
      until_ = demand(pauses);
      phase_ = Phase::Waits;
      [[fallthrough]];
    case Phase::Waits:
      if (process(until_, pauses)) return true;
      until_ = now_ + costs_.exec_ns[n_];
      own_ = {now_ + (costs_.host_exec_ns ? costs_.host_exec_ns[n_] : 0.0), 0};
      slowed_ = false;
      phase_ = Phase::Runs;
      [[fallthrough]];
    case Phase::Runs:
      if (pass(pauses)) return true;
      finish();
      phase_ = Phase::Begin;
  }
  return false;
}

void Simulator::await_point(double known) {
  if (known_last_ - known_first_ == kRing) ++known_first_;  // all that it foresaw is past
  known_[static_cast<size_t>(known_last_++ % kRing)] = known;
}

void Simulator::begin(bool pauses) {
  began_ = now_;
  const int64_t step = n_ / calls_.layers;
  if (n_ == step * calls_.layers) {
    tally_ = &tallies_[static_cast<size_t>(calls_.document[step])];
    ++tally_->steps;
    if (foresees_ || pauses) await_point(now_ + costs_.forecast_ns);
  }
  device_ = now_ + (costs_.pre_ns[n_] + costs_.event_ns);
  until_ = costs_.launch_ns ? std::max(device_, router_ + (costs_.launch_ns[n_] + costs_.event_ns)) : device_;
  lag_ = until_ - device_;
  own_ = {now_ + ((costs_.host_pre_ns ? costs_.host_pre_ns[n_] : 0.0) + costs_.event_ns), 0};
  slowed_ = false;
}

/// To the end of the phase, and as much further as copies kept the host. Whether it stopped at a point.
bool Simulator::pass(bool pauses) {
  if (process(until_, pauses)) return true;
  if (!slows_ || slowed_) return false;
  slowed_ = true;
  slow_down();
  return process(until_, pauses);
}

/// The host's work is longer by its slowdown times the time in which the link copied meanwhile.
void Simulator::slow_down() {
  const double own = costs_.link_slowdown * own_.busy;
  if (phase_ == Phase::Runs) {
    until_ += own;
    lag_ += own;
    return;
  }
  until_ = device_ + own;
  if (costs_.launch_ns) until_ = std::max(until_, launches_.end + costs_.link_slowdown * launches_.busy);
  lag_ = until_ - device_;
}

/// The link, the file and the forecasts until a time. Whether it stopped at a point.
bool Simulator::process(double until, bool pauses) {
  const bool idle = link_block_ == kNone && file_block_ == kNone && waiting_.empty() && lows_.empty();
  if (idle && known_first_ == known_last_) {
    now_ = until;
    return false;
  }
  for (;;) {
    if (link_block_ != kNone && link_end_ <= now_) land_link();
    if (file_block_ != kNone && file_end_ <= now_) land_file();
    while (known_first_ != known_last_ && known_[static_cast<size_t>(known_first_ % kRing)] <= now_) {
      const int64_t point = known_first_++;
      arrive(point);
      if (pauses) {
        point_ = point;
        return true;
      }
      judge(point);
    }
    if (now_ >= until) return false;
    if (link_block_ == kNone && link_free_ <= now_) start_link();
    if (file_block_ == kNone && file_free_ <= now_) start_file();
    double next = until;
    if (link_block_ != kNone) {
      next = std::min(next, link_end_);
    } else if (link_free_ > now_) {
      next = std::min(next, link_free_);
    }
    if (file_block_ != kNone) {
      next = std::min(next, file_end_);
    } else if (file_free_ > now_) {
      next = std::min(next, file_free_);
    }
    if (known_first_ != known_last_) next = std::min(next, known_[static_cast<size_t>(known_first_ % kRing)]);
    if (slows_ && link_block_ != kNone && phase_ != Phase::Waits) {
      own_.copied(now_, next);
      launches_.copied(now_, next);
    }
    now_ = next;
  }
}

/// The end of an event: its blocks may go again.
void Simulator::finish() {
  const int64_t layer = n_ % calls_.layers;
  const auto first_block = static_cast<uint32_t>(layer * calls_.experts);
  const int64_t first = calls_.event_start[n_], last = calls_.event_start[n_ + 1];
  const size_t pool = pool_of(first_block);
  if (rules_.gate && pools_[pool].free == 0) {
    for (int64_t i = first; i < last; ++i) {  // none of them stands among those that stay
      const uint32_t b = first_block + static_cast<uint32_t>(calls_.expert[i]);
      if (blocks_[b].judged) eviction_.mark(b, eviction_.cold(b, pool));
    }
  }
  for (int64_t i = first; i < last; ++i) {
    const uint32_t b = first_block + static_cast<uint32_t>(calls_.expert[i]);
    blocks_[b].pinned = false;
    enter(b);
  }
  if (rules_.eviction == Evict::None) {
    for (uint32_t b = first_block; b < first_block + static_cast<uint32_t>(calls_.experts); ++b) {
      const Block& block = blocks_[b];
      if (block.place == Place::Present && !(block.unused && block.target > n_)) evict(b);
    }
  }
  const double work = costs_.pre_ns[n_] + costs_.exec_ns[n_] + lag_, compute = work + costs_.event_ns;
  tally_->compute_ns += compute;
  tally_->stall_ns += stall_;
  tally_->total_ns += now_ - began_;
  Means& m = means_;
  m.busy = m.busy * decay_ + busy_;
  m.time = m.time * decay_ + (compute + stall_);
  m.stall = m.stall * decay_ + stall_;
  m.work = m.work * decay_ + work;
  m.count = m.count * decay_ + 1.0;
  m.hits = m.hits * decay_ + static_cast<double>(hits_);
  m.asked = m.asked * decay_ + static_cast<double>(last - first);
  ++n_;
}

std::vector<int64_t> Simulator::resident() const {
  std::vector<int64_t> found;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    if (blocks_[b].place == Place::Present) found.push_back(static_cast<int64_t>(b));
  }
  return found;
}

}  // namespace specgate::sim
