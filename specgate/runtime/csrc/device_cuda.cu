// The CUDA device: slots in device memory, pinned host memory, two copy streams, events both ways.
//
// Demand copies have a stream of their own with the higher priority, and two streams share a link however they are
// prioritised: so forecast blocks are copied in pieces, few of them at a time, and none is begun while a demand is on
// its way. A compute stream waits on the event of a copy; a copy waits on the event of the last kernels that used its
// slot.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "cuda_calls.h"
#include "device.h"
#include "error.h"
#include "spin_lock.h"

namespace specgate {

namespace {

constexpr size_t kStagingParts = 4;   // encoded blocks on the device that wait for their decoding, per stream
constexpr size_t kReleaseEvents = 512;
constexpr size_t kPieceEvents = 64;
constexpr size_t kMarks = 1024;
// Pieces that the link has to do at a time: at 4 MiB and 50 GB/s each is some 80 us. A thread that wakes late needs more of
// them, and a demand waits behind them all.
constexpr size_t kLeastAhead = 3, kMostAhead = 6, kCalmWakes = 256;

/// An event in a lane's stream: once it is done, so are the lane's first `covers` copies.
struct Mark {
  uint64_t covers;
  cudaEvent_t event;
};

struct Lane {
  cudaStream_t stream = nullptr;
  std::vector<std::byte*> staging;
  size_t staging_bytes = 0, next = 0;
  uint64_t issued = 0;     ///< copies that are wholly in the stream
  std::deque<Mark> marks;  ///< in order; the oldest are used again
};

/// Which of a lane's copies filled a slot last; 0: none.
struct Filled {
  int lane = 0;
  uint64_t number = 0;
};

/// A copy of a forecast block, part of which may be on its way.
struct Piecewise {
  CopyRequest request;
  std::byte* to = nullptr;  ///< the slot, or staging memory; null: not begun
  size_t copied = 0;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, int64_t slots, size_t piece_bytes)
      : ordinal_(ordinal), piece_bytes_(piece_bytes), filled_(slots), last_use_(slots, -1) {
    const Current current(ordinal_);
    int least = 0, greatest = 0;
    require(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities");
    require(cudaStreamCreateWithPriority(&lanes_[0].stream, cudaStreamNonBlocking, greatest), "making a stream");
    require(cudaStreamCreateWithPriority(&lanes_[1].stream, cudaStreamNonBlocking, least), "making a stream");
    released_.resize(kReleaseEvents);
    for (cudaEvent_t& event : released_) {
      require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    }
    for (cudaEvent_t& event : piece_events_) {
      require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "making an event");
    }
    feeder_ = std::thread([this] { feed(); });
    watchers_[0] = std::thread([this] { watch(0); });
    watchers_[1] = std::thread([this] { watch(1); });
  }

  ~CudaDevice() override {
    stop();
    const Current current(ordinal_);
    for (Lane& lane : lanes_) {
      for (std::byte* part : lane.staging) cudaFree(part);
      cudaStreamDestroy(lane.stream);
      for (const Mark& mark : lane.marks) cudaEventDestroy(mark.event);
    }
    for (cudaEvent_t event : released_) cudaEventDestroy(event);
    for (cudaEvent_t event : piece_events_) cudaEventDestroy(event);
  }

  bool is_cuda() const override { return true; }
  int ordinal() const override { return ordinal_; }
  bool issued_is_enough() const override { return true; }

  std::byte* allocate(size_t bytes) override {
    const Current current(ordinal_);
    void* memory = nullptr;
    const cudaError_t status = cudaMalloc(&memory, bytes);
    if (status != cudaSuccess) {
      cudaGetLastError();
      size_t free_bytes = 0, total = 0;
      cudaMemGetInfo(&free_bytes, &total);
      throw StoreFailure(StoreFailure::Kind::Memory,
                         std::to_string(bytes >> 20) + " MiB of device memory were refused, " +
                             std::to_string(free_bytes >> 20) + " MiB are free: lower budget_gb");
    }
    return static_cast<std::byte*>(memory);
  }

  void free(std::byte* memory, size_t) override {
    const Current current(ordinal_);
    cudaFree(memory);
  }

