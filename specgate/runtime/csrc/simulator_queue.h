// What waits for the link and the file, and what lies in host memory.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator_heap.h"

namespace specgate::sim {

/// Host memory: blocks in the order in which they were last touched.
class HostTier {
 public:
  /// With as many slots as blocks, all are there for ever.
  void init(int64_t blocks, int64_t slots);
  bool everything() const { return everything_; }
  bool has(uint32_t b) const { return everything_ || next_[b] != kOut; }
  int64_t used() const { return used_; }
  void touch(uint32_t b);
  /// Puts the block last; returns the one that went for it, or -1.
  int64_t insert(uint32_t b);

 private:
  static constexpr int32_t kOut = -1;
  void unlink(uint32_t b);
  void append(uint32_t b);

  std::vector<int32_t> next_, previous_;  // a ring through `end_`, which is no block
  int32_t end_ = 0;
  int64_t slots_ = 0, used_ = 0;
  bool everything_ = true;
};

/// Prefetches that have not started, and those that have been read and wait for the link.
class Waiting {
 public:
  void init(size_t blocks);
  void reset();
  bool empty() const { return link.empty() && file.empty() && staged.empty(); }
  size_t size() const { return link.size() + file.size() + staged.size(); }
  bool queued(uint32_t b) const { return places_[b] >= 0; }
  /// The block, in none of the heaps so far, waits to be used by event e with probability p.
  static Key key(uint32_t b, double p, int64_t e) { return {static_cast<double>(e), -p, b, 1}; }
  void put(uint32_t b, double p, int64_t e, bool on_host) { (on_host ? link : file).push(key(b, p, e)); }
  /// A block that has not started: the newest forecast's numbers.
  void merge(uint32_t b, double p, int64_t e, bool on_host) { (on_host ? link : file).update(key(b, p, e)); }
  /// The block has come to host memory, or left it.
  void moved(uint32_t b, bool on_host);
  void drop(uint32_t b, bool on_host) { (on_host ? link : file).remove(b); }
  /// Drops what was for event n or before; how many.
  int64_t drop_stale(int64_t n);

  BlockHeap link, file, staged;

 private:
  std::vector<int32_t> places_;
};

}  // namespace specgate::sim
