#include <cstdlib>
#include <new>

#include "error.h"
#include "speculate.h"

namespace specgate {

namespace {

constexpr size_t kEntryWords = sizeof(ForecastEntry) / sizeof(uint64_t);
static_assert(sizeof(ForecastEntry) == 16 && sizeof(ForecastSlot) == 64);

/// Words of the ring are written by a device or by another thread at any time.
uint64_t word_at(const unsigned char* at, std::memory_order order) {
  auto* word = reinterpret_cast<uint64_t*>(const_cast<unsigned char*>(at));
  return std::atomic_ref<uint64_t>(*word).load(order);
}

}  // namespace

ForecastRing::ForecastRing(int slots, int capacity, void* (*allocate)(size_t), void (*free)(void*))
    : free_(free) {
  if (slots < 2 || capacity < 1)
    throw StoreFailure(StoreFailure::Kind::Config, "a ring of " + std::to_string(slots) + " forecasts of " +
                                                       std::to_string(capacity) +
                                                       " entries is too small: use 2 or more");
  view_.slots = slots;
  view_.capacity = capacity;
  view_.stride =
      (sizeof(ForecastSlot) + sizeof(ForecastEntry) * static_cast<size_t>(capacity) + 63) / 64 * 64;
  const size_t bytes = view_.stride * static_cast<size_t>(slots);
  view_.memory = static_cast<unsigned char*>(allocate ? allocate(bytes) : std::aligned_alloc(64, bytes));
  if (!view_.memory)
    throw StoreFailure(StoreFailure::Kind::Memory,
                       "the ring of forecasts needs " + std::to_string(bytes) +
                           " bytes of host memory and was refused: use fewer slots");
  for (size_t at = 0; at < bytes; at += sizeof(uint64_t))
    std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(view_.memory + at))
        .store(0, std::memory_order_relaxed);
}

ForecastRing::~ForecastRing() { free_ ? free_(view_.memory) : std::free(view_.memory); }

uint64_t ForecastRing::newest(uint64_t known) const {
  for (;;) {
    const unsigned char* slot = view_.memory + (known + 1) % static_cast<uint64_t>(view_.slots) * view_.stride;
    const uint64_t found = word_at(slot, std::memory_order_acquire);
    if (found <= known) return known;
    known = found;
  }
}

bool ForecastReader::poll(Foreseen& out) {
  const RingView& ring = ring_->view();
  const unsigned char* slot = ring.memory + next_ % static_cast<uint64_t>(ring.slots) * ring.stride;
  const uint64_t found = word_at(slot, std::memory_order_acquire);
  if (found < next_) return false;  // not written yet, or being written
  // Acquire loads stay in order, so a word of a later forecast cannot come before that forecast's mark below.
  const uint64_t about = word_at(slot + offsetof(ForecastSlot, about), std::memory_order_acquire);
  const uint64_t ignored = word_at(slot + offsetof(ForecastSlot, ignored), std::memory_order_acquire);
  uint64_t count = about >> 32;
  if (count > static_cast<uint64_t>(ring.capacity))
    count = static_cast<uint64_t>(ring.capacity);  // torn: seen below
  out.entries.resize(count);
  const unsigned char* at = slot + sizeof(ForecastSlot);
  for (size_t i = 0; i < count; ++i, at += sizeof(ForecastEntry)) {
    const uint64_t where = word_at(at, std::memory_order_acquire);
    const uint64_t what = word_at(at + sizeof(uint64_t), std::memory_order_acquire);
    const uint32_t p = static_cast<uint32_t>(what);
    ForecastEntry& entry = out.entries[i];
    entry.layer = static_cast<int32_t>(where);
    entry.expert = static_cast<int32_t>(where >> 32);
    __builtin_memcpy(&entry.p, &p, sizeof(p));
    entry.ahead = static_cast<int32_t>(what >> 32);
  }
  static_assert(kEntryWords == 2);
  if (word_at(slot, std::memory_order_relaxed) != found) {  // overwritten meanwhile
    out.entries.clear();
    return false;
  }
  lost_ += found - next_;
  next_ = found + 1;
  out.sequence = found;
  out.source_layer = static_cast<int32_t>(about);
  out.ignored = static_cast<int32_t>(ignored);
  return true;
}

bool ForecastReader::poll_newest(Foreseen& out) {
  const RingView& ring = ring_->view();
  uint64_t newest = 0;
  for (int i = 0; i < ring.slots; ++i) {
    const uint64_t found =
        word_at(ring.memory + static_cast<size_t>(i) * ring.stride, std::memory_order_acquire);
    if (found > newest) newest = found;
  }
  if (newest < next_) return false;
  const uint64_t before = next_, lost = lost_;
  next_ = newest;
  if (poll(out)) {
    lost_ += newest - before;
    return true;
  }
  next_ = before;
  lost_ = lost;
  return false;
}

}  // namespace specgate
