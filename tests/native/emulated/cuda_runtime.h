// The part of the CUDA runtime that device_cuda.cu calls, on threads: streams run in order and beside each other, events
// order them, copies take the time of a link that all streams share. So the copy engine is tested without a GPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#define CUDART_VERSION 13000

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotReady = 600;
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaEventBlockingSync = 1,
                   cudaHostAllocPortable = 1;

namespace emulated {

/// Nanoseconds that a megabyte takes on the link; copies that may fail before one does.
inline std::atomic<int64_t> link_ns_per_mb{0}, copies_until_failure{-1};
inline std::atomic<int64_t> streams_alive{0}, events_alive{0}, memory_alive{0};
inline std::mutex link;

/// As long as work that is queued needs it, though the event be destroyed.
struct Progress {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t recorded = 0, done = 0;
  int64_t last() {
    const std::lock_guard lock(mutex);
    return recorded;
  }
  bool is_done() {
    const std::lock_guard lock(mutex);
    return done >= recorded;
  }
  void wait_for(int64_t number) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return done >= number; });
  }
};
struct Event {
  std::shared_ptr<Progress> progress = std::make_shared<Progress>();
};

class Stream {
 public:
  Stream() : worker_([this] { run(); }) { ++streams_alive; }
  ~Stream() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    worker_.join();
    --streams_alive;
  }
  void add(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(work));
    }
    changed_.notify_all();
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return queue_.empty() && !busy_; });
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return ending_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      work();
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool busy_ = false, ending_ = false;
  std::thread worker_;
};

inline Stream& default_stream() {
  static Stream stream;
  return stream;
}

inline void copy(void* to, const void* from, size_t bytes) {
  const int64_t pace = link_ns_per_mb;
  if (pace > 0) {
    const std::lock_guard lock(link);
    const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(pace * int64_t(bytes) / 1000000);
    while (std::chrono::steady_clock::now() < until) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  std::memcpy(to, from, bytes);
}

}  // namespace emulated

struct CUstream_st : emulated::Stream {};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = emulated::Event*;

namespace emulated {
inline Stream& of(cudaStream_t stream) { return stream == nullptr ? default_stream() : *stream; }
}  // namespace emulated

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated failure"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetPCIBusId(char*, int, int) { return cudaErrorInvalidValue; }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -1;
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = size_t{1} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (bytes > size_t{1} << 30) return cudaErrorInvalidValue;
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  ++emulated::memory_alive;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  if (memory != nullptr) --emulated::memory_alive;
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulated::of(stream).synchronize();
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new emulated::Event;
  ++emulated::events_alive;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  --emulated::events_alive;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const auto progress = event->progress;
  int64_t number = 0;
  {
    const std::lock_guard lock(progress->mutex);
    number = ++progress->recorded;
  }
  emulated::of(stream).add([progress, number] {
    {
      const std::lock_guard lock(progress->mutex);
      progress->done = std::max(progress->done, number);
    }
    progress->changed.notify_all();
  });
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  emulated::of(stream).add([progress = event->progress, number = event->progress->last()] {
    progress->wait_for(number);
  });
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  event->progress->wait_for(event->progress->last());
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->progress->is_done() ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (emulated::copies_until_failure >= 0 && emulated::copies_until_failure-- == 0) return cudaErrorInvalidValue;
  emulated::of(stream).add([=] { emulated::copy(to, from, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  emulated::of(stream).add([=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}
