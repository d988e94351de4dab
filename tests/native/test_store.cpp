// The threaded store, on the CPU and over an emulated CUDA runtime (SPECGATE_TEST_DEVICE=0): content, faults, closing, and a soak of random operations from several threads.
//   SPECGATE_SOAK_SECONDS=600 makes the soak that long (default 4).
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "check.h"
#include "error.h"
#include "store.h"
#ifdef SPECGATE_TEST_DEVICE
#include "cuda_runtime.h"
#endif

using namespace specgate;

namespace {

#ifdef SPECGATE_TEST_DEVICE
constexpr int kDevice = SPECGATE_TEST_DEVICE;
/// The test reads slots on the host, not by kernels: what the stream waits for must be over.
void wait_for_stream() { cudaStreamSynchronize(nullptr); }
#else
constexpr int kDevice = -1;
void wait_for_stream() {}
#endif

constexpr uint64_t kBlock = 8192;

/// A file of blocks, block b filled with a pattern of its own, and the configuration to read it.
struct Fixture {
  explicit Fixture(uint32_t blocks) : count(blocks) {
    char name[] = "/tmp/specgate-store-XXXXXX";
    const int file = mkstemp(name);
    path = name;
    std::vector<uint8_t> bytes(kBlock);
    for (uint32_t b = 0; b < blocks; ++b) {
      fill(bytes, b);
      if (write(file, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) std::abort();
    }
    ::close(file);
  }
  ~Fixture() { unlink(path.c_str()); }

  static void fill(std::vector<uint8_t>& bytes, uint32_t b) {
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(b * 131 + i * 7 + i / 256);
  }

  StoreConfig config(int64_t slots, int64_t slabs) const {
    StoreConfig out;
    out.paths = {path};
    for (uint32_t b = 0; b < count; ++b) out.blocks.push_back({0, {{0, b * kBlock, kBlock, 0}}, std::nullopt, 0});
    BlockFormat format;
    format.pieces.push_back({1, kBlock / 4, DType::F32, DType::F32, false, 0, 0, 0});
    format.slot_bytes = format.block_bytes = kBlock;
    out.formats = {format};
    out.device_slots = {slots};
    out.host_slots = {slabs};
    out.poison = true;
    out.device = kDevice;
    out.piece_bytes = 3000;
    out.timeline = 1000;
    return out;
  }

  bool right(const Store& store, uint32_t b, int64_t slot) const {
    std::vector<uint8_t> expected(kBlock);
    fill(expected, b);
    return std::memcmp(store.arena(0) + slot * kBlock, expected.data(), kBlock) == 0;
  }

  uint32_t count;
  std::string path;
};

std::vector<int64_t> acquire(Store& store, const std::vector<uint32_t>& blocks) {
  bool ready = store.demand(blocks);
  for (int i = 0; !ready; ++i) {
    if (i == 600) {
      std::fprintf(stderr, "no answer for 60 s\n");
      std::abort();  // the watchdog
    }
    ready = store.wait(blocks, 100);
  }
  const std::vector<int64_t> slots = store.slots(blocks, 0);
  wait_for_stream();
  return slots;
}

bool fails_with(StoreFailure::Kind kind, const char* word, const std::function<void()>& action) {
  try {
    action();
  } catch (const StoreFailure& failure) {
    const bool good = failure.kind == kind && std::string(failure.what()).find(word) != std::string::npos;
    if (!good) std::fprintf(stderr, "failed with: %s\n", failure.what());
    return good;
  }
  return false;
}

void content() {
  const Fixture fixture(12);
  for (const int64_t slabs : {0, 1, 4, 12}) {
    Store store(fixture.config(3, slabs));
    for (uint32_t round = 0; round < 40; ++round) {
      const std::vector<uint32_t> blocks{round % 12, (round * 5 + 3) % 12 == round % 12 ? (round + 1) % 12 : (round * 5 + 3) % 12};
      const auto slots = acquire(store, blocks);
      for (size_t i = 0; i < blocks.size(); ++i) CHECK(fixture.right(store, blocks[i], slots[i]));
      store.release(blocks, 0);
      store.check();
    }
    const Counters counters = store.counters();
    CHECK(counters.hit + counters.host_hit + counters.miss + counters.late == 80);
    CHECK(counters.copied_bytes[0] == (80 - counters.hit - counters.late) * static_cast<int64_t>(kBlock));
    CHECK(!store.timeline().empty());
    store.close();
    store.close();
    CHECK(store.device_bytes() == 0 && store.host_bytes() == 0);
    CHECK(fails_with(StoreFailure::Kind::Closed, "closed", [&] { store.demand({0}); }));
  }
}

void prefetching() {
  const Fixture fixture(12);
  Store store(fixture.config(4, 12));
  CHECK(store.prefetch(5, 0.9, 10, Target::Device) == Asked::Queued);
  CHECK(store.prefetch(6, 0.9, 10, Target::Host) == Asked::Queued);
  CHECK(store.drain(5000));
  CHECK(store.block(5).device == Place::Present);
  CHECK(store.block(6).device == Place::Absent && store.block(6).host == Place::Present);
  CHECK(store.demand({5}));
  CHECK(fixture.right(store, 5, store.slots({5}, 0)[0]));
  store.release({5}, 0);
  CHECK(store.counters().hit == 1 && store.counters().useful_bytes == static_cast<int64_t>(kBlock));
  store.advance(11);
  CHECK(store.prefetch(7, 0.9, 10, Target::Device) == Asked::Stale);
}

void in_memory() {
  const Fixture fixture(6);
  StoreConfig config = fixture.config(2, 0);
  config.paths.clear();
  config.ledger.resident_host = true;
  Store store(std::move(config));
  for (uint32_t b = 0; b < 6; ++b) {
    std::vector<uint8_t> bytes(kBlock);
    Fixture::fill(bytes, b);
    std::memcpy(store.slab(b), bytes.data(), kBlock);
  }
  for (uint32_t b = 0; b < 6; ++b) {
    CHECK(fixture.right(store, b, acquire(store, {b})[0]));
    store.release({b}, 0);
  }
  CHECK(store.counters().miss == 0 && store.counters().host_hit == 6);
}

void budget() {
  const Fixture fixture(4);
  Store store(fixture.config(2, 0));
  CHECK(fails_with(StoreFailure::Kind::Budget, "3 experts are needed at once", [&] { store.demand({0, 1, 2}); }));
  acquire(store, {0, 1});
  CHECK(fails_with(StoreFailure::Kind::Budget, "budget holds 2", [&] { store.demand({3}); }));
  store.release({0, 1}, 0);
  acquire(store, {3});
}

void faults() {
  const Fixture fixture(6);
  for (const int64_t slabs : {0, 6}) {
    StoreConfig config = fixture.config(2, slabs);
    config.reader.fault = [](int, uint64_t offset, uint64_t) {
      ReadFault fault;
      if (offset / kBlock == 3) fault.error = EIO;
      return fault;
    };
    Store store(std::move(config));
    acquire(store, {0, 1});
    store.release({0, 1}, 0);
    CHECK(fails_with(StoreFailure::Kind::Io, fixture.path.c_str(), [&] { acquire(store, {2, 3}); }));
    store.check();
    CHECK(store.block(2).pins == 0 && store.block(3).pins == 0);
    CHECK(fixture.right(store, 2, acquire(store, {2})[0]));  // the others still come
    store.release({2}, 0);
  }
  {  // a wrong checksum
    StoreConfig config = fixture.config(2, 2);
    config.blocks[1].crc = 12345;
    Store store(std::move(config));
    CHECK(fails_with(StoreFailure::Kind::Io, fixture.path.c_str(), [&] { acquire(store, {1}); }));
  }
  {  // a file that lost its end while open
    const Fixture lost(6);
    Store store(lost.config(2, 2));
    acquire(store, {0});
    if (truncate(lost.path.c_str(), 3 * kBlock) != 0) std::abort();
    CHECK(fails_with(StoreFailure::Kind::Io, lost.path.c_str(), [&] { acquire(store, {5}); }));
  }
}

/// Closing while others wait: they get an error, nobody hangs.
void closing() {
  const Fixture fixture(8);
  for (int round = 0; round < 20; ++round) {
    auto store = std::make_unique<Store>(fixture.config(2, 2));
    std::atomic<int> ended{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        try {
          for (uint32_t i = 0;; ++i) {
            const std::vector<uint32_t> blocks{(i * 3 + static_cast<uint32_t>(t)) % 8};
            try {
              acquire(*store, blocks);
            } catch (const StoreFailure& failure) {
              if (failure.kind != StoreFailure::Kind::Budget) throw;
              std::this_thread::yield();
              continue;
            }
            store->release(blocks, 0);
          }
        } catch (const StoreFailure& failure) {
          ended += failure.kind == StoreFailure::Kind::Closed;
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    store->close();
    for (std::thread& thread : threads) thread.join();
    CHECK(ended == 3);
  }
}

size_t resident_kib() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == "VmRSS:") {
      size_t kib = 0;
      status >> kib;
      return kib;
    }
  }
  return 0;
}

size_t entries(const char* folder) {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

/// Random operations from several threads at full load; every content is compared.
/// `priced`: forecasts are judged, most of them by the store's own thread.
void soak(double seconds, bool priced) {
  const size_t threads_before = entries("/proc/self/task"), files_before = entries("/proc/self/fd");
  const Fixture fixture(64);
  size_t early = 0;
  {
    StoreConfig config = fixture.config(12, 24);
    config.ledger.max_pending = 16;
    config.ledger.prefetch_copy_bytes = 4 * kBlock;
    config.timeline = 4096;
    if (priced) {
      config.eviction = "priced";
      config.price_scale = 0.6, config.price_floor = 0.2;
      config.prefetch_depth = 4;
      config.trust = true;
    }
    Store store(std::move(config));
    std::atomic<bool> stop{false};
    std::atomic<int64_t> acquired{0}, wrong{0}, now{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(static_cast<uint32_t>(t));
        while (!stop) {
          std::vector<uint32_t> blocks;
          while (blocks.size() < 1 + random() % 4) {
            const auto b = static_cast<uint32_t>(std::min(random() % 64, random() % 64));
            if (std::find(blocks.begin(), blocks.end(), b) == blocks.end()) blocks.push_back(b);
          }
          std::vector<Foreknown> foreknown;
          for (int i = 0; i < 3; ++i) {
            foreknown.push_back({static_cast<uint32_t>(random() % 64), (random() % 100) / 100.0,
                                 now + static_cast<int64_t>(random() % 6), random() % 3 ? Target::Device : Target::Host});
          }
          if (priced && random() % 8) {
            store.foresee(std::move(foreknown));
          } else if (random() % 2) {
            store.prefetch_all(foreknown);
          } else {
            for (const Foreknown& f : foreknown) store.prefetch(f.block, f.p, f.deadline, f.target);
          }
          const auto slots = acquire(store, blocks);
          for (size_t i = 0; i < blocks.size(); ++i) wrong += !fixture.right(store, blocks[i], slots[i]);
          acquired += static_cast<int64_t>(blocks.size());
          store.release(blocks, 0);
        }
      });
    }
    const auto begin = std::chrono::steady_clock::now();
    const auto passed = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    while (passed() < seconds) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      store.advance(++now);
      store.check();
      if (early == 0 && passed() > seconds / 4) early = resident_kib();
    }
    const size_t late = resident_kib();
    stop = true;
    for (std::thread& thread : threads) thread.join();
    CHECK(store.drain(10000));
    store.check();
    const Counters counters = store.counters();
    CHECK(wrong == 0);
    CHECK(priced || counters.stale > 0);
    CHECK(!priced || (store.store_counters().forecasts.said > 0 && store.store_counters().unworthy > 0));
    CHECK(counters.hit + counters.late + counters.host_hit + counters.miss == acquired);
#ifndef __SANITIZE_ADDRESS__      // which keeps freed memory for a while
    CHECK(late < early + 8192);  // KiB: memory does not drift
#endif
    for (uint32_t b = 0; b < 64; ++b) CHECK(store.block(b).pins == 0);
    std::printf("soak: %.1f s, %lld blocks acquired, %lld hits, resident %zu -> %zu KiB\n", passed(),
                static_cast<long long>(acquired), static_cast<long long>(counters.hit), early, late);
  }
  CHECK(entries("/proc/self/task") == threads_before);
  CHECK(entries("/proc/self/fd") == files_before);
}

}  // namespace

int main() {
  content();
  prefetching();
  in_memory();
  budget();
  faults();
  closing();
  const char* seconds = std::getenv("SPECGATE_SOAK_SECONDS");
  for (const bool priced : {false, true}) soak(seconds ? std::atof(seconds) / 2 : 2.0, priced);
  return test::report("test_store");
}
