// The speculation kernel: one cooperative launch per source point, whatever the batch.
//
// Blocks take work items by turns and wait for each other between phases; the last block to finish merges and
// writes the forecast into mapped host memory. Between launches nothing is left in the counters, so that a
// launch can be captured into a graph and replayed: its arguments never change.
#include <cuda_runtime.h>

#include <cuda/atomic>
#include <string>

#include "error.h"
#include "speculate_phases.h"

namespace specgate {

namespace {

using namespace speculation;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // do not leave it for the next caller
  throw StoreFailure(StoreFailure::Kind::Memory, std::string("speculation: ") + what + " failed: " +
                                                     cudaGetErrorString(status) + "; see `specgate doctor`");
}

struct DeviceBlock {
  static constexpr int threads = kThreads;
  int index, count;
  float* shared;

  template <class F>
  __device__ __forceinline__ void each(int n, F&& f) {
    SPECGATE_UNROLL(1)  // mostly once round: instructions that are not there need not be fetched
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) f(i);
    __syncthreads();
  }
  /// Bit i of words[i / 32] says whether f(i); bits beyond n are 0.
  template <class F>
  __device__ __forceinline__ void ballot(int n, F&& f, uint32_t* words) {
    const int whole = (n + 31) / 32 * 32;  // so that the lanes of a warp go round together
    SPECGATE_UNROLL(1)
    for (int i = static_cast<int>(threadIdx.x); i < whole; i += kThreads) {
      const uint32_t bits = __ballot_sync(0xFFFFFFFFu, i < n && f(i));
      if (threadIdx.x % 32 == 0) words[i / 32] = bits;
    }
    __syncthreads();
  }
  /// Past L1, which does not hear of other blocks' writes.
  __device__ __forceinline__ static float load(const float* at) { return __ldcg(at); }
  __device__ __forceinline__ static void load_16(const void* at, uint32_t (&words)[4]) {
    const uint4 found = __ldg(static_cast<const uint4*>(at));  // matrices never change
    words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
  }
  __device__ __forceinline__ static int bits_set(uint32_t bits) { return __popc(bits); }

  // A reader that sees one of this launch's words also sees that the slot was marked as being written:
  // block 0 did so, fenced, before it arrived where the last block is told; and each thread that stores
  // fences once more.
  __device__ __forceinline__ static void before_storing() { __threadfence_system(); }
  __device__ __forceinline__ static void store(uint64_t* at, uint64_t word) {
    ::cuda::atomic_ref<uint64_t, ::cuda::thread_scope_system>(*at).store(word, ::cuda::memory_order_relaxed);
  }
  /// After a block barrier: the release covers what the other threads stored before it.
  __device__ __forceinline__ static void publish(uint64_t* at, uint64_t word) {
    ::cuda::atomic_ref<uint64_t, ::cuda::thread_scope_system>(*at).store(word, ::cuda::memory_order_release);
  }
};

/// Adds one to a counter for this block once all its threads are here; how many blocks came before it.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  return ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device>(*counter).fetch_add(
      1u, ::cuda::memory_order_acq_rel);
}

/// All blocks are resident (a cooperative launch), so waiting for one another ends.
__device__ __forceinline__ void wait_for_grid(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive(counter);
    const ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> seen(*counter);
    while (seen.load(::cuda::memory_order_acquire) < gridDim.x) {
    }
  }
  __syncthreads();
}

