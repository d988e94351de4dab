// Which block goes first: the orders of eviction, decayed uses, live hints and the value of a block.
//
// docs/simulator.md states the keys. Blocks that may go stand in indexed heaps: one per pool of slots, or,
// for `priced`, two per layer (without and with a live hint), whose order does not change while time passes.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator_heap.h"
#include "simulator_input.h"

namespace specgate::sim {

constexpr int64_t kNone = -1;

class Eviction {
 public:
  Eviction(const RuleTable& rules, int64_t layers, int64_t experts, int64_t pools);
  void reset();

  /// Event n is the one worked on from now: its hints lapse.
  void begin_event(int64_t n);
  /// The event demands the block, which is in no heap now. `next`: the next event that does (belady).
  void use(uint32_t b, double next);
  /// The block has come to the device by a prefetch.
  void land(uint32_t b) {
    blocks_[b].last = static_cast<double>(n_ + 1);
    blocks_[b].marked = false;
  }
  /// The block may be evicted from now on / may not.
  void enter(uint32_t b);
  void leave(uint32_t b);
  /// The newest forecast of the block: used with probability p by event e.
  void hint(uint32_t b, double p, int64_t e);
  void first_use(uint32_t b, double next) { blocks_[b].next = next; }

  /// The block of the pool that goes first; kNone if none may.
  int64_t victim(size_t pool);
  /// Whether a prefetch of `b` for event e with probability p may take the victim's place.
  bool admits(uint32_t b, double p, int64_t e, uint32_t victim);
  /// Expected use, discounted.
  double value(uint32_t b);

  // Admission by `gate`: whether the block, used by this event, is no hotter than the coldest one that stays.
  bool cold(uint32_t b, size_t pool) const;
  void mark(uint32_t b, bool marked) { blocks_[b].marked = marked; }
  bool marked(uint32_t b) const { return blocks_[b].marked; }

  bool hinted(uint32_t b) const { return blocks_[b].hint_event > n_; }
  double hint_p(uint32_t b) const { return blocks_[b].p; }
  int64_t hint_event(uint32_t b) const { return blocks_[b].hint_event; }
  bool in_heap(uint32_t b) const { return places_[b] >= 0; }

 private:
  struct Block {
    double last = 0, used = 0, previous = 0, uses = 0;
    double frequency = 0, heat = 0;  // heat: the key of the frequency, whose order does not change with time
    int64_t since = 0;               // step of `frequency`
    double next = 0;
    double p = 0;
    int64_t hint_event = kNone;
    double q = 0;
    int64_t q_step = -2;  // of `q`
    bool marked = false, listed = false;
    int64_t layer = 0;
  };

  int64_t distance(int64_t layer) const;  // events from n to the next one of the layer
  double power(int64_t exponent) const;   // of the discount
  double halved(int64_t steps) const;
  double q(Block& block);
  double hinted_key(uint32_t b);
  Key key(uint32_t b);
  BlockHeap& heap_of(uint32_t b);
  BlockHeap& gate_of(uint32_t b) { return gate_[pools_ == 1 ? 0 : static_cast<size_t>(blocks_[b].layer)]; }
  void rekey(uint32_t b);
  void relist(int64_t layer);

  const RuleTable& rules_;
  int64_t layers_, experts_, pools_;
  bool counts_, hints_, priced_;  // whether frequencies are kept, whether keys depend on hints
  std::vector<Block> blocks_;
  std::vector<int32_t> places_, gate_places_;
  std::vector<BlockHeap> heaps_;  // per pool, or 2 per layer
  std::vector<BlockHeap> gate_;   // per pool, by heat
  std::vector<std::vector<uint32_t>> listed_;  // per layer: blocks with a hint that may be live
  std::vector<double> powers_, halves_;
  int64_t n_ = kNone, layer_ = kNone, step_ = kNone;
};

}  // namespace specgate::sim
