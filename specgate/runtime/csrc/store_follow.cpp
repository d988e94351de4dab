// The thread that reads forecasts from a ring: on the way of a decoded token no Python runs and the host never waits.
#include <sys/prctl.h>

#include <algorithm>

#include "error.h"
#include "store.h"

namespace specgate {

namespace {

constexpr int kSpins = 2000;  // polls that find nothing before the thread begins to sleep
constexpr auto kNap = std::chrono::microseconds(20);
constexpr int64_t kEarly = 4;  // launches

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
    // an expert is used when its layer's own launch is still to come, and the deadline below is that of the next one;
    // this thread may be late besides
    if (trust_) trust_->set_early(std::min<int64_t>(kEarly, layers));
  }
  following_ = true;
  follower_ = std::thread([this, ring = std::move(ring), first_block, experts, layers] {
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);  // ns: naps end when they should
    ForecastReader reader(ring);
    Foreseen foreseen;
    std::vector<Foreknown> foreknown;
    int64_t base = -1;
    int idle = 0;
    while (following_.load(std::memory_order_relaxed)) {
      if (!reader.poll(foreseen)) {
        if (++idle > kSpins) std::this_thread::sleep_for(kNap);
        continue;
      }
      idle = 0;
      const auto sequence = static_cast<int64_t>(foreseen.sequence);
      foreknown.clear();
      try {
        {
          const std::lock_guard lock(mutex_);
          require_open();
          if (base < 0) base = ledger_->now() + 1 - sequence;  // the clock goes on from where it is
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

void Store::unfollow() {
  following_ = false;
  if (follower_.joinable()) follower_.join();
}

}  // namespace specgate