  std::byte* allocate_host(size_t bytes) override {
    const Current current(ordinal_);
    const NearCard near(ordinal_);
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, bytes, cudaHostAllocPortable) != cudaSuccess) {
      cudaGetLastError();
      throw StoreFailure(StoreFailure::Kind::Memory, std::to_string(bytes >> 20) +
                                                         " MiB of pinned host memory were refused: lower host_gb, or "
                                                         "raise the limit on locked memory (ulimit -l)");
    }
    return static_cast<std::byte*>(memory);
  }

  void free_host(std::byte* memory, size_t) override {
    const Current current(ordinal_);
    cudaFreeHost(memory);
  }

  void poison(std::byte* memory, size_t bytes, int64_t slot_key) override {
    const Current current(ordinal_);
    const std::lock_guard lock(mutex_);
    if (slot_key >= 0) after_last_use(slot_key, lanes_[0].stream);
    require(cudaMemsetAsync(memory, 0xFF, bytes, lanes_[0].stream), "poisoning a slot");
    require(cudaStreamSynchronize(lanes_[0].stream), "poisoning a slot");
  }

  bool copy(CopyRequest request) override {
    const Current current(ordinal_);
    const bool whole = request.level == Level::Demand || piece_bytes_ == 0;
    {
      const auto lock = spin_lock(mutex_, callers_);
      if (whole) {
        const int lane = static_cast<int>(request.level);
        Piecewise copy{std::move(request)};
        const cudaError_t status = issue(copy, lane, copy.request.format->block_bytes);
        if (lane == 0) ++demands_;
        flying_[lane].push_back({std::move(copy.request), status, lanes_[lane].issued});
        changed_[lane].notify_one();
      } else {
        waiting_.push_back({std::move(request)});
        feed_.notify_one();
      }
    }
    return whole;
  }

  bool hurry(int64_t slot_key) override {
    const Current current(ordinal_);
    const auto lock = spin_lock(mutex_, callers_);
    const auto copy = std::find_if(waiting_.begin(), waiting_.end(),
                                   [&](const Piecewise& one) { return one.request.slot_key == slot_key; });
    if (copy == waiting_.end()) return false;
    const cudaError_t status = issue(*copy, 1, copy->request.format->block_bytes - copy->copied);
    Flying flying{std::move(copy->request), status, lanes_[1].issued};
    waiting_.erase(copy);
    flying_[1].push_back(std::move(flying));
    changed_[1].notify_one();
    feed_.notify_one();  // it may be stopping, and this was the last
    return true;
  }

  void await(const std::vector<int64_t>& slot_keys, uintptr_t stream) override {
    const Current current(ordinal_);
    const auto lock = spin_lock(mutex_, callers_);
    uint64_t last[2] = {0, 0};
    for (const int64_t key : slot_keys) last[filled_[key].lane] = std::max(last[filled_[key].lane], filled_[key].number);
    for (int lane = 0; lane < 2; ++lane) {
      if (last[lane] == 0) continue;
      cudaEvent_t event = nullptr;
      require(event_of(lanes_[lane], last[lane], &event), "recording an event");
      require(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), event, 0), "waiting for a copy");
    }
  }

  void used(const std::vector<int64_t>& slot_keys, uintptr_t stream) override {
    const Current current(ordinal_);
    const auto lock = spin_lock(mutex_, callers_);
    const size_t place = next_release_++ % kReleaseEvents;
    if (next_release_ > kReleaseEvents) {  // long past: hardly ever waits
      require(cudaEventSynchronize(released_[place]), "reusing an event");
    }
    require(cudaEventRecord(released_[place], reinterpret_cast<cudaStream_t>(stream)), "recording an event");
    for (const int64_t key : slot_keys) last_use_[key] = static_cast<int64_t>(next_release_ - 1);
  }

  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    feed_.notify_all();
    if (feeder_.joinable()) feeder_.join();  // issues what waits
    {
      const std::lock_guard lock(mutex_);
      fed_ = true;
    }
    for (int i = 0; i < 2; ++i) {
      changed_[i].notify_all();
      if (watchers_[i].joinable()) watchers_[i].join();
    }
  }

 private:
  struct Flying {
    CopyRequest request;
    cudaError_t status;
    uint64_t number;  ///< of the lane's copies
  };

  /// An event that is done once the lane's first `number` copies are: an earlier one if there is one, else all that is
  /// in the stream by now. So the copies of a call, which somebody waits for at once, share one. (mutex_ is held)
  static cudaError_t event_of(Lane& lane, uint64_t number, cudaEvent_t* event) {
    if (!lane.marks.empty() && lane.marks.back().covers >= number) {
      *event = std::lower_bound(lane.marks.begin(), lane.marks.end(), number, [](const Mark& mark, uint64_t wanted) {
                 return mark.covers < wanted;
               })->event;
      return cudaSuccess;
    }
    return mark(lane, event);
  }

  /// A new event behind all that is in a lane's stream. (mutex_ is held)
  static cudaError_t mark(Lane& lane, cudaEvent_t* event) {
    cudaError_t status = cudaSuccess;
    const bool fresh = lane.marks.size() < kMarks;
    if (fresh) {
      status = cudaEventCreateWithFlags(event, cudaEventDisableTiming | cudaEventBlockingSync);
    } else {
      *event = lane.marks.front().event;
      status = cudaEventSynchronize(*event);  // long past: hardly ever waits
    }
    if (status == cudaSuccess) status = cudaEventRecord(*event, lane.stream);
    if (status != cudaSuccess) return status;
    if (!fresh) lane.marks.pop_front();
    lane.marks.push_back({lane.issued, *event});
    return status;
  }

  /// The stream waits for the last kernels that used the slot. (mutex_ is held)
  void after_last_use(int64_t slot_key, cudaStream_t stream) {
    const int64_t use = last_use_[slot_key];
    if (use < 0) return;
    // an event that was reused since had been completed before
    if (next_release_ - static_cast<size_t>(use) <= kReleaseEvents) {
      require(cudaStreamWaitEvent(stream, released_[static_cast<size_t>(use) % kReleaseEvents], 0), "ordering a copy");
    }
    last_use_[slot_key] = -1;
  }

  /// A place on the device for an encoded block. The stream's own order protects what was there before, unless that
  /// is not yet wholly copied: at most two blocks are. (mutex_ is held)
  std::byte* staging(Lane& lane, size_t bytes) {
    if (lane.staging_bytes < bytes) {
      require(cudaStreamSynchronize(lane.stream), "growing the staging memory");
      for (std::byte* part : lane.staging) {
        cudaFree(part);
        for (Piecewise& copy : waiting_) {
          if (copy.to == part) copy.to = nullptr, copy.copied = 0;  // from the start, then
        }
      }
      lane.staging.clear();
      lane.staging_bytes = 0;
      for (size_t i = 0; i < kStagingParts; ++i) {
        void* memory = nullptr;
        require(cudaMalloc(&memory, bytes), "allocating staging memory on the device");
        lane.staging.push_back(static_cast<std::byte*>(memory));
      }
      lane.staging_bytes = bytes;
    }
    for (;;) {
      std::byte* part = lane.staging[lane.next++ % kStagingParts];
      if (std::none_of(waiting_.begin(), waiting_.end(), [&](const Piecewise& copy) { return copy.to == part; })) {
        return part;
      }
    }
  }

  /// Puts the next `bytes` of a copy into a lane's stream, and behind the last ones its decoding. (mutex_ is held)
  cudaError_t issue(Piecewise& copy, int number, size_t bytes) {
    Lane& lane = lanes_[number];
    const CopyRequest& request = copy.request;
    const BlockFormat& format = *request.format;
    const bool plain = is_plain(format);
    if (copy.to == nullptr) {
      after_last_use(request.slot_key, lane.stream);
      copy.to = plain ? request.slot : staging(lane, format.block_bytes);
    }
    cudaError_t status = cudaMemcpyAsync(copy.to + copy.copied, request.from + copy.copied, bytes,
                                         cudaMemcpyHostToDevice, lane.stream);
    copy.copied += bytes;
    if (copy.copied == format.block_bytes) {
      if (status == cudaSuccess && !plain) decode_block_cuda(format, copy.to, request.slot, lane.stream);
      filled_[request.slot_key] = {number, ++lane.issued};
    }
    if (status != cudaSuccess) cudaGetLastError();
    return status;
  }

  /// The forecast copy whose next piece goes first, if one may go now; those begun before others. (mutex_ is held)
  std::deque<Piecewise>::iterator next_copy() {
    const bool all = demands_ == 0 || stopping_;
    auto best = waiting_.end();
    for (auto copy = waiting_.begin(); all && copy != waiting_.end(); ++copy) {
      if (best == waiting_.end() || (copy->to != nullptr && best->to == nullptr)) best = copy;
    }
    return best;
  }

  /// Hands pieces of forecast blocks to the second lane. Small blocks share an event.
  void feed() {
    const Current current(ordinal_);
    Lane& lane = lanes_[1];
    std::deque<std::pair<cudaEvent_t, size_t>> ahead;  // pieces on their way, and their bytes
    std::vector<Flying> whole;                         // blocks of the pieces that have no event yet
    size_t bytes_ahead = 0, since = 0, next_event = 0, reach = kLeastAhead + 1, calm = 0;
    const auto close = [&] {  // (mutex_ is held)
      if (since == 0) return;
      cudaEvent_t event = piece_events_[next_event % kPieceEvents];
      if (whole.empty()) {
        ++next_event;
        cudaEventRecord(event, lane.stream);  // a failure shows in the block's own event
      } else {
        const cudaError_t status = mark(lane, &event);
        for (Flying& flying : whole) {
          if (flying.status == cudaSuccess) flying.status = status;
          flying_[1].push_back(std::move(flying));
        }
        whole.clear();
        changed_[1].notify_one();
      }
      ahead.emplace_back(event, since);
      bytes_ahead += since;
      since = 0;
    };
    std::unique_lock lock(mutex_);
    for (;;) {
      const auto copy = next_copy();
      if (copy == waiting_.end()) {
        close();
        if (stopping_ && waiting_.empty()) return;
        feed_.wait(lock, [&] { return next_copy() != waiting_.end() || (stopping_ && waiting_.empty()); });
        continue;
      }
      const size_t block = copy->request.format->block_bytes, bytes = std::min(piece_bytes_, block - copy->copied);
      if (!ahead.empty() && (bytes_ahead + since + bytes > reach * piece_bytes_ || ahead.size() == kPieceEvents)) {
        const auto [event, oldest] = ahead.front();
        ahead.pop_front();
        bytes_ahead -= oldest;
        lock.unlock();
        cudaEventSynchronize(event);
        if (!ahead.empty() && cudaEventQuery(ahead.back().first) == cudaSuccess) {  // woke too late: the link was idle
          reach = std::min(reach + 1, kMostAhead), calm = 0;
        } else if (++calm == kCalmWakes) {
          reach = std::max(reach - 1, kLeastAhead), calm = 0;
        }
        cudaGetLastError();  // that it is not done yet counts as an error
        lock.lock();
        continue;  // who goes first may have changed
      }
      const cudaError_t status = issue(*copy, 1, bytes);
      since += bytes;
      const bool last = status != cudaSuccess || copy->copied == block;
      if (last) {
        Flying flying{std::move(copy->request), status, lane.issued};
        waiting_.erase(copy);
        lock.unlock();
        flying.request.issued();
        lock.lock();
        whole.push_back(std::move(flying));
      }
      if (since >= (last ? piece_bytes_ / 2 : piece_bytes_)) close();
    }
  }

  /// Reports finished copies of one lane, in order.
  void watch(int lane) {
    const Current current(ordinal_);
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_[lane].wait(lock, [&] { return fed_ || !flying_[lane].empty(); });
      if (flying_[lane].empty()) return;
      Flying flying = std::move(flying_[lane].front());
      flying_[lane].pop_front();
      cudaError_t status = flying.status;
      cudaEvent_t event = nullptr;
      if (status == cudaSuccess) status = event_of(lanes_[lane], flying.number, &event);
      lock.unlock();
      if (status == cudaSuccess) status = cudaEventSynchronize(event);
      const bool good = status == cudaSuccess;
      flying.request.done(good ? JobStatus::Ok : JobStatus::Failed,
                          good ? "" : std::string("a copy to the device failed: ") + cudaGetErrorString(status));
      lock.lock();
      if (lane == 0 && --demands_ == 0) feed_.notify_one();
    }
  }

  int ordinal_;
  size_t piece_bytes_;
  std::mutex mutex_;
  std::atomic<int> callers_{0};        // who waits for mutex_ and computes
  Lane lanes_[2];  // by level
  std::deque<Piecewise> waiting_;      // forecast copies that are not wholly issued, in order
  std::condition_variable feed_;
  int64_t demands_ = 0;                // demand copies on their way
  cudaEvent_t piece_events_[kPieceEvents];
  std::vector<Filled> filled_;         // per slot: the copy into it
  std::vector<cudaEvent_t> released_;  // ring: the ends of uses
  std::vector<int64_t> last_use_;      // per slot: number of the use, -1 none
  size_t next_release_ = 0;
  std::deque<Flying> flying_[2];
  std::condition_variable changed_[2];
  bool stopping_ = false, fed_ = false;
  std::thread feeder_, watchers_[2];
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, int64_t slots, size_t piece_bytes) {
  return std::make_unique<CudaDevice>(ordinal, slots, piece_bytes);
}

int cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace specgate
