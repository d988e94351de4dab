#include "uring.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace specgate {
namespace {

constexpr uint64_t kWake = UINT64_MAX,
                   kCancel = UINT64_MAX - 1;  // tags; reads carry the number of their slot
/// Less than this is summed or copied at once: handing it to another thread takes longer.
constexpr uint64_t kWorthHandingOver = 64 << 10;

}  // namespace

std::unique_ptr<UringEngine> UringEngine::make(ReadQueue& queue, int depth, int threads, std::string& why) {
  // Per slot one read and one cancellation, and the poll; the kernel makes the completion queue twice as
  // long.
  std::unique_ptr<Ring> ring = Ring::make(2 * static_cast<unsigned>(depth) + 2, why);
  if (ring == nullptr) return nullptr;
  const int event = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (event < 0) {
    why = "no eventfd (" + errno_text(errno) + ")";
    return nullptr;
  }
  return std::unique_ptr<UringEngine>(new UringEngine(queue, std::move(ring), event, depth, threads));
}

UringEngine::UringEngine(ReadQueue& queue, std::unique_ptr<Ring> ring, int event, int depth, int threads)
    : queue_(queue), ring_(std::move(ring)), event_(event), slots_(static_cast<std::size_t>(depth)) {
  for (uint32_t slot = 0; slot < slots_.size(); ++slot) free_.push_back(slot);
  try {
    finishers_ = std::make_unique<TaskPool>(threads);
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    ::close(event_);
    throw;
  }
}

UringEngine::~UringEngine() {
  stop();
  ::close(event_);
}

void UringEngine::stop() {
  if (thread_.joinable()) thread_.join();
  finishers_.reset();
  ring_.reset();
}

void UringEngine::wake() {
  if (woken_.exchange(true)) return;  // the thread has yet to look
  const uint64_t one = 1;
  while (::write(event_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void UringEngine::rearm() {
  uint64_t count;
  while (::read(event_, &count, sizeof count) < 0 && errno == EINTR) {
  }
  ring_->poll(event_, kWake);
}

void UringEngine::run() {
  ::pthread_setname_np(::pthread_self(), "sg-uring");
  ring_->poll(event_, kWake);
  for (;;) {
    woken_.store(false);  // before looking: who adds something from here on writes to the eventfd again
    fill();
    cancel_dropped();
    if (free_.size() == slots_.size() && queue_.drained()) return;
    const int error = -ring_->enter(true);
    if (error != 0) {
      std::fprintf(stderr, "specgate: io_uring_enter failed (%s): use the backend pread\n",
                   errno_text(error).c_str());
      std::abort();  // reads under way would write to memory that nobody keeps
    }
    uint64_t tag;
    int32_t result;
    while (ring_->next(tag, result)) {
      if (tag == kWake)
        rearm();
      else if (tag != kCancel)
        landed(static_cast<uint32_t>(tag), result);
    }
  }
}

/// Takes work as long as there are free slots.
void UringEngine::fill() {
  while (!free_.empty()) {
    const ReadQueue::Work work = queue_.take();
    if (!work) return;
    if (work.report != nullptr) {
      ring_->enter(false);  // reads queued before it need not wait for whoever is told
      queue_.report(work.report);
      continue;
    }
    const uint32_t slot = free_.back();
    free_.pop_back();
    slots_[slot] = {work.transfer, {}, false};
    if (work.transfer->owner()->active() && work.transfer->begin(queue_.context()))
      drive(slot);
    else
      ended(slot);
  }
}

/// Queues the transfer's next read.
void UringEngine::drive(uint32_t number) {
  Slot& slot = slots_[number];
  TransferContext& context = queue_.context();
  while (slot.transfer->owner()->active()) {
    slot.attempt = slot.transfer->next(context);
    const Attempt& attempt = slot.attempt;
    if (attempt.fault.error == 0) {
      // Through the page cache the bytes are copied where the read is made: on a worker of the kernel, not
      // here.
      const bool on_worker = !attempt.direct || slot.transfer->stalls() > 0;
      context.began();
      ring_->read(attempt.descriptor, attempt.address, static_cast<uint32_t>(attempt.length), attempt.offset,
                  on_worker, number);
      return;
    }
    if (slot.transfer->landed(context, attempt, -attempt.fault.error)) break;
  }
  ended(number);
}

void UringEngine::landed(uint32_t number, int32_t result) {
  Slot& slot = slots_[number];
  TransferContext& context = queue_.context();
  context.ended();
  slot.cancelling = false;
  if (slot.transfer->landed(context, slot.attempt, slot.attempt.spoil(result)))
    ended(number);
  else
    drive(number);
}

/// The transfer needs the kernel no more.
void UringEngine::ended(uint32_t number) {
  Transfer* const transfer = slots_[number].transfer;
  slots_[number].transfer = nullptr;
  free_.push_back(number);
  const bool work = transfer->whole() && (transfer->bounced() || transfer->owner()->request.crc);
  if (!work || transfer->length() < kWorthHandingOver || finishing_.load() >= slots_.size()) {
    queue_.finish(
        transfer);  // so buffers that wait to be copied never outnumber the slots by more than twice
    return;
  }
  finishing_.fetch_add(1);
  finishers_->add([this, transfer] {
    queue_.finish(transfer);
    finishing_.fetch_sub(1);
  });
}

void UringEngine::cancel_dropped() {
  const uint64_t dropped = queue_.dropped();
  if (dropped == dropped_seen_) return;
  dropped_seen_ = dropped;
  for (uint32_t number = 0; number < slots_.size(); ++number) {
    Slot& slot = slots_[number];
    if (slot.transfer == nullptr || slot.cancelling || slot.transfer->owner()->active()) continue;
    slot.cancelling = true;
    ring_->cancel(number, kCancel);
  }
}

}  // namespace specgate
