// The thread that judges forecasts: whoever computes hands them over and goes on.
#include <sys/prctl.h>

#include "error.h"
#include "store.h"

namespace specgate {

namespace {

constexpr size_t kMostBatches = 64;   // that wait; older ones are of the past by then
constexpr size_t kBetweenLooks = 8;   // forecasts judged before a caller who waits goes first
constexpr auto kNap = std::chrono::microseconds(20);
constexpr int kNaps = 250;            // without work before the thread has to be woken, which costs its caller

}  // namespace

void Store::prefetch_all(const std::vector<Foreknown>& foreknown) {
  std::unique_lock lock(mutex_);
  require_open();
  bool queued = false;
  victims_.clear();
  for (size_t i = 0; i < foreknown.size(); ++i) {
    if (i % kBetweenLooks == kBetweenLooks - 1 && callers_.load(std::memory_order_relaxed) > 0) {
      give_way(lock, callers_);
      require_open();
      victims_.clear();
    }
    queued |= ask(foreknown[i]) == Asked::Queued;
  }
  if (queued) pump();
}

void Store::foresee(std::vector<Foreknown> foreknown) {
  for (const Foreknown& f : foreknown) {
    if (f.block >= size() || !(f.p >= 0 && f.p <= 1)) {
      throw StoreFailure(StoreFailure::Kind::Config,
                         "a forecast of expert block " + std::to_string(f.block) + " with p=" + std::to_string(f.p) +
                             ": there are " + std::to_string(size()) + " blocks, and p must be 0 to 1");
    }
  }
  {
    const auto lock = spin_lock(mutex_, callers_);
    require_open();
  }
  {
    const std::lock_guard lock(asked_mutex_);
    if (background_ends_) return;
    if (!background_on_) background_ = std::thread([this] { background(); });
    background_on_ = true;
    if (asked_.size() >= kMostBatches) asked_.pop_front();
    asked_.push_back(std::move(foreknown));
    busy_ = true;
    if (!asleep_) return;
  }
  asked_changed_.notify_one();
}

/// The queue of forecasts is looked through by the thread that judges them, if there is one. (mutex_ is held)
void Store::pump_later() {
  bool later = false, asleep = false;
  {
    const std::lock_guard lock(asked_mutex_);
    later = background_on_ && !background_ends_;
    if (later) kicked_ = busy_ = true;
    asleep = asleep_;
  }
  if (!later) pump();
  if (later && asleep) asked_changed_.notify_one();
}

void Store::background() {
  prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);  // ns: naps end when they should
  for (;;) {
    std::vector<Foreknown> batch;
    bool kicked = false;
    for (int i = 0; i < kNaps && !busy_; ++i) std::this_thread::sleep_for(kNap);
    {
      std::unique_lock lock(asked_mutex_);
      asleep_ = true;
      asked_changed_.wait(lock, [this] { return background_ends_ || kicked_ || !asked_.empty(); });
      asleep_ = false;
      if (background_ends_) return;
      if (!asked_.empty()) {
        batch = std::move(asked_.front());
        asked_.pop_front();
      }
      std::swap(kicked, kicked_);
    }
    try {
      prefetch_all(batch);
      std::unique_lock lock(mutex_);
      if (kicked) pump();
      const std::lock_guard asked(asked_mutex_);
      busy_ = kicked_ || !asked_.empty();
    } catch (const StoreFailure&) {  // closed or broken: whoever needs an expert is told
      const std::lock_guard lock(mutex_);
      busy_ = false;
    }
    if (!busy_) changed_.notify_all();
  }
}

void Store::stop_background() {
  {
    const std::lock_guard lock(asked_mutex_);
    background_ends_ = true;
  }
  asked_changed_.notify_all();
  if (background_.joinable()) background_.join();
  busy_ = false;
}

}  // namespace specgate
