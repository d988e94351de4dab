// The thread that reads forecasts from a ring: on the way of a decoded token no Python runs and the host never waits.
#include <sys/prctl.h>

#include <algorithm>

#include "error.h"
#include "store.h"

namespace specgate {

namespace {

constexpr int kSpins = 2000;  // polls that find nothing before the thread begins to sleep
constexpr auto kNap = std::chrono::microseconds(20);
constexpr int64_t kEarly = 2;  // launches

}  // namespace

void Store::follow(std::shared_ptr<const ForecastRing> ring, uint32_t first_block, uint32_t experts, uint32_t layers) {
  if (first_block + uint64_t{experts} * layers > size()) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "forecasts about " + std::to_string(layers) + " layers of " + std::to_string(experts) +
                           " experts from block " + std::to_string(first_block) + " do not fit a store of " +
                           std::to_string(size()) + " experts: they are another model's");
  }
  unfollow();
  {
    const std::lock_guard lock(mutex_);
    require_open();
    // an expert is used before its layer's own launch, and the deadline below is that of the one after
    if (trust_) trust_->set_early(std::min<int64_t>(kEarly, layers));
    ring_ = ring;
    newest_ = 0;
    first_launch_.reset();
  }
  following_ = true;
  follower_ = std::thread([this, ring = std::move(ring), first_block, experts, layers] {
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);  // ns: naps end when they should
    ForecastReader reader(ring);
    Foreseen foreseen;
    std::vector<Foreknown> foreknown;
    int idle = 0;
    while (following_.load(std::memory_order_relaxed)) {
      if (!reader.poll(foreseen)) {
        if (++idle > kSpins) std::this_thread::sleep_for(kNap);
        continue;
      }
      idle = 0;
      const auto sequence = static_cast<int64_t>(foreseen.sequence);
      int64_t base = 0;
      foreknown.clear();
      try {
        {
          const std::lock_guard lock(mutex_);
          require_open();
          if (!first_launch_) first_launch_ = ledger_->now() + 1 - sequence;  // the clock goes on from where it is
          base = *first_launch_;
          advance_clock(std::max(ledger_->now(), base + sequence));
          ++counters_.followed;
          counters_.lost = static_cast<int64_t>(reader.lost());
        }
        for (const ForecastEntry& entry : foreseen.entries) {
          if (static_cast<uint32_t>(entry.layer) >= layers || static_cast<uint32_t>(entry.expert) >= experts) continue;
          // one launch comes before the first layer of each token: a target beyond it is due one launch later
          foreknown.push_back({first_block + static_cast<uint32_t>(entry.layer) * experts +
                                   static_cast<uint32_t>(entry.expert),
                               std::clamp<double>(entry.p, 0.0, 1.0), base + sequence + entry.ahead + 1,
                               Target::Device});
        }
        prefetch_all(foreknown);
      } catch (const StoreFailure&) {
        return;  // closed or broken: whoever needs an expert is told
      }
    }
  });
}

/// The time of what is demanded now. This thread may be ahead of the one that follows. (mutex_ is held)
int64_t Store::clock_of_use() {
  if (!ring_ || !first_launch_) return ledger_->now();
  newest_ = ring_->newest(newest_);
  return std::max(ledger_->now(), *first_launch_ + static_cast<int64_t>(newest_));
}

void Store::unfollow() {
  following_ = false;
  if (follower_.joinable()) follower_.join();
  const std::lock_guard lock(mutex_);
  ring_.reset();
  if (trust_) trust_->set_early(0);
}

}  // namespace specgate
