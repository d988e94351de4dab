#include "simulator_evict.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace specgate::sim {

namespace {
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int64_t kHalves = 4096;
}  // namespace

Eviction::Eviction(const RuleTable& rules, int64_t layers, int64_t experts, int64_t pools)
    : rules_(rules), layers_(layers), experts_(experts), pools_(pools) {
  priced_ = rules.eviction == Evict::Priced;
  hints_ = priced_ || rules.eviction == Evict::Forecast;
  counts_ = priced_ || rules.eviction == Evict::Lfru || rules.gate || rules.prefetch == Fetch::Priced;
  const auto size = static_cast<size_t>(layers * experts);
  blocks_.resize(size);
  places_.resize(size);
  gate_places_.resize(size);
  heaps_.resize(static_cast<size_t>(priced_ ? 2 * layers : pools));
  gate_.resize(rules.gate ? static_cast<size_t>(pools) : 0);
  for (BlockHeap& heap : heaps_) heap.init(&places_, size / static_cast<size_t>(priced_ ? layers : pools));
  for (BlockHeap& heap : gate_) heap.init(&gate_places_, size / static_cast<size_t>(pools));
  listed_.resize(static_cast<size_t>(layers));
  for (auto& list : listed_) list.reserve(static_cast<size_t>(experts));
  for (int64_t i = 0; i <= 2 * layers + 256; ++i) {
    powers_.push_back(std::pow(rules.discount, static_cast<double>(i)));
  }
  for (int64_t i = 0; i < kHalves; ++i) {
    halves_.push_back(std::pow(2.0, -static_cast<double>(i) / rules.half_life));
  }
  reset();
}

void Eviction::reset() {
  n_ = layer_ = step_ = kNone;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b] = Block{};
    blocks_[b].layer = static_cast<int64_t>(b) / experts_;
    blocks_[b].previous = blocks_[b].heat = -kNever;
    blocks_[b].next = kNever;
    places_[b] = gate_places_[b] = -1;
  }
  for (BlockHeap& heap : heaps_) heap.clear();
  for (BlockHeap& heap : gate_) heap.clear();
  for (auto& list : listed_) list.clear();
}

int64_t Eviction::distance(int64_t layer) const {
  return layer > layer_ ? layer - layer_ : layer - layer_ + layers_;
}

double Eviction::power(int64_t exponent) const { return powers_[static_cast<size_t>(exponent)]; }

double Eviction::halved(int64_t steps) const {
  return steps < kHalves ? halves_[static_cast<size_t>(steps)]
                         : std::pow(2.0, -static_cast<double>(steps) / rules_.half_life);
}

double Eviction::q(Block& block) {
  if (block.q_step != step_) {
    const double decayed = block.frequency > 0 ? block.frequency * halved(step_ - block.since) : 0.0;
    const double f = (1.0 - halves_[1]) * decayed;
    block.q = std::clamp(std::exp(rules_.intercept + rules_.slope * std::log(f + 1e-6)), 0.0, 1.0);
    block.q_step = step_;
  }
  return block.q;
}

/// The value of a block with a live hint as of the next event of its layer.
double Eviction::hinted_key(uint32_t b) {
  Block& block = blocks_[b];
  const int64_t next = n_ + distance(block.layer);
  return block.p * power(block.hint_event - next) + (1.0 - block.p) * power(layers_) * q(block);
}

double Eviction::value(uint32_t b) {
  const double from_next = hinted(b) ? hinted_key(b) : q(blocks_[b]);
  return power(distance(blocks_[b].layer)) * from_next;
}

Key Eviction::key(uint32_t b) {
  const Block& block = blocks_[b];
  const uint32_t group = block.marked ? 0 : 1;
  switch (rules_.eviction) {
    case Evict::None:
    case Evict::Lru:
      return {block.last, 0, b, group};
    case Evict::Lfu:
      return {block.uses, block.last, b, group};
    case Evict::Lfru:
      return {block.heat, block.last, b, group};
    case Evict::Lru2:
      return {block.previous, block.last, b, group};
    case Evict::Static:
      return {rules_.weights[b], block.last, b, group};
    case Evict::Forecast:
      return {hinted(b) ? block.p : 0.0, block.last, b, group};
    case Evict::Belady:
      return {-block.next, 0, b, group};
    case Evict::Priced:
      return {hinted(b) ? hinted_key(b) : block.heat, block.last, b, group};
  }
  return {0, 0, b, group};
}

