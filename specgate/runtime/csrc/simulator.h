// A simulation of the calls of a model, event by event, in virtual time: which experts are on the device,
// what the link and the file do meanwhile, how long the model waits. docs/simulator.md states the semantics.
//
// Nothing is allocated while it runs. Doubles throughout; equal input gives equal output.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "simulator_evict.h"
#include "simulator_input.h"
#include "simulator_queue.h"

namespace specgate::sim {

/// Of one document. Times in ns of virtual time.
struct Tally {
  int64_t steps = 0, hits = 0, late = 0, host_hits = 0, misses = 0, low_hits = 0;
  int64_t demand_bytes = 0, prefetch_bytes = 0, wasted_bytes = 0, file_bytes = 0;
  int64_t evictions = 0, prefetches = 0, stale = 0, refused = 0;
  double late_ns = 0, stall_ns = 0, compute_ns = 0, total_ns = 0, link_busy_ns = 0;
};

constexpr size_t kObserved = 15;

class Simulator {
 public:
  /// The arrays of `calls` and `costs` must outlive it. Throws StoreFailure as check() does.
  Simulator(const Calls& calls, const CostTable& costs, const RuleTable& rules, const Room& room);
  Simulator(const Simulator&) = delete;
  Simulator& operator=(const Simulator&) = delete;

  void reset();
  /// By the rules; up to `events` more events. False once all are done.
  bool run(int64_t events);
  /// Up to where the next point's forecasts are known, if that is within so many events; then act() decides.
  enum class Pause { Point, End, More };
  Pause advance(int64_t events);
  /// Fetches what the point foresees with at least this probability, up to that horizon.
  void act(double threshold, int64_t depth);
  /// What a decision may look at; see docs/simulator.md.
  std::array<float, kObserved> observe() const;

  int64_t point() const { return point_; }
  int64_t event() const { return n_; }
  /// The event's router has chosen, and it has not ended.
  bool in_use() const { return phase_ == Phase::Waits || phase_ == Phase::Runs; }
  double now() const { return now_; }
  const std::vector<Tally>& tallies() const { return tallies_; }
  /// Blocks on the device, ascending: for tests.
  std::vector<int64_t> resident() const;

 private:
  enum class Place : uint8_t { Absent, Flying, Present };
  enum class Phase { Begin, Before, Waits, Runs };
  struct Block {
    Place place = Place::Absent;
    bool pinned = false, unused = false, judged = false;  // unused: came by a prefetch, not demanded since
    bool low = false, low_listed = false;                 // an approximate copy, here or to come
    int64_t target = kNone;                               // of the prefetch that brought it
    double p = 0;
    int64_t seen = kNone;  // the last point that foresaw it
    int64_t spent = 0;     // bytes of the prefetch
  };
  struct Pool {
    int64_t slots = 0, free = 0, evictable = 0;
  };
  struct HostWork {  // begun; `busy`: of the time until `end`, in which the link copied what no event waits for
    double end = 0, busy = 0;
    void copied(double from, double to) {
      if (from < end) busy += std::min(to, end) - from;
    }
  };
  struct Means {  // decayed sums of the last events
    double busy = 0, time = 0, stall = 0, work = 0, count = 0, hits = 0, asked = 0;
  };

