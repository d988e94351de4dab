#include "policy.h"

#include <cmath>
#include <limits>

#include "error.h"

namespace specgate {

namespace {
constexpr double kNever = std::numeric_limits<double>::infinity();
}

PolicyKind policy_kind(const std::string& name) {
  if (name == "lru") return PolicyKind::Lru;
  if (name == "lfu") return PolicyKind::Lfu;
  if (name == "lfru") return PolicyKind::Lfru;
  if (name == "static") return PolicyKind::Static;
  if (name == "forecast") return PolicyKind::Forecast;
  if (name == "belady") return PolicyKind::Belady;
  if (name == "priced") return PolicyKind::Priced;
  throw StoreFailure(StoreFailure::Kind::Config,
                     "eviction=" + name + " is unknown: choose lru, lfu, lfru, static, forecast, belady or priced");
}

Policy::Policy(PolicyKind kind, const std::vector<uint32_t>& block_class, uint32_t classes, double half_life)
    : kind_(kind),
      half_life_(half_life),
      block_class_(block_class),
      entries_(block_class.size()),
      evictable_(classes),
      counts_(classes) {
  if (!(half_life > 0)) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "half_life=" + std::to_string(half_life) + " must be a positive number of events");
  }
  if (kind == PolicyKind::Priced) {
    Reuse reuse;
    reuse.half_life = half_life;
    set_reuse(reuse);
  }
}

double Policy::next_use(uint32_t block) const {
  const Entry& entry = entries_[block];
  return entry.next < entry.future.size() ? static_cast<double>(entry.future[entry.next]) : kNever;
}

Policy::Key Policy::key(uint32_t block) const {
  const Entry& entry = entries_[block];
  switch (kind_) {
    case PolicyKind::Lru:
      return {entry.last, entry.last, block};
    case PolicyKind::Lfu:
      return {entry.uses, entry.last, block};
    case PolicyKind::Priced:
      return {entry.frequency > 0 ? std::log2(entry.frequency) + entry.since / half_life_ticks_ : -kNever, entry.last,
              block};
    case PolicyKind::Lfru:
      // log2 of the decayed frequency, moved to time 0: the order of two blocks does not change with time
      return {entry.frequency > 0 ? std::log2(entry.frequency) + entry.since / half_life_ : -kNever, entry.last, block};
    case PolicyKind::Static:
      return {entry.weight, entry.last, block};
    case PolicyKind::Forecast:
      return {entry.score, entry.last, block};
    case PolicyKind::Belady:
      return {-next_use(block), 0, block};
  }
  return {0, 0, block};
}

template <typename Change>
void Policy::update(uint32_t block, Change change) {
  forget_victims();
  Entry& entry = entries_[block];
  if (!entry.evictable) {
    change(entry);
    return;
  }
  auto node = order_of(block).extract(key(block));  // no allocation
  change(entry);
  node.value() = key(block);
  order_of(block).insert(std::move(node));
}

std::set<Policy::Key>& Policy::order_of(uint32_t block) {
  const uint32_t c = block_class_[block];
  if (kind_ != PolicyKind::Priced) return evictable_[c];
  return evictable_[c * (layers_ + 1) + (entries_[block].hinted_now ? layers_ : layer_of(block))];
}

void Policy::advance(int64_t tick) {
  forget_victims();
  tick_ = tick;
  const auto event = static_cast<size_t>(tick - 1);
  if (kind_ != PolicyKind::Belady || event >= events_.size()) return;
  for (const uint32_t block : events_[event]) {
    update(block, [&](Entry& entry) {
      while (entry.next < entry.future.size() && entry.future[entry.next] <= tick) ++entry.next;
    });
  }
}

void Policy::insert(uint32_t block, int64_t tick) {
  update(block, [&](Entry& entry) { entry.last = static_cast<double>(tick); });
}

void Policy::use(uint32_t block, int64_t tick) {
  const auto now = static_cast<double>(tick);
  update(block, [&](Entry& entry) {
    const double half_life = kind_ == PolicyKind::Priced ? half_life_ticks_ : half_life_;
    entry.last = now;
    entry.uses += 1;
    entry.frequency = entry.frequency * std::pow(2.0, -(now - entry.since) / half_life) + 1.0;
    entry.since = now;
    entry.score = 0;
    entry.hinted_now = false;
  });
  current_layer_ = layer_of(block);
  forget_victims();
}

