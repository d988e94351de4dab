// How far forecasts may be trusted: what those of a band of p and of a horizon said against what came true.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <vector>

namespace specgate {

/// Corrects probabilities by what happens: those of a cell (a band of p, a horizon) have their odds multiplied by
/// (odds of a use, as seen) / (odds of a use, as said), kPrior forecasts of each kind added to both. So a forecast that
/// is right stays as it is, and the order within a band does too. Of a cell's forecasts, older ones count half after
/// kHalf. Time is the number of an event.
class Trust {
 public:
  static constexpr std::array<double, 9> kEdges = {0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9};  // of bands
  static constexpr size_t kHorizons = 6;  // 1, 2, 3, 4, 5 to 8, more
  static constexpr double kPrior = 16, kHalf = 8192, kCertain = 0.999;
  static constexpr int64_t kFar = 1024;  ///< events ahead beyond which nothing is learned

  /// What was seen of a cell.
  struct Seen {
    double said = 0, stated = 0, used = 0;  ///< forecasts, the sum of their p, those that came true
  };

  /// `early`: events that a use may come before its deadline, where deadlines are not exact.
  explicit Trust(size_t blocks, int64_t early = 0) : early_(early), used_at_(blocks, kLongAgo) {}

  void set_early(int64_t early) { early_ = early; }

  /// The chance that a forecast of p for `ahead` events from now comes true. 0 stays 0.
  double of(double p, int64_t ahead) const {
    const Seen& seen = seen_[cell(p, ahead)];
    if (p <= 0 || seen.said <= 0) return p;
    const double stated = std::min(p, kCertain);
    const double odds = stated / (1.0 - stated) * ((seen.used + kPrior) / (seen.stated + kPrior)) *
                        ((seen.said - seen.stated + kPrior) / (seen.said - seen.used + kPrior));
    return odds / (1.0 + odds);
  }
  /// At the time `now` it was said that the block is used at `deadline` with probability p.
  void said(uint32_t block, double p, int64_t deadline, int64_t now) {
    if (p <= 0 || deadline <= now || deadline - now > kFar) return;
    if (due_.empty()) first_ = now;
    if (deadline < first_) return;
    const auto at = static_cast<size_t>(deadline - first_);
    if (due_.size() <= at) due_.resize(at + 1);
    due_[at].push_back({block, static_cast<uint8_t>(cell(p, deadline - now)), std::min(p, kCertain)});
  }
  /// The event `now` uses these.
  void used(const std::vector<uint32_t>& blocks, int64_t now) {
    for (const uint32_t b : blocks) used_at_[b] = now;
  }
  /// Looks at what was due; the time is `now`, and what is used then has been told.
  void settle(int64_t now) {
    while (!due_.empty() && first_ <= now) {
      for (const Open& open : due_.front()) {
        const int64_t off = used_at_[open.block] - first_;
        count(seen_[open.cell], open.p, off >= -early_ && off <= 0);
      }
      due_.pop_front();
      ++first_;
    }
  }

  Seen total() const { return total_; }  ///< of all cells, nothing forgotten

 private:
  struct Open {
    uint32_t block;
    uint8_t cell;
    double p;
  };
  static constexpr int64_t kLongAgo = std::numeric_limits<int64_t>::min() / 4;

  static size_t cell(double p, int64_t ahead) {
    const auto band = static_cast<size_t>(std::upper_bound(kEdges.begin(), kEdges.end(), p) - kEdges.begin());
    const size_t horizon = ahead <= 4 ? static_cast<size_t>(std::max<int64_t>(ahead, 1)) - 1 : ahead <= 8 ? 4 : 5;
    return horizon * (kEdges.size() + 1) + band;
  }
  void count(Seen& seen, double p, bool used) {
    for (Seen* one : {&seen, &total_}) {
      one->said += 1;
      one->stated += p;
      one->used += used ? 1 : 0;
    }
    if (seen.said >= 2 * kHalf) seen.said *= 0.5, seen.stated *= 0.5, seen.used *= 0.5;
  }

  int64_t early_;
  std::array<Seen, kHorizons*(kEdges.size() + 1)> seen_{};
  Seen total_;
  std::vector<int64_t> used_at_;       // per block: the latest event that used it
  std::deque<std::vector<Open>> due_;  // what was said about first_, first_ + 1, ...
  int64_t first_ = 0;
};

}  // namespace specgate
