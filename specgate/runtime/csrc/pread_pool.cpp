#include "pread_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

namespace specgate {

PreadPool::PreadPool(ReadQueue& queue, int threads) : queue_(queue) {
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
  } catch (...) {
    queue_.close();
    stop();
    throw;
  }
}

PreadPool::~PreadPool() { stop(); }

void PreadPool::stop() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void PreadPool::run() {
  ::pthread_setname_np(::pthread_self(), "sg-pread");
  while (const ReadQueue::Work work = queue_.wait()) {
    if (work.report != nullptr)
      queue_.report(work.report);
    else
      drive(work.transfer);
  }
}

void PreadPool::drive(Transfer* transfer) {
  TransferContext& context = queue_.context();
  bool ended = !transfer->owner()->active() || !transfer->begin(context);
  while (!ended && transfer->owner()->active()) {
    if (transfer->stalls() > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(50 * std::min(transfer->stalls(), 20)));
    }
    const Attempt attempt = transfer->next(context);
    int64_t result = -attempt.fault.error;
    if (result == 0) {
      context.began();
      const ssize_t got =
          ::pread(attempt.descriptor, attempt.address, attempt.length, static_cast<off_t>(attempt.offset));
      result = got < 0 ? -errno : attempt.spoil(got);
      context.ended();
    }
    ended = transfer->landed(context, attempt, result);
  }
  queue_.finish(transfer);
}

}  // namespace specgate
