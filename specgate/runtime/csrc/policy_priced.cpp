// Eviction by expected use: the newest forecast where there is one, else how often and how lately a block was used.
#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"
#include "policy.h"

namespace specgate {

namespace {
constexpr size_t kPowers = 1024;  // of the discount that are kept
}

void Policy::set_reuse(const Reuse& reuse) {
  const bool good = std::isfinite(reuse.half_life) && reuse.half_life > 0 && reuse.discount >= 0 &&
                    reuse.discount <= 1 && std::isfinite(reuse.intercept) && std::isfinite(reuse.slope) &&
                    reuse.slope >= 0;
  if (!good) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "half_life=" + std::to_string(reuse.half_life) + ", discount=" +
                           std::to_string(reuse.discount) + ", intercept=" + std::to_string(reuse.intercept) +
                           " and slope=" + std::to_string(reuse.slope) +
                           " say nothing of reuse: fit them (specgate.policy.reuse)");
  }
  if (kind_ != PolicyKind::Priced) return;
  std::vector<uint32_t> evictable;
  for (uint32_t b = 0; b < entries_.size(); ++b) {
    if (!entries_[b].evictable) continue;
    evictable.push_back(b);
    leave(b);
  }
  forget_victims();
  reuse_ = reuse;
  const auto blocks = static_cast<uint32_t>(entries_.size());
  layers_ = reuse.experts ? (blocks + reuse.experts - 1) / reuse.experts : 1;
  layers_ = std::max<uint32_t>(layers_, 1);
  half_life_ticks_ = reuse.half_life * layers_;
  share_ = 1.0 - std::pow(2.0, -1.0 / reuse_.half_life);
  discounts_.resize(kPowers);
  for (size_t n = 0; n < kPowers; ++n) discounts_[n] = std::pow(reuse_.discount, static_cast<double>(n));
  reused_.assign(entries_.size(), {});
  evictable_.assign(counts_.size() * (layers_ + 1), {});
  for (const uint32_t b : evictable) join(b);
}

/// Events until the layer runs again, 1 to L, if the layers run in turns.
int64_t Policy::next_event(uint32_t layer) const {
  return static_cast<int64_t>((layer + layers_ - current_layer_ % layers_ - 1) % layers_) + 1;
}

double Policy::discounted(int64_t events) const {
  const auto n = static_cast<size_t>(events);
  return n < discounts_.size() ? discounts_[n] : std::pow(reuse_.discount, static_cast<double>(events));
}

double Policy::reused(uint32_t block, int64_t ahead) const {
  const Entry& entry = entries_[block];
  const double then = static_cast<double>(tick_ + ahead);
  Reused& known = reused_[block];
  if (known.then != then || known.frequency != entry.frequency || known.since != entry.since) {
    const double uses = share_ * entry.frequency * std::pow(2.0, -(then - entry.since) / half_life_ticks_);
    const double chance = std::min(1.0, std::exp(reuse_.intercept + reuse_.slope * std::log(uses + 1e-6)));
    known = {then, entry.frequency, entry.since, chance};
  }
  return known.chance;
}

double Policy::value(uint32_t block) const {
  const Entry& entry = entries_[block];
  const int64_t ahead = next_event(layer_of(block));
  const double q = reused(block, ahead);
  if (!entry.hinted_now) return discounted(ahead) * q;
  const int64_t due = std::max<int64_t>(entry.hinted_until - now_, 1);
  return entry.score * discounted(due) + (1.0 - entry.score) * discounted(ahead + layers_) * q;
}

int64_t Policy::priced_victim(uint32_t shape_class) const {
  std::tuple<double, double, uint32_t> least{std::numeric_limits<double>::infinity(), 0, 0};
  int64_t victim = -1;
  const auto consider = [&](const Key& key) {
    const uint32_t block = std::get<2>(key);
    const std::tuple<double, double, uint32_t> own{value(block), entries_[block].last, block};
    if (victim >= 0 && !(own < least)) return;
    least = own;
    victim = block;
  };
  const size_t first = static_cast<size_t>(shape_class) * (layers_ + 1);
  for (uint32_t layer = 0; layer < layers_; ++layer) {
    const std::set<Key>& order = evictable_[first + layer];
    if (!order.empty()) consider(*order.begin());
  }
  for (const Key& key : evictable_[first + layers_]) consider(key);
  return victim;
}

}  // namespace specgate
