// The deterministic heart of the store: which expert lies where, what is wanted, what moves next.
//
// No threads, no clocks, no bytes: store.h drives it. specgate/runtime/reference.py is the same in Python, and a
// test drives both with the same random operations. docs/runtime.md states the semantics.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "policy.h"

namespace specgate {

enum class Place : uint8_t { Absent, Loading, Present };
enum class Level : uint8_t { Demand, Prefetch };
enum class Target : uint8_t { Device, Host };
enum class JobKind : uint8_t { Read, Copy, Direct };
enum class JobStatus : uint8_t { Ok, Failed, Cancelled };
enum class Asked : uint8_t { Queued, Merged, Demanded, Resident, Stale, Refused };

/// One transfer. READ: file to slab; COPY: slab to slot; DIRECT: file to slot. -1: none.
struct Job {
  int64_t id = -1;
  JobKind kind = JobKind::Read;
  uint32_t block = 0;
  int64_t slab = -1;
  int64_t slot = -1;
  Level level = Level::Demand;
  bool sent = false;  ///< wholly handed to the device: another forecast's copy may begin behind it
};

/// Why a block is to move.
struct Want {
  Level level = Level::Demand;
  Target target = Target::Device;
  double p = 1.0;
  int64_t deadline = 0;
  int64_t seq = 0;
};

/// Everything about one block.
struct Block {
  uint32_t shape_class = 0;
  Place device = Place::Absent, host = Place::Absent;
  int64_t slot = -1, slab = -1;
  int64_t pins = 0, host_pins = 0;
  Level origin = Level::Demand;  ///< of the device's content
  bool used = false;             ///< since it came
  double p = 1.0;                ///< of the want that brought it
  int64_t deadline = 0;          ///< of the same
  Level host_origin = Level::Demand;
  bool host_used = false;
  bool waits = false;  ///< a demand without a slot
  bool failed = false;
  int64_t job = -1;  ///< in flight
  std::optional<Want> want;
};

/// Counts and bytes since construction. Index 0 of a pair: demand; 1: prefetch.
struct Counters {
  int64_t hit = 0, late = 0, host_hit = 0, miss = 0, promoted = 0, merged = 0, stale = 0, overflow = 0;
  int64_t evictions = 0, host_evictions = 0;
  int64_t useful_bytes = 0, wasted_bytes = 0, late_bytes = 0;
  int64_t copied_bytes[2] = {0, 0}, read_bytes[2] = {0, 0};
  int64_t wasted_read_bytes = 0;
};

/// How much may be under way.
struct LedgerOptions {
  int64_t max_pending = 1024;  ///< speculative wants without a job
  int64_t max_reads = 8;
  int64_t prefetch_copy_bytes = int64_t{64} << 20;
  int64_t prefetch_read_bytes = int64_t{64} << 20;
  double half_life = 64;
  bool resident_host = false;  ///< the source is memory: every block is in a slab for ever
};

class Ledger {
 public:
  /// Raises StoreFailure(Config) for sizes that make no sense.
  Ledger(std::vector<uint32_t> block_class, std::vector<int64_t> block_bytes, std::vector<int64_t> device_slots,
         std::vector<int64_t> host_slots, const std::string& policy, const std::string& host_policy,
         LedgerOptions options);
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  /// All blocks of one event (a layer's call). Raises StoreFailure(Budget) if they cannot be on the device at once.
  void demand(const std::vector<uint32_t>& blocks);
  void release(const std::vector<uint32_t>& blocks);
  Asked prefetch(uint32_t block, double p, int64_t deadline, Target target);
  /// Drops speculation whose deadline has passed; returns READs in flight that nobody wants any more.
  std::vector<int64_t> advance(int64_t now);
  std::optional<Job> next_job();
  void complete(int64_t id, JobStatus status);
  /// All of a copy is in the hands of the device: it no longer counts as a forecast's bytes in flight. Unknown jobs, and
  /// demands, are ignored.
  void sent(int64_t id);
  /// Every block is on the device (or, with `issued`, on its way).
  bool ready(const std::vector<uint32_t>& blocks, bool issued) const;
  /// Of the blocks: those that failed (for the waiting caller, who then releases all).
  std::vector<uint32_t> take_failed();