/// Asks for the matrix rows of this block's first items, so that they come while the norms are computed.
template <class M>
__device__ __forceinline__ void fetch_ahead(const SpeculationArgs& a) {
  const int item = static_cast<int>(blockIdx.x);
  if (item >= a.plan.product_items) return;
  const ProductItem<M> product = product_of<M>(a, item);
  const char* from =
      reinterpret_cast<const char*>(product.matrix + static_cast<size_t>(product.first) * product.columns);
  const int bytes = product.inputs * product.columns * static_cast<int>(sizeof(M));
  for (int at = static_cast<int>(threadIdx.x) * 128; at < bytes; at += kThreads * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

template <class M>
__global__ void __launch_bounds__(kThreads, 2) speculate_kernel(const __grid_constant__ SpeculationArgs a) {
  extern __shared__ __align__(16) float shared[];
  __shared__ bool last;
  DeviceBlock block{static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), shared};
  fetch_ahead<M>(a);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    unsigned char* slot = a.ring.memory + (*a.sequence + 1) % a.ring.slots * a.ring.stride;
    DeviceBlock::store(reinterpret_cast<uint64_t*>(slot), 0);
    __threadfence_system();
  }
  begin(block, a);
  if (a.plan.spread) {
    wait_for_grid(a.counters + kCounters - 2);
  }
  for (int phase = 0; phase < a.plan.phases; ++phase) {
    run_phase<M>(block, a, phase);
    if (phase + 1 < a.plan.phases) wait_for_grid(a.counters + phase);
  }
  __syncthreads();
  if (threadIdx.x == 0) last = arrive(a.counters + kCounters - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  merge(block, a);
  // Every block is past every counter.
  if (threadIdx.x < kCounters) a.counters[threadIdx.x] = 0;
}

/// Makes the device current for the calling thread while it lives.
class Current {
 public:
  explicit Current(int device) : device_(device) {
    cudaGetDevice(&before_);
    if (before_ != device_) require(cudaSetDevice(device_), "choosing the device");
  }
  ~Current() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, device_;
};

void* allocate_mapped(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess ? memory : nullptr;
}

void free_mapped(void* memory) { cudaFreeHost(memory); }

class CudaSpeculation : public Speculation {
 public:
  CudaSpeculation(const SpeculationModel& model, int slots, int device, int blocks)
      : Speculation(make_ring(model, slots, device)), model_(model), device_(device), view_(ring_->view()) {
    const Current current(device);
    void* mapped = nullptr;
    require(cudaHostGetDevicePointer(&mapped, view_.memory, 0), "mapping the ring");
    view_.memory = static_cast<unsigned char*>(mapped);
    int cooperative = 0, processors = 0, resident = 0;
    require(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "asking the device");
    require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking the device");
    if (!cooperative)
      throw StoreFailure(StoreFailure::Kind::Config, "device " + std::to_string(device) +
                                                         " cannot launch cooperatively: choose device=cpu");
    kernel_ = model.sizes.bf16 ? reinterpret_cast<const void*>(&speculate_kernel<BFloat16>)
                               : reinterpret_cast<const void*>(&speculate_kernel<float>);
    shared_bytes_ = static_cast<size_t>(shared_floats(model.sizes)) * sizeof(float);
    require(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes_)),
            "reserving shared memory");
    require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel_, kThreads, shared_bytes_),
            "asking for the occupancy");
    if (resident < 1)
      throw StoreFailure(StoreFailure::Kind::Config, "speculation needs " + std::to_string(shared_bytes_) +
                                                         " bytes of shared memory, more than device " +
                                                         std::to_string(device) + " has: use fewer horizons");
    most_blocks_ = processors * smaller(resident, 2);
    if (blocks > 0) most_blocks_ = smaller(most_blocks_, blocks);
    constexpr size_t kHead = 128;  // the sequence number and the counters
    static_assert(sizeof(uint64_t) + kCounters * sizeof(uint32_t) <= kHead);
    const size_t bytes = kHead + scratch_floats(model.sizes) * sizeof(float);
    require(cudaMalloc(&memory_, bytes), "allocating scratch memory");
    const cudaError_t cleared = cudaMemset(memory_, 0, bytes);
    const cudaError_t status = cleared == cudaSuccess ? cudaDeviceSynchronize() : cleared;
    if (status != cudaSuccess) cudaFree(memory_);
    require(status, "clearing scratch memory");
    sequence_ = static_cast<uint64_t*>(memory_);
    counters_ = reinterpret_cast<uint32_t*>(sequence_ + 1);
    scratch_ = static_cast<float*>(memory_) + kHead / sizeof(float);
  }

  ~CudaSpeculation() override {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaDeviceSynchronize();  // launches may still write the ring
    cudaFree(memory_);
    cudaSetDevice(before);
  }

  void launch(const SpeculationInput& input, uintptr_t stream) override {
    check_input(model_, input);
    const Current current(device_);
    SpeculationArgs a{};
    a.model = model_;
    a.input = input;
    a.plan = make_plan(model_.sizes, input.layer, input.batch);
    a.at = make_scratch(model_.sizes, a.plan, input.batch);
    a.scratch = scratch_;
    a.counters = counters_;
    a.sequence = sequence_;
    a.ring = view_;
    const int items = larger(larger(a.plan.product_items, a.plan.attention_items),
                             larger(a.plan.unit_items, a.plan.row_items));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(larger(1, smaller(items, most_blocks_))));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes_;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    void* arguments[] = {&a};
    require(cudaLaunchKernelExC(&config, kernel_, arguments), "the launch");
  }

 private:
  static std::shared_ptr<ForecastRing> make_ring(const SpeculationModel& model, int slots, int device) {
    const Current current(device);
    return std::make_shared<ForecastRing>(slots, model.sizes.horizons * model.sizes.experts, allocate_mapped,
                                          free_mapped);
  }

  const SpeculationModel model_;
  const int device_;
  RingView view_;  // as the device sees it
  const void* kernel_ = nullptr;
  size_t shared_bytes_ = 0;
  int most_blocks_ = 1;
  void* memory_ = nullptr;
  float* scratch_ = nullptr;
  uint32_t* counters_ = nullptr;
  uint64_t* sequence_ = nullptr;
};

}  // namespace

std::unique_ptr<Speculation> make_speculation_cuda(const SpeculationModel& model, int slots, int device,
                                                   int blocks) {
  check_model(model);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) cudaGetLastError();
  if (device < 0 || device >= devices)
    throw StoreFailure(StoreFailure::Kind::Config, "speculation on CUDA device " + std::to_string(device) +
                                                       " of " + std::to_string(devices) +
                                                       " that are there: choose another, or device=cpu");
  return std::make_unique<CudaSpeculation>(model, slots, device, blocks);
}

}  // namespace specgate
