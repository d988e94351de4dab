// The expert store: the Ledger's decisions carried out by a file reader and a copy engine.
//
// Any thread may call it. Nothing here waits but wait(), warm() and close().
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "codec.h"
#include "device.h"
#include "file_reader.h"
#include "ledger.h"
#include "price.h"
#include "speculate.h"
#include "spin_lock.h"
#include "task_pool.h"
#include "timeline.h"
#include "trust.h"

namespace specgate {

/// Where one expert's encoded bytes lie in the files.
struct StoredBlock {
  uint32_t shape_class = 0;
  std::vector<Segment> segments;
  std::optional<uint32_t> crc;  ///< of the bytes in the file
  uint64_t compressed = 0;      ///< their number if they are zstd-compressed, else 0
};

struct StoreConfig {
  std::vector<std::string> paths;  ///< none: the blocks live in memory (resident_host), filled through slab()
  std::vector<StoredBlock> blocks;
  std::vector<std::byte*> memory;  ///< without paths: where each encoded block lies, kept by the caller; none: our own
  std::vector<BlockFormat> formats;  ///< per shape class
  std::vector<int64_t> device_slots, host_slots;
  std::string eviction = "lru", host_eviction = "lru";
  LedgerOptions ledger;
  FileReader::Options reader;
  int device = -1;  ///< CUDA ordinal; -1: the CPU
  bool poison = false;
  size_t timeline = 0;
  int workers = 2;  ///< threads that decompress
  double price_scale = -1.0;  ///< on the link's utilisation, in the price of a forecast (priced); < 0: fetch all
  double price_floor = 0.0;  ///< of that price, per ns of the copy
  int64_t prefetch_depth = 0;  ///< events ahead that a forecast is fetched for, beyond them it guides eviction (priced); 0: all
  bool trust = false;  ///< forecasts are believed as far as those before them came true
  size_t piece_bytes = size_t{4} << 20;  ///< of a forecast's copy, between which a demand goes first; 0: whole
};

constexpr int64_t kNoDeadline = int64_t{1} << 62;  ///< of a block that is wanted whenever it can come

/// A block that a forecast says is needed.
struct Foreknown {
  uint32_t block = 0;
  double p = 0;
  int64_t deadline = 0;
  Target target = Target::Device;
};

/// Time and threads, beside the Ledger's counters.
struct StoreCounters {
  int64_t stall_ns = 0, stalls = 0, acquires = 0, failures = 0;
  int64_t followed = 0, lost = 0;  ///< forecasts of a ring that were seen, and overwritten before
  int64_t unworthy = 0;            ///< forecasts that were not worth their bytes
  Trust::Seen forecasts;           ///< that were judged, where they are (StoreConfig::trust)
};

class Store {
 public:
  explicit Store(StoreConfig config);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Asks for the blocks of one event and pins them. True if they may be used at once; else call wait().
  bool demand(const std::vector<uint32_t>& blocks);
  /// Waits at most `milliseconds`; true once the blocks may be used. Throws what went wrong, and then they are
  /// released.
  bool wait(const std::vector<uint32_t>& blocks, int milliseconds);
  /// Slots of blocks that may be used; kernels on `stream` from now on see their content.
  std::vector<int64_t> slots(const std::vector<uint32_t>& blocks, uintptr_t stream);
  /// Unpins. Kernels on `stream` until now are the last that use them.
  void release(const std::vector<uint32_t>& blocks, uintptr_t stream);
  Asked prefetch(uint32_t block, double p, int64_t deadline, Target target);
  /// The same for many at once. Callers who need experts go first.
  void prefetch_all(const std::vector<Foreknown>& foreknown);
  /// The same by a thread of the store's own; nothing is waited for.
  void foresee(std::vector<Foreknown> foreknown);
  void advance(int64_t now);
  /// A thread of the store's own polls the ring: each forecast moves the clock to its sequence number and is
  /// prefetched. `first_block`: of the layers that the forecasts are about, `experts` blocks a layer.
  void follow(std::shared_ptr<const ForecastRing> ring, uint32_t first_block, uint32_t experts, uint32_t layers);
  void unfollow();
  /// Waits until nothing is wanted or moves; false after `milliseconds`.
  bool drain(int milliseconds);
  /// Cancels reads, waits for copies, frees everything. Callers that wait get a StoreFailure(Closed).
  void close();

  /// Where an encoded block lies for ever, to be filled by the caller (LedgerOptions::resident_host).
  std::byte* slab(uint32_t block) const;
  std::byte* arena(uint32_t shape_class) const { return arenas_.at(shape_class); }
  int64_t device_slots(uint32_t shape_class) const { return config_.device_slots.at(shape_class); }
  const BlockFormat& format(uint32_t shape_class) const { return config_.formats.at(shape_class); }
  const Device& device() const { return *device_; }
  std::string reader_backend() const;
  size_t size() const { return config_.blocks.size(); }
  bool closed() const { return closed_; }

