// Reads by io_uring: one thread keeps `depth` reads before the kernel, others check sums and copy.
//
// The three system calls are made directly (man io_uring; <linux/io_uring.h>): no liburing.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "read_queue.h"
#include "task_pool.h"

namespace specgate {

/// A submission and a completion queue shared with the kernel. For one thread.
class Ring {
 public:
  /// nullptr, and a sentence part in `why`, where the kernel has no usable io_uring (Linux 5.6) or refuses
  /// it.
  static std::unique_ptr<Ring> make(unsigned entries, std::string& why);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  /// Each queues one operation; its completion carries `tag`. There is always room: what is queued is handed
  /// to the kernel when the queue is full.
  void read(int descriptor, void* address, uint32_t length, uint64_t offset, bool on_worker, uint64_t tag);
  void poll(int descriptor, uint64_t tag);     ///< completes once the descriptor is readable
  void cancel(uint64_t target, uint64_t tag);  ///< asks to end the operation with that tag: -ECANCELED
  void nop(uint64_t tag);
  /// Hands over what is queued and, if `wait`, waits for a completion. 0 or -errno (EINTR and the like are
  /// not errors).
  int enter(bool wait);
  /// The next completion; false if there is none.
  bool next(uint64_t& tag, int32_t& result);

 private:
  Ring() = default;
  void* entry(uint8_t operation, int descriptor, uint64_t tag);
  void push();

  int descriptor_ = -1;
  void* rings_ = nullptr;    // both queues
  void* entries_ = nullptr;  // what is submitted
  std::size_t rings_bytes_ = 0, entries_bytes_ = 0;
  uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr,
           *cq_tail_ = nullptr;
  void* completions_ = nullptr;
  uint32_t sq_size_ = 0, sq_mask_ = 0, cq_mask_ = 0, queued_ = 0;
};

class UringEngine : public ReadEngine {
 public:
  /// nullptr, and why, where the kernel refuses io_uring.
  static std::unique_ptr<UringEngine> make(ReadQueue& queue, int depth, int threads, std::string& why);
  ~UringEngine() override;

  const char* name() const override { return "io_uring"; }
  void wake() override;
  void stop() override;

 private:
  struct Slot {
    Transfer* transfer = nullptr;
    Attempt attempt;
    bool cancelling = false;
  };

  UringEngine(ReadQueue& queue, std::unique_ptr<Ring> ring, int event, int depth, int threads);
  void run();
  void fill();
  void drive(uint32_t slot);
  void landed(uint32_t slot, int32_t result);
  void ended(uint32_t slot);
  void cancel_dropped();
  void rearm();

  ReadQueue& queue_;
  std::unique_ptr<Ring> ring_;
  const int event_;  // an eventfd: readable when there is something new
  std::atomic<bool> woken_{false};
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  uint64_t dropped_seen_ = 0;
  std::atomic<uint32_t> finishing_{0};  // transfers with the finishers
  std::unique_ptr<TaskPool> finishers_;
  std::thread thread_;
};

}  // namespace specgate
