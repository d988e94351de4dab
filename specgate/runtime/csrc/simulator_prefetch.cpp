// Forecasts: hints, the rules of what is fetched ahead, and the transfers of it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "simulator.h"

namespace specgate::sim {

/// The forecasts of a point are known: they become hints, the nearest one of each block.
void Simulator::arrive(int64_t point) {
  if (!calls_.point_start) return;
  const int64_t first_event = first_event_of(point), end = end_of(point);
  int64_t horizon = 0, e = 0;
  uint32_t first_block = 0;
  for (int64_t i = calls_.point_start[point]; i < calls_.point_start[point + 1]; ++i) {
    if (calls_.horizon[i] != horizon) {
      horizon = calls_.horizon[i];
      e = first_event + horizon - 1;
      first_block = static_cast<uint32_t>(e % calls_.layers * calls_.experts);
    }
    if (e <= begun_) continue;
    if (e >= end) break;
    const uint32_t b = first_block + static_cast<uint32_t>(calls_.foreseen[i]);
    if (blocks_[b].seen == point) continue;
    blocks_[b].seen = point;
    eviction_.hint(b, calls_.p[i], e);
  }
}

/// What is `wanted` of the point's forecasts is queued. wanted(b, p, horizon, rank, sum): rank and sum are
/// those of the more probable experts of the same horizon.
template <class Wanted>
void Simulator::offer_all(int64_t point, int64_t depth, Wanted wanted) {
  if (!calls_.point_start) return;
  const int64_t first_event = first_event_of(point), end = end_of(point);
  int64_t horizon = 0, rank = 0, e = 0;
  uint32_t first_block = 0;
  double sum = 0;
  for (int64_t i = calls_.point_start[point]; i < calls_.point_start[point + 1]; ++i) {
    if (calls_.horizon[i] != horizon) {
      horizon = calls_.horizon[i];
      e = first_event + horizon - 1;
      first_block = static_cast<uint32_t>(e % calls_.layers * calls_.experts);
      rank = 0, sum = 0;
    }
    if (horizon > depth || e >= end) break;
    if (e <= begun_) continue;
    const uint32_t b = first_block + static_cast<uint32_t>(calls_.foreseen[i]);
    const double p = calls_.p[i];
    const bool open = blocks_[b].place == Place::Absent && eviction_.hint_event(b) == e;
    if (open && wanted(b, p, horizon, rank, sum)) {
      if (waiting_.queued(b)) {
        waiting_.merge(b, p, e, host_.has(b));
      } else {
        waiting_.put(b, p, e, host_.has(b));
      }
    }
    ++rank;
    sum += p;
  }
}

void Simulator::judge(int64_t point) {
  switch (rules_.prefetch) {
    case Fetch::None:
      return;
    case Fetch::Threshold: {
      const double rise = rise_of_threshold();
      return offer_all(point, depth_of(point), [&](uint32_t b, double p, int64_t, int64_t, double) {
        const double t = rules_.thresholds[b / static_cast<uint32_t>(calls_.experts)];
        return p >= t + (1.0 - t) * rise;
      });
    }
    case Fetch::Top:
      return offer_all(point, depth_of(point),
                       [&](uint32_t, double, int64_t, int64_t rank, double) { return rank < rules_.width; });
    case Fetch::Cumulative: {
      const double enough = rules_.mass * static_cast<double>(calls_.top_k);
      return offer_all(point, depth_of(point),
                       [&](uint32_t, double, int64_t, int64_t, double sum) { return sum < enough; });
    }
    case Fetch::Priced: {
      const double mean = mean_event(), price = price_of_link();
      return offer_all(point, depth_of(point), [&](uint32_t b, double p, int64_t h, int64_t, double) {
        const double time = static_cast<double>(h) * mean - ahead(b, p, first_event_of(point) + h - 1);
        if (pays(point, b, p, time, price, copy_ns_)) {
          blocks_[b].low = false;
          return true;
        }
        if (rules_.low_bytes == 0 || !pays(point, b, p, time, price, low_ns_)) return false;
        return blocks_[b].low = true;
      });
    }
  }
}

void Simulator::act(double threshold, int64_t depth) {
  if (point_ == kNone) return;
  const int64_t point = point_;
  point_ = kNone;
  offer_all(point, depth, [&](uint32_t, double p, int64_t, int64_t, double) { return p >= threshold; });
}

double Simulator::rise_of_threshold() const {
  double slots = 0, free = 0;
  for (const Pool& pool : pools_) {
    slots += static_cast<double>(pool.slots);
    free += static_cast<double>(pool.free);
  }
  const double full = slots > 0 ? (slots - free) / slots : 0.0;
  const double host = host_.everything() || room_.host_slots == 0
                          ? 0.0
                          : static_cast<double>(host_.used()) / static_cast<double>(room_.host_slots);
  return std::min(1.0, rules_.load_rise * utilisation() + rules_.full_rise * full + rules_.host_rise * host);
}

double Simulator::backlog() const {
  double free = std::max(now_, link_free_);
  if (link_block_ != kNone) free = std::max(free, link_end_);
  auto copies = static_cast<double>(waiting_.size());
  const bool reads = file_block_ != kNone && !file_orphan_;
  if (reads && blocks_[static_cast<size_t>(file_block_)].place == Place::Flying) copies += 1;
  return (free - now_) + copies * copy_ns_;
}

/// What the link has to do before a copy of the block for event e, counted from when the model goes on: it waits for
/// what event n_ demands in any case.
double Simulator::ahead(uint32_t b, double p, int64_t e) const {
  const double on = phase_ == Phase::Waits ? std::max(now_, until_) : now_;
  double free = std::max(now_, link_free_);
  if (link_block_ != kNone) free = std::max(free, link_end_);
  auto copies = static_cast<double>(waiting_.staged.size());
  const Key own = Waiting::key(b, p, e);
  for (size_t i = 0; i < waiting_.link.size(); ++i) {
    const Key& other = waiting_.link.at(i);
    if (other.block != b && before(other, own)) copies += 1;
  }
  return std::max(0.0, free - on) + copies * copy_ns_;
}

double Simulator::mean_event() const {
  return means_.count > 0 ? means_.work / means_.count : costs_.pre_ns[0] + costs_.exec_ns[0];
}

Simulator::Spread Simulator::spread(int64_t point, int64_t horizon) const {
  Spread found;
  if (!calls_.point_start) return found;
  double sum = 0, count = 0;
  const int64_t first = calls_.point_start[point], last = calls_.point_start[point + 1];
  for (int64_t i = first; i < last; ++i) {
    if (calls_.horizon[i] != horizon) continue;
    const double p = calls_.p[i];
    sum += p;
    count += 1;
    found.most = std::max(found.most, p);
  }
  if (sum <= 0 || calls_.experts < 2) return found;
  found.mean = sum / count;
  for (int64_t i = first; i < last; ++i) {
    if (calls_.horizon[i] != horizon || calls_.p[i] <= 0) continue;
    const double share = static_cast<double>(calls_.p[i]) / sum;
    found.entropy -= share * std::log(share);
  }
  found.entropy /= std::log(static_cast<double>(calls_.experts));
  return found;
}

int64_t Simulator::depth_of(int64_t point) const {
  if (!rules_.adaptive) return rules_.depth;
  const bool unsure = spread(point, 1).entropy > rules_.entropy_high;
  return unsure || backlog() > rules_.backlog_high * mean_event() ? 1 : rules_.depth;
}

double Simulator::price_of_link() const {
  return std::max(rules_.price_floor, utilisation() * (costs_.link_chunk_bytes > 0 ? rules_.price_scale : 1.0));
}

/// Break-even, where the link has `time` until the expert is used: what the prefetch saves if the forecast is right
/// against what it costs in any case.
bool Simulator::pays(int64_t point, uint32_t b, double p, double time, double price, double copy) {
  const size_t pool = pool_of(b);
  if (value_point_[pool] != point) {
    value_point_[pool] = point;
    const int64_t victim = pools_[pool].free > 0 ? kNone : eviction_.victim(pool);
    pool_value_[pool] = pools_[pool].free > 0 ? 0.0
                        : victim == kNone     ? std::numeric_limits<double>::infinity()
                                              : eviction_.value(static_cast<uint32_t>(victim));
  }
  const double load = copy_ns_ + (host_.has(b) ? 0.0 : read_ns_);
  const double late = std::max(0.0, copy - time);
  const double saved = std::min(std::max(load - late, 0.0), load);
  return p * saved > pool_value_[pool] * load + price * copy;
}

/// A transfer takes its slot, or is refused one.
bool Simulator::start(uint32_t b, double p, int64_t e) {
  const size_t pool = pool_of(b);
  if (pools_[pool].free == 0) {
    const int64_t victim = eviction_.victim(pool);
    if (victim == kNone || !eviction_.admits(b, p, e, static_cast<uint32_t>(victim))) {
      ++tally_->refused;
      return false;
    }
    evict(static_cast<uint32_t>(victim));
  }
  --pools_[pool].free;
  Block& block = blocks_[b];
  block.place = Place::Flying;
  block.unused = true;
  block.target = e;
  block.p = p;
  block.spent = block.low ? rules_.low_bytes : costs_.expert_bytes;
  ++tally_->prefetches;
  tally_->prefetch_bytes += block.spent;
  return true;
}

void Simulator::start_link() {
  int64_t found = kNone;
  if (!waiting_.staged.empty()) {
    found = waiting_.staged.top().block;
    waiting_.staged.remove(static_cast<uint32_t>(found));
  }
  while (found == kNone && !waiting_.link.empty()) {
    const Key key = waiting_.link.top();
    waiting_.link.remove(key.block);
    if (start(key.block, -key.b, static_cast<int64_t>(key.a))) found = key.block;
  }
  if (found != kNone) {
    start_copy(found, ahead_of(copy_of(static_cast<uint32_t>(found))), false);
  } else if (!lows_.empty() && (found = next_upgrade()) != kNone) {
    blocks_[static_cast<size_t>(found)].spent += costs_.expert_bytes;
    tally_->prefetch_bytes += costs_.expert_bytes;
    start_copy(found, ahead_of(copy_ns_), true);
  }
}

void Simulator::start_copy(int64_t b, double work, bool upgrade) {
  link_block_ = b;
  upgrade_ = upgrade;
  link_work_ = work;
  link_start_ = now_;
  link_done_ = 0;
  link_end_ = now_ + work;
  tally_->link_busy_ns += work;
}

/// The approximate copy to be followed by the exact one first: by event, falling p, block.
int64_t Simulator::next_upgrade() {
  Key best;
  best.group = 2;
  size_t kept = 0;
  for (const uint32_t b : lows_) {
    Block& block = blocks_[b];
    block.low_listed = block.place == Place::Present && block.low;
    if (!block.low_listed) continue;
    lows_[kept++] = b;
    if (block.pinned || !host_.has(b) || !eviction_.hinted(b)) continue;
    const Key key = Waiting::key(b, eviction_.hint_p(b), eviction_.hint_event(b));
    if (before(key, best)) best = key;
  }
  lows_.resize(kept);
  return best.group == 2 ? kNone : static_cast<int64_t>(best.block);
}

void Simulator::start_file() {
  while (!waiting_.file.empty()) {
    const Key key = waiting_.file.top();
    waiting_.file.remove(key.block);
    if (!start(key.block, -key.b, static_cast<int64_t>(key.a))) continue;
    file_block_ = key.block;
    file_orphan_ = false;
    file_end_ = now_ + read_ns_;
    tally_->file_bytes += costs_.expert_bytes;
    return;
  }
}

void Simulator::land_link() {
  const auto b = static_cast<uint32_t>(link_block_);
  link_block_ = kNone;
  if (upgrade_) {
    if (blocks_[b].place == Place::Present) blocks_[b].low = false;
    return;
  }
  if (blocks_[b].place != Place::Flying) return;  // demanded meanwhile
  blocks_[b].place = Place::Present;
  list_low(b);
  eviction_.land(b);
  enter(b);
}

void Simulator::land_file() {
  const auto b = static_cast<uint32_t>(file_block_);
  const Block& block = blocks_[b];
  const bool waits = !file_orphan_ && block.place == Place::Flying;
  file_block_ = kNone;
  file_orphan_ = false;
  read_into_host(b);
  if (waits) waiting_.staged.push(Waiting::key(b, block.p, block.target));
}

std::array<float, kObserved> Simulator::observe() const {
  std::array<float, kObserved> seen{};
  const double mean = mean_event();
  int64_t open = 0, slots = 0;
  for (const Pool& pool : pools_) {
    open += pool.free;
    slots += pool.slots;
  }
  for (size_t b = 0; b < blocks_.size(); ++b) {
    open += eviction_.in_heap(static_cast<uint32_t>(b)) && !eviction_.hinted(static_cast<uint32_t>(b));
  }
  auto share = [](double x, double of) { return static_cast<float>(of > 0 ? x / of : 0.0); };
  const int64_t point = point_ == kNone ? 0 : point_;
  size_t i = 0;
  seen[i++] = share(static_cast<double>(point % (calls_.layers + 1)), static_cast<double>(calls_.layers));
  seen[i++] = share(backlog(), mean);
  seen[i++] = share(static_cast<double>(open), static_cast<double>(slots));
  std::array<Spread, 3> spreads;
  for (size_t h = 0; h < 3; ++h) spreads[h] = spread(point, static_cast<int64_t>(h) + 1);
  for (const Spread& s : spreads) seen[i++] = static_cast<float>(s.mean);
  for (const Spread& s : spreads) seen[i++] = static_cast<float>(s.most);
  for (const Spread& s : spreads) seen[i++] = static_cast<float>(s.entropy);
  seen[i++] = share(means_.hits, means_.asked);
  seen[i++] = share(means_.stall, means_.time);
  seen[i++] = static_cast<float>(utilisation());
  return seen;
}

}  // namespace specgate::sim