  Counters counters() const;
  StoreCounters store_counters() const;
  Block block(uint32_t b) const;
  std::vector<Span> timeline() const;
  void set_weights(const std::vector<double>& weights);
  void set_future(const std::vector<std::vector<uint32_t>>& events);
  void set_reuse(const Reuse& reuse);
  void check() const;
  int64_t host_bytes() const { return host_bytes_; }
  int64_t device_bytes() const { return device_bytes_; }

 private:
  struct Flight {
    Job job;
    int64_t begin_ns = 0;
    std::byte* scratch = nullptr;  ///< compressed bytes
    std::byte* staging = nullptr;  ///< encoded bytes of a DIRECT job
  };

  void require_open() const;
  bool someone_waits() const;                   // for what changed: waking a thread costs more than asking
  void background();                            // the thread of foresee()
  void stop_background();
  void pump_later();
  void advance_clock(int64_t now);              // mutex_ is held, as for all below
  Asked ask(Foreknown foreknown);
  void believe(Foreknown& foreknown);
  int64_t clock_of_use();
  bool near(const Foreknown& foreknown) const;
  bool worth(const Foreknown& foreknown);
  double value_of_victim(uint32_t shape_class);
  void pump();
  void start(const Job& job);
  void start_read(const Job& job);
  void start_copy(const Job& job, const std::byte* from);
  void finish(int64_t id, JobStatus status, const std::string& error);  // takes mutex_
  void read_done(ReadResult&& result);          // takes mutex_
  void read_landed(int64_t id);
  void decompress(int64_t id);                  // takes mutex_
  void land(int64_t id, JobStatus status, const std::string& error);
  bool ready(const std::vector<uint32_t>& blocks) const;  ///< kernels launched behind await() find them
  std::string failure_of(const std::vector<uint32_t>& blocks);
  void give_up(const std::vector<uint32_t>& blocks);
  std::byte* slab_of(const Job& job) const;
  std::byte* slot_of(const Job& job) const;
  std::byte* take(std::vector<std::byte*>& pool, size_t bytes);
  void allocate();
  void free_all();

  StoreConfig config_;
  mutable std::mutex mutex_;
  std::atomic<int> callers_{0};                 // who needs experts and waits for mutex_
  std::condition_variable changed_;
  int waiting_ = 0, draining_ = 0;              // threads in wait() and drain()
  std::unique_ptr<Device> device_;
  std::vector<std::byte*> arenas_;
  std::vector<std::pair<std::byte*, size_t>> host_allocations_;
  std::vector<std::byte*> scratch_, staging_;   // free ones
  size_t scratch_bytes_ = 0, staging_bytes_ = 0;
  std::vector<int64_t> first_slot_;             // of each class, in the numbering of all slots
  std::vector<std::vector<std::byte*>> slab_at_;
  int64_t host_bytes_ = 0, device_bytes_ = 0;
  std::unique_ptr<Ledger> ledger_;
  std::unordered_map<int64_t, Flight> flights_;
  std::vector<bool> copying_;                   // per block: its copy into a slot has been issued
  std::unordered_map<uint32_t, std::string> errors_;
  std::string broken_;                          // a failure after which values may be wrong
  Timeline timeline_;
  Pricer pricer_;
  std::optional<Trust> trust_;
  std::vector<double> victims_;  ///< per shape class: what goes first is worth, before this call's forecasts; < 0: not known
  int64_t link_free_ns_ = 0, stall_seen_ns_ = 0;
  double read_ns_ = 0, read_bytes_ = 0;         // of demands
  StoreCounters counters_;
  bool closed_ = false, closing_ = false;
  std::atomic<bool> following_{false};
  std::shared_ptr<const ForecastRing> ring_;    // that is followed
  uint64_t newest_ = 0;                         // launch of it that was seen
  std::optional<int64_t> first_launch_;         // the clock at launch 0
  std::thread follower_;
  std::mutex asked_mutex_;                      // of what follows; taken after mutex_, if both are
  std::condition_variable asked_changed_;
  std::deque<std::vector<Foreknown>> asked_;    // by foresee()
  bool kicked_ = false, asleep_ = false, background_on_ = false, background_ends_ = false;
  std::atomic<bool> busy_{false};               // with what was asked for
  std::thread background_;
  std::unique_ptr<TaskPool> workers_;
  std::unique_ptr<FileReader> reader_;  // last: its threads call into the store
};

}  // namespace specgate
