#include "transfer.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "crc32c.h"
#include "read_plan.h"

namespace specgate {
namespace {

constexpr int kShortTries = 4;   // reads in a row that end with nothing before one is given up
constexpr int kBusyTries = 100;  // the same for EINTR and EAGAIN

}  // namespace

BufferPool::~BufferPool() {
  for (std::byte* buffer : free_) std::free(buffer);
}

std::byte* BufferPool::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      std::byte* const buffer = free_.back();
      free_.pop_back();
      return buffer;
    }
  }
  return static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_));
}

void BufferPool::give(std::byte* buffer) {
  const std::lock_guard lock(mutex_);
  free_.push_back(buffer);
}

void TransferContext::began() {
  const uint64_t now = in_flight.fetch_add(1) + 1;
  uint64_t most = peak.load();
  while (most < now && !peak.compare_exchange_weak(most, now)) {
  }
}

void TransferContext::ended() { in_flight.fetch_sub(1); }

int64_t Attempt::spoil(int64_t result) const {
  if (result <= 0 || static_cast<uint64_t>(result) <= fault.limit) return result;
  std::memset(address + fault.limit, 0xA5, static_cast<std::size_t>(result) - fault.limit);
  return static_cast<int64_t>(fault.limit);
}

bool Transfer::begin(TransferContext& context) {
  const OpenFile& file = *context.files[file_];
  direct_ = file.direct();
  base_ = offset_;
  span_ = length_;
  progress_ = 0;
  const auto address = reinterpret_cast<uintptr_t>(destination_);
  if (!direct_ || in_place({offset_, length_}, address, file.memory_alignment())) return true;
  base_ = round_down(offset_, kPage);
  span_ = round_up(offset_ + length_, kPage) - base_;
  if (buffer_ == nullptr) buffer_ = context.buffers.take();
  if (buffer_ != nullptr) return true;
  kind_ = StoreFailure::Kind::Memory;
  error_ = "no memory for a read buffer of " + std::to_string(context.options.chunk) +
           " bytes: free memory, or make the reader's chunk or depth smaller";
  return false;
}

Attempt Transfer::next(TransferContext& context) {
  const OpenFile& file = *context.files[file_];
  Attempt attempt;
  attempt.descriptor = file.descriptor();
  attempt.offset = base_ + progress_;
  attempt.length = span_ - progress_;
  attempt.address = (buffer_ != nullptr ? buffer_ : destination_) + progress_;
  attempt.direct = direct_;
  if (context.options.fault) attempt.fault = context.options.fault(file_, attempt.offset, attempt.length);
  context.reads.fetch_add(1, std::memory_order_relaxed);
  if (direct_) context.direct_reads.fetch_add(1, std::memory_order_relaxed);
  return attempt;
}

bool Transfer::landed(TransferContext& context, const Attempt& attempt, int64_t result) {
  OpenFile& file = *context.files[file_];
  if (result > 0) {
    context.bytes.fetch_add(static_cast<uint64_t>(result), std::memory_order_relaxed);
    uint64_t reached = progress_ + static_cast<uint64_t>(result);
    if (reached >= offset_ - base_ + length_) {
      whole_ = true;
      return true;
    }
    if (direct_) reached = round_down(reached, kPage);
    if (reached > progress_) {
      progress_ = reached;
      stalls_ = 0;
      context.retries.fetch_add(1, std::memory_order_relaxed);
      return false;
    }
  }
  if (result < 0 && -result == EINVAL && attempt.direct && fall_back(context, file)) return false;
  const bool busy = result < 0 && (-result == EINTR || -result == EAGAIN || -result == ECANCELED);
  if (result < 0 && !busy) return fail(file, static_cast<int>(-result), attempt.offset);
  if (++stalls_ < (busy ? kBusyTries : kShortTries) && (busy || file.changed().empty())) {
    context.retries.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  return fail(file, static_cast<int>(std::max<int64_t>(-result, 0)), attempt.offset);
}

/// A direct read was refused: first with memory aligned to a page, then through the page cache.
bool Transfer::fall_back(TransferContext& context, OpenFile& file) {
  const auto address = reinterpret_cast<uintptr_t>(destination_);
  if (buffer_ == nullptr && address % kPage != 0) {
    file.align_memory_fully();
  } else {
    file.stop_direct();
    if (buffer_ != nullptr) context.buffers.give(buffer_);
    buffer_ = nullptr;
  }
  context.retries.fetch_add(1, std::memory_order_relaxed);
  if (begin(context)) return true;
  return false;
}

std::string Transfer::where(const OpenFile& file, uint64_t at) const {
  return "'" + file.path() + "' at byte " + std::to_string(at);
}

bool Transfer::fail(const OpenFile& file, int error, uint64_t at) {
  if (!error_.empty()) return true;
  error_ = file.changed();
  if (!error_.empty()) return true;
  if (error != 0) {
    error_ = "reading " + where(file, at) + " failed (" + errno_text(error) + "): ";
    error_ += error == EIO ? "check the disk, then copy or make the file again" : "check the file system";
  } else {
    error_ = "reading " + where(file, at) + " ended early " + std::to_string(kShortTries) +
             " times: check the file system, then copy or make the file again";
  }
  return true;
}

void Transfer::finish(TransferContext& context, bool sum) {
  const std::byte* bytes = buffer_ != nullptr ? buffer_ + (offset_ - base_) : destination_;
  if (whole_ && sum) crc_ = crc32c(bytes, length_);
  if (buffer_ == nullptr) return;
  if (whole_) {
    std::memcpy(destination_, bytes, length_);
    context.bounced.fetch_add(length_, std::memory_order_relaxed);
  }
  context.buffers.give(buffer_);
  buffer_ = nullptr;
}

}  // namespace specgate
