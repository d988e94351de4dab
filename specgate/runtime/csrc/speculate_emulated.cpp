// The device's kernel on the CPU, one block and one thread after the other, in an order of choice: what it
// computes may not depend on that order. For tests, on machines without a GPU.
#include <numeric>

#include "speculate_phases.h"

namespace specgate {

namespace {

using namespace speculation;

constexpr int kBlocks = 5;

struct EmulatedBlock {
  int index, count, threads;
  float* shared;
  int order;  // bit 0: threads from last to first

  template <class F>
  void each(int n, F&& f) {
    for (int i = 0; i < n; ++i) f(order & 1 ? n - 1 - i : i);
  }
  /// Bit i of words[i / 32] says whether f(i); bits beyond n are 0.
  template <class F>
  void ballot(int n, F&& f, uint32_t* words) {
    each((n + 31) / 32, [&](int word) {
      words[word] = 0;
      for (int i = 32 * word; i < n && i < 32 * word + 32; ++i) words[word] |= (f(i) ? 1u : 0u) << (i % 32);
    });
  }
  static float load(const float* at) { return *at; }
  static void load_16(const void* at, uint32_t (&words)[4]) { std::memcpy(words, at, 16); }
  static int bits_set(uint32_t bits) { return __builtin_popcount(bits); }
  static void before_storing() {}
  static void store(uint64_t* at, uint64_t word) {
    std::atomic_ref<uint64_t>(*at).store(word, std::memory_order_release);
  }
  static void publish(uint64_t* at, uint64_t word) { store(at, word); }
};

class EmulatedSpeculation : public Speculation {
 public:
  EmulatedSpeculation(const SpeculationModel& model, int slots, int order)
      : Speculation(std::make_shared<ForecastRing>(slots, model.sizes.horizons * model.sizes.experts)),
        model_(model),
        order_(order),
        scratch_(scratch_floats(model.sizes)),
        shared_(kBlocks * static_cast<size_t>(shared_floats(model.sizes))) {}

  void launch(const SpeculationInput& input, uintptr_t) override {
    check_input(model_, input);
    SpeculationArgs a{};
    a.model = model_;
    a.input = input;
    a.plan = make_plan(model_.sizes, input.layer, input.batch);
    a.at = make_scratch(model_.sizes, a.plan, input.batch);
    a.scratch = scratch_.data();
    a.sequence = &sequence_;
    a.ring = ring_->view();
    if (model_.sizes.bf16) {
      run<BFloat16>(a);
    } else {
      run<float>(a);
    }
  }

 private:
  template <class M>
  void run(const SpeculationArgs& a) {
    // What a kernel finds in its memory is arbitrary: here it is not a number.
    std::fill(scratch_.begin(), scratch_.end(), NAN);
    std::fill(shared_.begin(), shared_.end(), NAN);
    unsigned char* slot = a.ring.memory + (sequence_ + 1) % a.ring.slots * a.ring.stride;
    EmulatedBlock::store(reinterpret_cast<uint64_t*>(slot), 0);
    std::vector<EmulatedBlock> blocks;
    for (int i = 0; i < kBlocks; ++i)
      blocks.push_back({i, kBlocks, kThreads, shared_.data() + i * (shared_.size() / kBlocks), order_});
    const auto everyone = [&](auto&& act) {
      for (int i = 0; i < kBlocks; ++i) act(blocks[order_ & 2 ? kBlocks - 1 - i : i]);
    };
    everyone([&](EmulatedBlock& block) { begin(block, a); });
    for (int phase = 0; phase < a.plan.phases; ++phase)
      everyone([&](EmulatedBlock& block) { run_phase<M>(block, a, phase); });
    merge(blocks[order_ & 4 ? kBlocks - 1 : 0], a);
  }

  SpeculationModel model_;
  int order_;
  std::vector<float> scratch_, shared_;
  uint64_t sequence_ = 0;
};

}  // namespace

std::unique_ptr<Speculation> make_speculation_emulated(const SpeculationModel& model, int slots, int order) {
  check_model(model);
  return std::make_unique<EmulatedSpeculation>(model, slots, order);
}

}  // namespace specgate