BlockHeap& Eviction::heap_of(uint32_t b) {
  const auto layer = static_cast<size_t>(blocks_[b].layer);
  if (priced_) return heaps_[2 * layer + (hinted(b) ? 1 : 0)];
  return heaps_[pools_ == 1 ? 0 : layer];
}

void Eviction::enter(uint32_t b) {
  heap_of(b).push(key(b));
  if (rules_.gate && !blocks_[b].marked) {
    gate_of(b).push({blocks_[b].heat, blocks_[b].last, b});
  }
}

void Eviction::leave(uint32_t b) {
  heap_of(b).remove(b);
  if (rules_.gate && gate_places_[b] >= 0) gate_of(b).remove(b);
}

void Eviction::rekey(uint32_t b) {
  if (places_[b] >= 0) heap_of(b).update(key(b));
}

void Eviction::relist(int64_t layer) {
  auto& list = listed_[static_cast<size_t>(layer)];
  size_t kept = 0;
  for (const uint32_t b : list) {
    blocks_[b].listed = hinted(b);
    if (blocks_[b].listed) {
      list[kept++] = b;
      rekey(b);
    } else if (places_[b] >= 0) {
      if (priced_) {
        heaps_[2 * static_cast<size_t>(layer) + 1].remove(b);
        heap_of(b).push(key(b));
      } else {
        rekey(b);
      }
    }
  }
  list.resize(kept);
}

void Eviction::begin_event(int64_t n) {
  const int64_t step = n / layers_;
  n_ = n;
  layer_ = n - step * layers_;
  const bool new_step = step != step_;
  step_ = step;
  if (!hints_) return;
  if (priced_ && new_step) {  // decayed uses have changed
    for (int64_t layer = 0; layer < layers_; ++layer) relist(layer);
  } else {
    relist(layer_);
  }
}

void Eviction::use(uint32_t b, double next) {
  Block& block = blocks_[b];
  block.previous = block.uses > 0 ? block.used : -kNever;
  block.used = block.last = static_cast<double>(n_ + 1);
  block.uses += 1;
  block.next = next;
  block.marked = false;
  if (!counts_) return;
  block.frequency = (block.frequency > 0 ? block.frequency * halved(step_ - block.since) : 0.0) + 1.0;
  block.since = step_;
  block.q_step = -2;
  if (rules_.eviction != Evict::Lfru && !rules_.gate && !priced_) return;
  block.heat = std::log2(block.frequency) + static_cast<double>(step_) / rules_.half_life;
}

void Eviction::hint(uint32_t b, double p, int64_t e) {
  Block& block = blocks_[b];
  const bool stands = hints_ && places_[b] >= 0;
  const bool moves = stands && priced_ && !hinted(b);
  if (moves) heap_of(b).remove(b);
  block.p = p;
  block.hint_event = e;
  if (!hints_) return;
  if (!block.listed) {
    block.listed = true;
    listed_[static_cast<size_t>(block.layer)].push_back(b);
  }
  if (moves) {
    heap_of(b).push(key(b));
  } else if (stands) {
    rekey(b);
  }
}

int64_t Eviction::victim(size_t pool) {
  if (!priced_) return heaps_[pool].empty() ? kNone : static_cast<int64_t>(heaps_[pool].top().block);
  Key best;
  best.group = 2;
  const size_t first = pools_ == 1 ? 0 : pool, last = pools_ == 1 ? static_cast<size_t>(layers_) : pool + 1;
  for (size_t layer = first; layer < last; ++layer) {
    const double scale = power(distance(static_cast<int64_t>(layer)));
    for (size_t i = 2 * layer; i < 2 * layer + 2; ++i) {
      if (heaps_[i].empty()) continue;
      Key key = heaps_[i].top();
      key.a = scale * (i % 2 ? key.a : q(blocks_[key.block]));
      if (before(key, best)) best = key;
    }
  }
  return best.group == 2 ? kNone : static_cast<int64_t>(best.block);
}

bool Eviction::admits(uint32_t b, double p, int64_t e, uint32_t victim) {
  const Block& other = blocks_[victim];
  if (hinted(victim) && other.hint_event <= e && other.p >= p) return false;
  switch (rules_.eviction) {
    case Evict::Belady:
      return blocks_[b].next < other.next;
    case Evict::Forecast:
      return (hinted(victim) ? other.p : 0.0) < p;
    case Evict::Priced:
      return value(b) > value(victim);
    default:
      return true;
  }
}

bool Eviction::cold(uint32_t b, size_t pool) const {
  return !gate_[pool].empty() && blocks_[b].heat <= gate_[pool].top().a;
}

}  // namespace specgate::sim