  // simulator.cpp
  bool step(bool pauses);
  void begin(bool pauses);
  bool pass(bool pauses);
  void slow_down();
  void finish();
  bool process(double until, bool pauses);
  void await_point(double known);
  // simulator_demand.cpp
  double demand(bool pauses);
  double take_slots(size_t pool);
  void give_up(size_t pool, int64_t count);
  double move(double link);
  void evict(uint32_t b);
  void enter(uint32_t b);
  void leave(uint32_t b);
  void read_into_host(uint32_t b);
  void list_low(uint32_t b);
  double boundary() const;
  // simulator_prefetch.cpp
  void arrive(int64_t point);
  void judge(int64_t point);
  template <class Wanted>
  void offer_all(int64_t point, int64_t depth, Wanted wanted);
  int64_t depth_of(int64_t point) const;
  double backlog() const;
  double ahead(uint32_t b, double p, int64_t e) const;
  double utilisation() const { return means_.time > 0 ? means_.busy / means_.time : 0; }
  double mean_event() const;
  double rise_of_threshold() const;
  double price_of_link() const;
  bool pays(int64_t point, uint32_t b, double p, double time, double price, double copy);
  bool start(uint32_t b, double p, int64_t e);
  void start_copy(int64_t b, double work, bool upgrade);
  int64_t next_upgrade();
  double copy_of(uint32_t b) const { return blocks_[b].low ? low_ns_ : copy_ns_; }
  /// The same of a copy that begins before somebody waits for it.
  double ahead_of(double copy) const {
    return costs_.link_latency_ns + (copy - costs_.link_latency_ns) / costs_.forecast_share;
  }
  void start_link();
  void start_file();
  void land_link();
  void land_file();
  struct Spread {
    double mean = 0, most = 0, entropy = 0;
  };
  Spread spread(int64_t point, int64_t horizon) const;

  /// Whether the link copies what a prefetch took a slot for.
  bool flies(uint32_t b) const { return link_block_ == static_cast<int64_t>(b) && !upgrade_; }
  size_t pool_of(uint32_t b) const {
    return pools_.size() == 1 ? 0 : b / static_cast<uint32_t>(calls_.experts);
  }
  /// The event of horizon 1.
  int64_t first_event_of(int64_t point) const {
    return point / (calls_.layers + 1) * calls_.layers + point % (calls_.layers + 1);
  }
  /// The first event after the point's document.
  int64_t end_of(int64_t point) const {
    return document_end_[static_cast<size_t>(calls_.document[point / (calls_.layers + 1)])];
  }

  const Calls calls_;
  const CostTable costs_;
  const RuleTable rules_;
  const Room room_;
  double copy_ns_, read_ns_, low_ns_, decay_;
  bool foresees_ = false;
  std::vector<double> next_use_;  // [M], for belady: the next event that demands the same block
  std::vector<double> first_use_;
  std::vector<int64_t> document_end_;
  std::vector<int64_t> value_point_;  // per pool: the point for which `pool_value_` is right
  std::vector<double> pool_value_;    // what goes first in each pool is worth

  Eviction eviction_;
  HostTier host_;
  Waiting waiting_;
  std::vector<Block> blocks_;
  std::vector<Pool> pools_;
  std::vector<Tally> tallies_;
  std::vector<uint32_t> absent_, reads_, copies_, late_;  // of this event
  std::vector<uint32_t> lows_;  // on the device in an approximate copy; others in it are passed over

  Phase phase_ = Phase::Begin;
  int64_t n_ = 0, begun_ = kNone, point_ = kNone;
  Tally* tally_ = nullptr;
  Means means_;
  double now_ = 0, until_ = 0, began_ = 0, router_ = 0, lag_ = 0, stall_ = 0, busy_ = 0;
  int64_t hits_ = 0;
  // The host's work: launches since the router before has chosen, and what this phase has of its own
  bool slows_ = false, slowed_ = false;  // slowed_: `until_` has it
  HostWork launches_, own_;
  double device_ = 0;  // when the router would have chosen, if the host were no later
  // The link: a prefetch's copy under way (or the exact one after an approximate one), and from when on it
  // may start another one
  int64_t link_block_ = kNone;
  bool upgrade_ = false;
  double link_work_ = 0;
  bool stopped_ = false;  // for a demand; `link_done_` is the work that is done
  double link_start_ = 0, link_done_ = 0, link_end_ = 0, link_free_ = 0;
  // The file: a prefetch's read under way (nobody's if it was given up)
  int64_t file_block_ = kNone;
  bool file_orphan_ = false;
  double file_end_ = 0, file_free_ = 0;
  // Points whose forecasts are not known yet: a ring
  std::vector<double> known_;
  int64_t known_first_ = 0, known_last_ = 0;
};

}  // namespace specgate::sim