void Policy::hint(uint32_t block, double p, int64_t deadline) {
  if (kind_ != PolicyKind::Forecast && kind_ != PolicyKind::Priced) return;
  hints_.erase({entries_[block].hinted_until, block});
  hints_.emplace(deadline, block);
  update(block, [&](Entry& entry) {
    entry.score = entry.hinted = p;
    entry.hinted_until = deadline;
    entry.hinted_now = true;
  });
}

void Policy::lapse(int64_t now) {
  forget_victims();
  now_ = now;
  while (!hints_.empty() && hints_.begin()->first < now) {
    const uint32_t block = hints_.begin()->second;
    hints_.erase(hints_.begin());
    update(block, [](Entry& entry) {
      entry.score = entry.hinted = 0;
      entry.hinted_now = false;
    });
  }
}

void Policy::join(uint32_t block) {
  Entry& entry = entries_[block];
  if (entry.evictable) return;
  forget_victims();
  entry.evictable = true;
  ++counts_[block_class_[block]];
  std::set<Key>& order = order_of(block);
  if (spare_.empty()) {
    order.insert(key(block));
  } else {
    spare_.value() = key(block);
    order.insert(std::move(spare_));
  }
}

void Policy::leave(uint32_t block) {
  Entry& entry = entries_[block];
  if (!entry.evictable) return;
  forget_victims();
  spare_ = order_of(block).extract(key(block));
  --counts_[block_class_[block]];
  entry.evictable = false;
}

int64_t Policy::victim(uint32_t shape_class) const {
  if (kind_ == PolicyKind::Priced) {
    known_victims_.resize(counts_.size(), kUnknown);
    int64_t& known = known_victims_[shape_class];
    if (known == kUnknown) known = priced_victim(shape_class);
    return known;
  }
  const std::set<Key>& order = evictable_[shape_class];
  return order.empty() ? -1 : static_cast<int64_t>(std::get<2>(*order.begin()));
}

bool Policy::admits(uint32_t block, uint32_t victim) const {
  if (kind_ == PolicyKind::Forecast) return entries_[victim].score < entries_[block].hinted;
  if (kind_ == PolicyKind::Belady) return next_use(block) < next_use(victim);
  if (kind_ == PolicyKind::Priced) return value(victim) < value(block);
  return true;
}

void Policy::set_weights(const std::vector<double>& weights) {
  if (weights.size() != entries_.size()) {
    throw StoreFailure(StoreFailure::Kind::Config, std::to_string(weights.size()) + " weights for " +
                                                       std::to_string(entries_.size()) +
                                                       " experts: give one for each");
  }
  for (const double weight : weights) {
    if (std::isnan(weight)) throw StoreFailure(StoreFailure::Kind::Config, "a weight is NaN: give numbers");
  }
  for (uint32_t b = 0; b < entries_.size(); ++b) {
    update(b, [&](Entry& entry) { entry.weight = weights[b]; });
  }
}

void Policy::set_future(const std::vector<std::vector<uint32_t>>& events) {
  for (const auto& event : events) {
    for (const uint32_t block : event) {
      if (block >= entries_.size()) {
        throw StoreFailure(StoreFailure::Kind::Config, "the future names block " + std::to_string(block) +
                                                           ", there are only " + std::to_string(entries_.size()));
      }
    }
  }
  std::vector<std::vector<int64_t>> uses(entries_.size());
  for (size_t i = 0; i < events.size(); ++i) {
    for (const uint32_t block : events[i]) {
      const auto tick = static_cast<int64_t>(i + 1);
      if (uses[block].empty() || uses[block].back() != tick) uses[block].push_back(tick);
    }
  }
  for (uint32_t b = 0; b < entries_.size(); ++b) {
    update(b, [&](Entry& entry) {
      entry.future = std::move(uses[b]);
      entry.next = 0;
      while (entry.next < entry.future.size() && entry.future[entry.next] <= tick_) ++entry.next;
    });
  }
  events_ = events;
}

}  // namespace specgate
