// A store that follows a ring of forecasts while another thread computes: content, time, trust, and ending.
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "check.h"
#include "store.h"

using namespace specgate;

namespace {

constexpr uint32_t kLayers = 6, kExperts = 8;
constexpr uint64_t kBlock = 4096;

/// Experts in memory, each filled with its number.
std::unique_ptr<Store> make_store(int64_t slots) {
  StoreConfig config;
  for (uint32_t b = 0; b < kLayers * kExperts; ++b) config.blocks.push_back({});
  BlockFormat format;
  format.pieces.push_back({1, kBlock / 4, DType::F32, DType::F32, false, 0, 0, 0});
  format.slot_bytes = format.block_bytes = kBlock;
  config.formats = {format};
  config.device_slots = {slots};
  config.host_slots = {0};
  config.ledger.resident_host = true;
  config.eviction = "priced";
  config.price_scale = 0.5, config.price_floor = 0.2;
  config.trust = true;
  auto store = std::make_unique<Store>(std::move(config));
  store->set_reuse({kExperts, 8, 0.99, -1, 0.5});
  for (uint32_t b = 0; b < kLayers * kExperts; ++b) std::memset(store->slab(b), static_cast<int>(b), kBlock);
  return store;
}

/// What the speculation kernel does: entries, then the sequence number that makes them visible.
class Writer {
 public:
  explicit Writer(std::shared_ptr<ForecastRing> ring) : ring_(std::move(ring)) {}

  void write(int32_t source, const std::vector<ForecastEntry>& entries) {
    const RingView& view = ring_->view();
    unsigned char* at = view.memory + ++sequence_ % static_cast<uint64_t>(view.slots) * view.stride;
    unsigned char* slot = at;
    put(slot, 0, std::memory_order_seq_cst);
    put(slot + 8, static_cast<uint32_t>(source) | static_cast<uint64_t>(entries.size()) << 32);
    put(slot + 16, 0);
    at += sizeof(ForecastSlot);
    for (const ForecastEntry& entry : entries) {
      uint64_t words[2];
      std::memcpy(words, &entry, sizeof(words));
      put(at, words[0]), put(at + 8, words[1]);
      at += sizeof(words);
    }
    put(slot, sequence_, std::memory_order_release);
  }
  uint64_t written() const { return sequence_; }

 private:
  static void put(unsigned char* at, uint64_t word, std::memory_order order = std::memory_order_release) {
    std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(at)).store(word, order);
  }
  std::shared_ptr<ForecastRing> ring_;
  uint64_t sequence_ = 0;
};

std::vector<uint32_t> experts_of(uint32_t token, uint32_t layer) {
  return {(token * 3 + layer) % kExperts, (token * 3 + layer + 1 + token % 5) % kExperts};
}

/// Decodes: before the first layer and in each layer a launch that says what the next two layers use, with
/// probability `right`, and one expert that they do not use.
void decode(Store& store, Writer& writer, uint32_t tokens, float right, int64_t& wrong) {
  for (uint32_t token = 0; token < tokens; ++token) {
    for (int32_t source = -1; source < static_cast<int32_t>(kLayers); ++source) {
      if (source >= 0) {  // the layer's experts run before its launch
        std::vector<uint32_t> blocks;
        for (const uint32_t e : experts_of(token, static_cast<uint32_t>(source))) {
          blocks.push_back(static_cast<uint32_t>(source) * kExperts + e);
        }
        if (!store.demand(blocks)) {
          while (!store.wait(blocks, 100)) {
          }
        }
        const std::vector<int64_t> slots = store.slots(blocks, 0);
        for (size_t i = 0; i < blocks.size(); ++i) {
          const auto* at = reinterpret_cast<const unsigned char*>(store.arena(0)) + slots[i] * kBlock;
          wrong += at[0] != blocks[i] || at[kBlock - 1] != blocks[i];
        }
        store.release(blocks, 0);
      }
      std::vector<ForecastEntry> entries;
      for (int32_t ahead = 1; ahead <= 2; ++ahead) {
        const auto at = static_cast<uint32_t>(source + ahead);
        const uint32_t later = token + at / kLayers, layer = at % kLayers;
        const std::vector<uint32_t> used = experts_of(later, layer);
        for (uint32_t e = 0, others = 0; e < kExperts; ++e) {
          const bool is = e == used[0] || e == used[1];
          if (is || others++ == 0) {
            entries.push_back({static_cast<int32_t>(layer), static_cast<int32_t>(e), is ? right : 1 - right, ahead});
          }
        }
      }
      writer.write(source, entries);
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }
}

void forecasts_are_judged() {
  auto store = make_store(20);
  const auto ring = std::make_shared<ForecastRing>(64, 64);
  Writer writer(ring);
  store->follow(ring, 0, kExperts, kLayers);
  int64_t wrong = 0;
  decode(*store, writer, 40, 0.9F, wrong);
  CHECK(wrong == 0);
  CHECK(store->drain(10000));
  store->check();
  const StoreCounters counters = store->store_counters();
  CHECK(counters.followed > 0 && counters.followed + counters.lost <= static_cast<int64_t>(writer.written()));
  CHECK(counters.forecasts.said > 500);
  // two of three come true; a thread that was kept waiting may miss a few
  const double share = counters.forecasts.used / counters.forecasts.said;
  CHECK(share > 0.5 && share < 0.75);
  CHECK(store->counters().hit > 0);
  store->unfollow();
  store->close();
}

void it_ends_at_any_time() {
  for (int i = 0; i < 20; ++i) {
    auto store = make_store(20);
    const auto ring = std::make_shared<ForecastRing>(8, 64);
    Writer writer(ring);
    store->follow(ring, 0, kExperts, kLayers);
    int64_t wrong = 0;
    decode(*store, writer, 1, 0.9F, wrong);
    CHECK(wrong == 0);
    if (i % 2) store->unfollow();
    store->close();
    writer.write(0, {{1, 1, 0.9F, 1}});
  }
}

}  // namespace

int main() {
  forecasts_are_judged();
  it_ends_at_any_time();
  return test::report("test_follow");
}
