// Eviction policies: which evictable block of a shape class goes first.
//
// All keep the evictable blocks of each class in an ordered set, so that every operation costs O(log S) for S
// evictable blocks. The least key goes first; equal keys by block number. docs/runtime.md states the keys.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace specgate {

/// What decides who is evicted.
enum class PolicyKind { Lru, Lfu, Lfru, Static, Forecast, Belady, Priced };

/// From its name: lru, lfu, lfru, static, forecast, belady, priced. Throws StoreFailure(Config) for another.
PolicyKind policy_kind(const std::string& name);

/// What `priced` knows of reuse (specgate.policy.reuse fits it). Block b is of layer b / experts; a step runs each once.
struct Reuse {
  uint32_t experts = 0;   ///< per layer; 0: all blocks are of one layer
  double half_life = 64;  ///< of uses, in steps
  double discount = 0.99; ///< per event
  double intercept = 0, slope = 1;
};

/// The order of eviction of one tier.
class Policy {
 public:
  /// `block_class[b]`: shape class of block b; `half_life` in ticks, for lfru.
  Policy(PolicyKind kind, const std::vector<uint32_t>& block_class, uint32_t classes, double half_life);

  /// A new event: for belady, the future moves on.
  void advance(int64_t tick);
  /// The block became resident.
  void insert(uint32_t block, int64_t tick);
  /// The block was asked for (resident or not).
  void use(uint32_t block, int64_t tick);
  /// The newest forecast says that the block is used with probability p until `deadline`.
  void hint(uint32_t block, double p, int64_t deadline);
  /// Forecasts whose deadline is before `now` count no more.
  void lapse(int64_t now);
  /// The block may be evicted from now on / may not.
  void join(uint32_t block);
  void leave(uint32_t block);
  /// The evictable block of the class that goes first; -1 if there is none.
  int64_t victim(uint32_t shape_class) const;
  /// Whether a speculative load of `block` may take the place of `victim`.
  bool admits(uint32_t block, uint32_t victim) const;

  void set_weights(const std::vector<double>& weights);
  /// Throws StoreFailure(Config) for numbers that make no sense.
  void set_reuse(const Reuse& reuse);
  /// What `priced` thinks that the block is worth now: its expected use, discounted.
  double value(uint32_t block) const;
  /// `events[i]`: blocks of the (i + 1)-th event.
  void set_future(const std::vector<std::vector<uint32_t>>& events);
  /// How many blocks of the class may be evicted.
  int64_t evictable_count(uint32_t shape_class) const {
    return counts_[shape_class];
  }
  /// Whether the block is in the evictable set.
  bool evictable(uint32_t block) const { return entries_[block].evictable; }

 private:
  struct Entry {
    double last = 0, uses = 0, frequency = 0, since = 0, weight = 0, score = 0, hinted = 0;
    int64_t hinted_until = 0;
    bool evictable = false, hinted_now = false;  // hinted_now: a forecast of it counts (priced)
    std::vector<int64_t> future;  // ticks, ascending
    size_t next = 0;              // first of `future` after the current tick
  };
  using Key = std::tuple<double, double, uint32_t>;

  Key key(uint32_t block) const;
  std::set<Key>& order_of(uint32_t block);
  uint32_t layer_of(uint32_t block) const { return reuse_.experts ? block / reuse_.experts : 0; }
  int64_t next_event(uint32_t layer) const;
  double discounted(int64_t events) const;       // discount to this power
  double reused(uint32_t block, int64_t ahead) const;  // chance of a use in the layer's next event
  int64_t priced_victim(uint32_t shape_class) const;
  double next_use(uint32_t block) const;
  /// Changes the block's entry and keeps the ordered set right.
  template <typename Change>
  void update(uint32_t block, Change change);

  PolicyKind kind_;
  double half_life_;
  const std::vector<uint32_t>& block_class_;
  std::vector<Entry> entries_;
  std::vector<std::set<Key>> evictable_;  // per class; for priced, per class and layer, and one of hinted ones
  std::vector<int64_t> counts_;           // per class
  Reuse reuse_;
  uint32_t layers_ = 1, current_layer_ = 0;  // of priced
  double half_life_ticks_ = 64;
  double share_ = 0;               // of uses in the step of the last half-life that counts
  std::vector<double> discounts_;  // powers of the discount
  /// What `reused` said last of a block, and of what: it is asked for many times between two events of a layer.
  struct Reused {
    double then = -1, frequency = 0, since = 0, chance = 0;
  };
  mutable std::vector<Reused> reused_;
  /// Victims of priced per class until anything changes: the queue of forecasts asks for each of them.
  mutable std::vector<int64_t> known_victims_;
  static constexpr int64_t kUnknown = -2;
  void forget_victims() {
    for (int64_t& victim : known_victims_) victim = kUnknown;
  }
  std::set<Key>::node_type spare_;        // of the last that left: spares an allocation
  std::vector<std::vector<uint32_t>> events_;
  std::set<std::pair<int64_t, uint32_t>> hints_;  // (deadline, block) of forecasts that count
  int64_t tick_ = 0, now_ = 0;
};

}  // namespace specgate
