#include "simulator_queue.h"

#include <algorithm>

namespace specgate::sim {

void HostTier::init(int64_t blocks, int64_t slots) {
  everything_ = slots >= blocks;
  slots_ = slots;
  used_ = 0;
  end_ = static_cast<int32_t>(blocks);
  const auto size = static_cast<size_t>(everything_ ? 0 : blocks + 1);
  next_.assign(size, kOut);
  previous_.assign(size, kOut);
  if (size) next_[size - 1] = previous_[size - 1] = end_;
}

void HostTier::unlink(uint32_t b) {
  next_[static_cast<size_t>(previous_[b])] = next_[b];
  previous_[static_cast<size_t>(next_[b])] = previous_[b];
}

void HostTier::append(uint32_t b) {
  const auto end = static_cast<size_t>(end_);
  const auto block = static_cast<int32_t>(b);
  previous_[b] = previous_[end];
  next_[b] = end_;
  next_[static_cast<size_t>(previous_[end])] = block;
  previous_[end] = block;
}

void HostTier::touch(uint32_t b) {
  if (everything_ || next_[b] == kOut) return;
  unlink(b);
  append(b);
}

int64_t HostTier::insert(uint32_t b) {
  if (everything_ || slots_ == 0) return -1;
  if (next_[b] != kOut) {
    touch(b);
    return -1;
  }
  int64_t gone = -1;
  if (used_ == slots_) {
    gone = next_[static_cast<size_t>(end_)];
    unlink(static_cast<uint32_t>(gone));
    next_[static_cast<size_t>(gone)] = kOut;
  } else {
    ++used_;
  }
  append(b);
  return gone;
}

void Waiting::init(size_t blocks) {
  places_.assign(blocks, -1);
  for (BlockHeap* heap : {&link, &file, &staged}) heap->init(&places_, blocks);
}

void Waiting::reset() {
  std::fill(places_.begin(), places_.end(), -1);
  for (BlockHeap* heap : {&link, &file, &staged}) heap->clear();
}

void Waiting::moved(uint32_t b, bool on_host) {
  BlockHeap& from = on_host ? file : link;
  const Key key = from.at(static_cast<size_t>(places_[b]));
  from.remove(b);
  (on_host ? link : file).push(key);
}

int64_t Waiting::drop_stale(int64_t n) {
  int64_t dropped = 0;
  for (BlockHeap* heap : {&link, &file}) {
    while (!heap->empty() && heap->top().a <= static_cast<double>(n)) {
      heap->remove(heap->top().block);
      ++dropped;
    }
  }
  return dropped;
}

}  // namespace specgate::sim
