// The kernel's source against the plain CPU code; on real threads, so that ThreadSanitizer sees what a GPU
// would race on.
#include <barrier>
#include <cmath>
#include <thread>

#include "check.h"
#include "speculate_phases.h"
#include "speculation_model.h"

using namespace specgate;
using namespace specgate::speculation;
using specgate::test::RandomInput;
using specgate::test::RandomModel;

namespace {

/// Each thread of a block is a thread of the system; `each` ends with a barrier of the block, as on the
/// device.
struct ThreadedBlock {
  int index, count, threads;
  float* shared;
  int thread;
  std::barrier<>* block_barrier;

  template <class F>
  void each(int n, F&& f) {
    for (int i = thread; i < n; i += threads) f(i);
    block_barrier->arrive_and_wait();
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

/// The device's control flow: grid barriers between the phases, the last block merges.
class ThreadedSpeculation : public Speculation {
 public:
  static constexpr int kBlocks = 3, kBlockThreads = 6;

  explicit ThreadedSpeculation(const SpeculationModel& model)
      : Speculation(std::make_shared<ForecastRing>(4, model.sizes.horizons * model.sizes.experts)),
        model_(model),
        scratch_(scratch_floats(model.sizes), NAN),
        counters_(kCounters) {}

  void launch(const SpeculationInput& input, uintptr_t) override {
    SpeculationArgs a{};
    a.model = model_;
    a.input = input;
    a.plan = make_plan(model_.sizes, input.layer, input.batch);
    a.at = make_scratch(model_.sizes, a.plan, input.batch);
    a.scratch = scratch_.data();
    a.counters = counters_.data();
    a.sequence = &sequence_;
    a.ring = ring_->view();
    std::barrier<> grid(kBlocks);
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    std::vector<std::vector<float>> shared(kBlocks, std::vector<float>(shared_floats(model_.sizes), NAN));
    std::vector<std::thread> threads;
    std::vector<char> last(kBlocks, 0);
    for (int b = 0; b < kBlocks; ++b) barriers.push_back(std::make_unique<std::barrier<>>(kBlockThreads));
    for (int b = 0; b < kBlocks; ++b)
      for (int t = 0; t < kBlockThreads; ++t)
        threads.emplace_back([&, b, t] {
          ThreadedBlock block{b, kBlocks, kBlockThreads, shared[b].data(), t, barriers[b].get()};
          begin(block, a);
          const auto wait_for_grid = [&] {
            barriers[b]->arrive_and_wait();
            if (t == 0) grid.arrive_and_wait();
            barriers[b]->arrive_and_wait();
          };
          if (a.plan.spread) wait_for_grid();
          for (int phase = 0; phase < a.plan.phases; ++phase) {
            model_.sizes.bf16 ? run_phase<BFloat16>(block, a, phase) : run_phase<float>(block, a, phase);
            if (phase + 1 == a.plan.phases) break;
            wait_for_grid();
          }
          barriers[b]->arrive_and_wait();
          if (t == 0)
            last[b] = std::atomic_ref<uint32_t>(a.counters[kCounters - 1]).fetch_add(1) == kBlocks - 1;
          barriers[b]->arrive_and_wait();
          if (!last[b]) return;
          merge(block, a);
          if (t == 0) a.counters[kCounters - 1] = 0;
        });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  SpeculationModel model_;
  std::vector<float> scratch_;
  std::vector<uint32_t> counters_;
  uint64_t sequence_ = 0;
};

/// The largest difference in p; infinite if the forecasts list other experts.
double difference(Speculation& one, Speculation& other) {
  Foreseen a, b;
  ForecastReader read_a(one.ring()), read_b(other.ring());
  CHECK(read_a.poll_newest(a) && read_b.poll_newest(b));
  if (a.entries.size() != b.entries.size() || a.ignored != b.ignored || a.sequence != b.sequence)
    return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < a.entries.size(); ++i) {
    const ForecastEntry &x = a.entries[i], &y = b.entries[i];
    if (x.layer != y.layer || x.expert != y.expert || x.ahead != y.ahead) return INFINITY;
    worst = std::max(worst, static_cast<double>(std::abs(x.p - y.p)));
  }
  return worst;
}

double difference_of_states(const RandomModel& one, const RandomModel& other) {
  double worst = 0;
  for (size_t i = 0; i < one.floats_of_state.size(); ++i)
    for (size_t j = 0; j < one.floats_of_state[i].second; ++j)
      worst = std::max(worst, static_cast<double>(std::abs(one.floats_of_state[i].first[j] -
                                                           other.floats_of_state[i].first[j])));
  return worst;
}

template <class Make>
void compare(const SpeculationSizes& sizes, int tokens, Make make) {
  RandomModel plain(sizes, 1), ours(sizes, 1);
  const auto expected = make_speculation_cpu(plain.model, 4);
  const std::unique_ptr<Speculation> found = make(ours.model);
  unsigned seed = 0;
  for (int t = 0; t < tokens; ++t)
    for (int layer = -1; layer < sizes.layers; ++layer) {
      RandomInput in(sizes, layer, sizes.batch, ++seed);
      if (t == 1 && sizes.hidden)
        in.hidden[0] = NAN;  // one sequence is refused once and must not stay poisoned
      expected->launch(in.input, 0);
      found->launch(in.input, 0);
      CHECK(difference(*expected, *found) < 1e-5);
      CHECK(difference_of_states(plain, ours) < 1e-4);
    }
}

void emulation_agrees() {
  for (const int batch : {1, 3, 18})
    for (const int bf16 : {0, 1})
      for (const int heads : {0, 2}) {
        SpeculationSizes sizes = specgate::test::small_sizes(batch);
        sizes.bf16 = bf16;
        sizes.heads = heads;
        sizes.context = 3;  // and the memory goes round
        compare(sizes, 5, [](const SpeculationModel& m) { return make_speculation_emulated(m, 4, 0); });
      }
  SpeculationSizes sizes = specgate::test::small_sizes(2);
  compare(sizes, 75, [](const SpeculationModel& m) { return make_speculation_emulated(m, 4, 3); });
}

/// A different order of threads and of blocks changes not one bit.
void order_is_nothing() {
  const SpeculationSizes sizes = specgate::test::small_sizes(6);
  std::vector<std::unique_ptr<RandomModel>> models;
  std::vector<std::unique_ptr<Speculation>> runs;
  for (int order = 0; order < 8; ++order) {
    models.push_back(std::make_unique<RandomModel>(sizes, 2));
    runs.push_back(make_speculation_emulated(models.back()->model, 4, order));
  }
  unsigned seed = 0;
  for (int t = 0; t < 4; ++t)
    for (int layer = -1; layer < sizes.layers; ++layer) {
      const RandomInput in(sizes, layer, sizes.batch, ++seed);
      for (const auto& run : runs) run->launch(in.input, 0);
      for (int order = 1; order < 8; ++order) {
        CHECK(difference(*runs[0], *runs[order]) == 0.0);
        CHECK(difference_of_states(*models[0], *models[order]) == 0.0);
      }
    }
}

void threads_agree() {
  for (const int batch : {1, 6}) {
    SpeculationSizes sizes = specgate::test::small_sizes(batch);
    sizes.softmax = batch == 1;
    sizes.bf16 = batch == 1;
    compare(sizes, 2, [](const SpeculationModel& m) { return std::make_unique<ThreadedSpeculation>(m); });
    sizes.width = sizes.heads = 0;
    compare(sizes, 1, [](const SpeculationModel& m) { return std::make_unique<ThreadedSpeculation>(m); });
  }
}

/// A reader that is overtaken sees whole forecasts or none.
void ring_is_whole() {
  SpeculationSizes sizes;
  sizes.layers = 1, sizes.experts = 64, sizes.top_k = 2, sizes.horizons = 1, sizes.vocab = 1000;
  sizes.table_rows = 1000, sizes.table_columns = 1;
  RandomModel random(sizes, 3);
  float* table = random.make<float>(1000 * 64);  // row r gives every expert the same p, and each row another
  for (int row = 0; row < 1000; ++row)
    for (int e = 0; e < 64; ++e) table[row * 64 + e] = static_cast<float>(row) * 0.01f - 5.0f;
  float* ones = random.make<float>(2);
  ones[0] = ones[1] = 1.0f;
  random.model.weights.table = table;
  random.model.weights.scale = ones;
  random.model.weights.offset = random.make<float>(2);
  const auto run = make_speculation_cpu(random.model, 2);
  constexpr uint64_t kLaunches = 20000;
  std::thread writer([&] {
    for (uint64_t i = 1; i <= kLaunches; ++i) {
      const int64_t id = static_cast<int64_t>(i % 1000);
      SpeculationInput input;
      input.ids = &id;
      run->launch(input, 0);
    }
  });
  ForecastReader reader(run->ring());
  Foreseen found;
  uint64_t seen = 0, before = 0;
  while (before < kLaunches) {
    if (!reader.poll(found)) continue;
    ++seen;
    CHECK(found.sequence > before);
    before = found.sequence;
    const double logit = static_cast<double>(found.sequence % 1000) * 0.01 - 5.0;
    CHECK(found.entries.size() == 64);
    for (const ForecastEntry& entry : found.entries)
      CHECK(std::abs(entry.p - 1 / (1 + std::exp(-logit))) < 1e-5);
  }
  writer.join();
  CHECK(seen + reader.lost() == kLaunches);
  CHECK(!reader.poll(found));
}

void refusals() {
  SpeculationSizes sizes = specgate::test::small_sizes(1);
  RandomModel random(sizes, 1);
  const auto run = make_speculation_cpu(random.model, 4);
  const auto refused = [&](int layer, int batch) {
    RandomInput in(sizes, 0, 4, 1);
    in.input.layer = layer;
    in.input.batch = batch;
    run->launch(in.input, 0);
  };
  CHECK_THROWS(refused(2, 1));
  CHECK_THROWS(refused(-2, 1));
  CHECK_THROWS(refused(0, 2));
  CHECK_THROWS(refused(0, 0));
  SpeculationModel bad = random.model;
  bad.weights.first = nullptr;
  CHECK_THROWS(make_speculation_cpu(bad, 4));
  bad = random.model;
  bad.sizes.horizons = 5;
  CHECK_THROWS(make_speculation_emulated(bad, 4, 0));
  CHECK_THROWS(make_speculation_cpu(random.model, 1));
}

}  // namespace

int main() {
  emulation_agrees();
  order_is_nothing();
  threads_agree();
  ring_is_whole();
  refusals();
  return specgate::test::report("test_speculate");
}
