// What an event asks for: slots, and the time until all of its experts are there.
#include <algorithm>
#include <cmath>

#include "simulator.h"

namespace specgate::sim {

void Simulator::enter(uint32_t b) {
  eviction_.enter(b);
  ++pools_[pool_of(b)].evictable;
}

void Simulator::leave(uint32_t b) {
  eviction_.leave(b);
  --pools_[pool_of(b)].evictable;
}

void Simulator::evict(uint32_t b) {
  leave(b);
  Block& block = blocks_[b];
  block.place = Place::Absent;
  ++pools_[pool_of(b)].free;
  ++tally_->evictions;
  if (block.unused) tally_->wasted_bytes += block.spent;
  block.unused = block.low = false;
}

void Simulator::list_low(uint32_t b) {
  if (!blocks_[b].low || blocks_[b].low_listed) return;
  blocks_[b].low_listed = true;
  lows_.push_back(b);
}

void Simulator::read_into_host(uint32_t b) {
  const bool was = host_.has(b);
  const int64_t gone = host_.insert(b);
  auto waits = [this](uint32_t x) { return blocks_[x].place == Place::Absent && waiting_.queued(x); };
  if (gone >= 0 && waits(static_cast<uint32_t>(gone))) waiting_.moved(static_cast<uint32_t>(gone), false);
  if (!was && host_.has(b) && waits(b)) waiting_.moved(b, true);
}

/// When the copy under way can be stopped next: the work done by then.
double Simulator::boundary() const {
  if (now_ == link_start_) return link_done_;  // it stands at one
  const double total = link_work_, done = link_done_ + (now_ - link_start_);
  if (costs_.link_chunk_bytes == 0) return total;
  const double chunk = static_cast<double>(costs_.link_chunk_bytes) / (costs_.link_bytes_per_ns * costs_.forecast_share);
  const double chunks = std::max(1.0, std::ceil((done - costs_.link_latency_ns) / chunk));
  return std::min(costs_.link_latency_ns + chunks * chunk, total);
}

/// The demand of event n_ at now_; returns when all of its experts are there.
double Simulator::demand(bool pauses) {
  const int64_t first = calls_.event_start[n_], last = calls_.event_start[n_ + 1];
  const auto first_block = static_cast<uint32_t>(n_ % calls_.layers * calls_.experts);
  const double router = now_;
  int64_t low = 0;
  begun_ = n_;
  eviction_.begin_event(n_);
  absent_.clear(), reads_.clear(), copies_.clear(), late_.clear();
  for (int64_t i = first; i < last; ++i) {
    const uint32_t b = first_block + static_cast<uint32_t>(calls_.expert[i]);
    Block& block = blocks_[b];
    block.pinned = true;
    block.judged = block.place == Place::Absent || (block.place == Place::Present && eviction_.marked(b));
    host_.touch(b);
    if (block.place == Place::Present) {
      leave(b);
      low += block.low;
    } else if (block.place == Place::Flying) {
      late_.push_back(b);
    } else {
      const bool on_host = host_.has(b);
      if (waiting_.queued(b)) waiting_.drop(b, on_host);
      absent_.push_back(b);
      (on_host ? copies_ : reads_).push_back(b);
    }
    block.unused = false;
    eviction_.use(b, next_use_.empty() ? 0.0 : next_use_[static_cast<size_t>(i)]);
  }
  if (!waiting_.empty()) tally_->stale += waiting_.drop_stale(n_);

  const auto late = static_cast<int64_t>(late_.size()), missing = static_cast<int64_t>(absent_.size());
  hits_ = last - first - late - missing;
  tally_->hits += hits_ - low;
  tally_->low_hits += low;
  tally_->late += late;
  tally_->host_hits += static_cast<int64_t>(copies_.size());
  tally_->misses += static_cast<int64_t>(reads_.size());
  tally_->demand_bytes += missing * costs_.expert_bytes;
  tally_->file_bytes += static_cast<int64_t>(reads_.size()) * costs_.expert_bytes;
  busy_ = static_cast<double>(missing) * copy_ns_;
  tally_->link_busy_ns += busy_;

  double there = router;
  if (late + missing > 0) {
    const double link = take_slots(pool_of(first_block));
    there = move(link);
  }
  stall_ = there - router;
  if (foresees_ || pauses) await_point(router + costs_.forecast_ns);
  return there;
}

/// Slots for what is absent; returns when the link is free for it.
double Simulator::take_slots(size_t pool) {
  Pool& room = pools_[pool];
  const auto missing = static_cast<int64_t>(absent_.size());
  double link = now_;
  if (link_block_ != kNone) {
    const auto b = static_cast<uint32_t>(link_block_);
    const bool demanded = blocks_[b].pinned && flies(b) && blocks_[b].place == Place::Flying;
    link = link_end_;
    if (!demanded) {  // stopped; move() says when it goes on
      const double done = boundary();
      link = link_start_ + (done - link_done_);
      stopped_ = done < link_work_;
      if (stopped_) link_done_ = done;
    }
  }
  if (missing > room.free + room.evictable) give_up(pool, missing - room.free - room.evictable);
  for (const uint32_t b : absent_) {
    if (room.free == 0) evict(static_cast<uint32_t>(eviction_.victim(pool)));
    --room.free;
    blocks_[b].place = Place::Present;
    blocks_[b].low = false;
  }
  return link;
}

/// So many transfers under way are given up: those for the latest events, the least probable of them, first.
void Simulator::give_up(size_t pool, int64_t count) {
  for (; count > 0; --count) {
    int64_t found = kNone;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const Block& block = blocks_[i];
      if (block.place != Place::Flying || block.pinned || pool_of(static_cast<uint32_t>(i)) != pool) continue;
      if (found != kNone) {
        const Block& best = blocks_[static_cast<size_t>(found)];
        if (block.target < best.target || (block.target == best.target && block.p > best.p)) continue;
      }
      found = static_cast<int64_t>(i);
    }
    const auto b = static_cast<uint32_t>(found);
    if (flies(b)) {
      if (stopped_) tally_->link_busy_ns -= link_work_ - link_done_;
      stopped_ = false;
      link_block_ = kNone;
    } else if (file_block_ == found && !file_orphan_) {
      file_orphan_ = true;
    } else {
      waiting_.staged.remove(b);
    }
    blocks_[b].place = Place::Absent;
    blocks_[b].unused = blocks_[b].low = false;
    ++pools_[pool].free;
    tally_->wasted_bytes += blocks_[b].spent;
  }
}