  const Counters& counters() const { return counters_; }
  const Block& block(uint32_t b) const { return blocks_[b]; }
  size_t size() const { return blocks_.size(); }
  int64_t bytes(uint32_t b) const { return block_bytes_[blocks_[b].shape_class]; }
  int64_t now() const { return now_; }
  int64_t jobs_in_flight() const { return static_cast<int64_t>(jobs_.size()); }
  int64_t wants() const { return static_cast<int64_t>(demands_.size() + prefetches_.size()) + jobs_in_flight(); }
  /// The policies hear of a forecast that is not fetched.
  void hint(uint32_t b, double p, int64_t deadline) {
    check_id(b);
    policy_.hint(b, p, deadline);
    host_policy_.hint(b, p, deadline);
  }
  /// Bytes of forecasts that are on the link, or wait for it before one of this deadline and p would; those that wait
  /// are taken to be of this size, and no more than `most` of them are counted.
  int64_t backlog(int64_t deadline, double p, int64_t block_bytes, int64_t most) const {
    const Order own{deadline, -p, 0, 0};
    int64_t before = 0;
    for (auto want = prefetches_.begin(); want != prefetches_.end() && *want < own && before < most; ++want) ++before;
    return copy_flight_[1] + before * block_bytes;
  }
  bool has_free_slot(uint32_t shape_class) const { return !free_slots_[shape_class].empty(); }
  Policy& policy() { return policy_; }
  Policy& host_policy() { return host_policy_; }
  const LedgerOptions& options() const { return options_; }
  /// Throws std::logic_error with a sentence if the books do not balance.
  void check() const;

 private:
  struct Passed {
    bool read = false, copy = false;  ///< a demand, or a forecast turned down by a limit, waits for this way
  };
  using Order = std::tuple<int64_t, double, int64_t, uint32_t>;   // deadline, -p, seq, block
  using Weakest = std::tuple<double, int64_t, int64_t, uint32_t>;  // p, -deadline, -seq, block

  void check_id(uint32_t b) const;
  void check_ids(const std::vector<uint32_t>& blocks) const;
  void queue(uint32_t b);    // its want has no job
  void unqueue(uint32_t b);
  void drop_want(uint32_t b);
  void set_demand(uint32_t b);
  void settle(uint32_t b);   // evictable or not, on both tiers; waiting or not
  JobKind step(const Block& block) const;
  bool within_limits(JobKind kind, Level level, int64_t bytes) const;
  bool spare_slot(uint32_t shape_class) const;
  std::optional<Job> start(uint32_t b, JobKind kind);
  int64_t take_slot(uint32_t b, Level level);
  int64_t take_slab(uint32_t b, Level level);
  void evict_device(uint32_t b);
  void evict_host(uint32_t b);
  void count_job(const Job& job, int64_t sign);
  void land_copy(const Job& job, JobStatus status);
  void land_read(const Job& job, JobStatus status);
  void fail(uint32_t b);

  std::vector<Block> blocks_;
  std::vector<int64_t> block_bytes_, device_slots_, host_slots_;
  LedgerOptions options_;
  std::vector<uint32_t> block_class_;
  Policy policy_, host_policy_;
  std::vector<std::set<int64_t>> free_slots_, free_slabs_;
  std::vector<int64_t> pinned_;   // blocks with pins, per class
  std::vector<int64_t> waiting_;  // blocks with a demand and not on the device, per class
  std::set<std::pair<int64_t, uint32_t>> demands_;
  std::set<Order> prefetches_;
  std::set<Weakest> weakest_;
  std::unordered_map<int64_t, Job> jobs_;
  std::vector<uint32_t> failed_;
  Counters counters_;
  int64_t tick_ = 0, now_ = 0, seq_ = 0, next_id_ = 0;
  int64_t reads_[2] = {0, 0}, copies_[2] = {0, 0};            // jobs in flight by level
  int64_t read_flight_[2] = {0, 0}, copy_flight_[2] = {0, 0};  // their bytes
};

}  // namespace specgate