/// The demanded blocks over the link, which is free from `link` on; returns when the last one is there.
double Simulator::move(double link) {
  const double router = now_;
  double file = file_block_ != kNone ? file_end_ : router;
  int64_t reading = kNone;  // late, its read under way
  double reading_copy = 0;
  bool used = !absent_.empty();
  for (const uint32_t b : late_) {
    blocks_[b].place = Place::Present;
    list_low(b);
    if (flies(b)) {
      tally_->late_ns += link_end_ - router;
      continue;
    }
    used = true;
    const double copy = copy_of(b);
    tally_->link_busy_ns += copy;
    if (static_cast<int64_t>(b) == file_block_ && !file_orphan_) {
      reading = b;
      reading_copy = copy;
      continue;
    }
    waiting_.staged.remove(b);
    link += copy;
    tally_->late_ns += link - router;
  }
  if (!used) return link;
  size_t copied = 0, read = 0;
  double next_read = file + read_ns_;
  while (reading != kNone || copied < copies_.size() || read < reads_.size()) {
    const bool copy_ready = copied < copies_.size(), read_ready = read < reads_.size() && next_read <= link;
    if (reading != kNone && file <= link) {
      reading = kNone;
      link += reading_copy;
      tally_->late_ns += link - router;
    } else if (copy_ready && !(read_ready && reads_[read] < copies_[copied])) {
      ++copied;
      link += copy_ns_;
    } else if (read_ready) {
      ++read;
      next_read += read_ns_;
      link += copy_ns_;
    } else {
      link = reading != kNone ? file : next_read;
    }
  }
  if (!reads_.empty()) {
    file_free_ = next_read - read_ns_;
    for (const uint32_t b : reads_) read_into_host(b);
  }
  link_free_ = link;
  if (stopped_) {
    link_start_ = link;
    link_end_ = link + (link_work_ - link_done_);
    stopped_ = false;
  }
  return link;
}

}  // namespace specgate::sim
