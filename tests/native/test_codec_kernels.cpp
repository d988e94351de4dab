// The decoding kernel, run on the CPU: 32 threads are the lanes of a warp, and meet where the warp would.
//
// Shows that tiles, rounds and addresses are right; the same kernel on a device is tested in
// tests/runtime/test_codecs_gpu.py.
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "codec_oracle.h"
#include "codec_plan.h"
#include "floats.h"

// What CUDA would provide.
#define __device__
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Place {
  uint32_t x = 0, y = 0;
};
namespace specgate::kernels {
thread_local Place threadIdx, blockIdx;
std::barrier<>* meeting = nullptr;
const unsigned char* block_end = nullptr;
bool outside = false;

uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
float __uint_as_float(uint32_t x) { return float_of_bits(x); }
uint32_t __float_as_uint(float x) { return bits_of_float(x); }
float fminf(float a, float b) { return std::fmin(a, b); }
float fmaxf(float a, float b) { return std::fmax(a, b); }
float float_of_half_bits(uint16_t x) { return float_of_f16(x); }
uint32_t pack_bf16(float a, float b) {
  return bf16_of_float(a) | static_cast<uint32_t>(bf16_of_float(b)) << 16;
}
uint32_t pack_f16(float a, float b) { return f16_of_float(a) | static_cast<uint32_t>(f16_of_float(b)) << 16; }
template <typename T>
T load_cached(const T* at) {
  return *at;
}
uint4 load_once(const uint4* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0 ||
      reinterpret_cast<const unsigned char*>(at + 1) > block_end) {
    outside = true;
    return {};
  }
  return *at;
}
void sync_warp() { meeting->arrive_and_wait(); }
}  // namespace specgate::kernels

#include "codec_kernels.cuh"

using namespace specgate;
using specgate::test::expected_slot;
using specgate::test::make_format;
using specgate::test::random_block;

namespace {

template <DType To>
void run_warp(Codec codec, const kernels::Work& work) {
  using kernels::Source;
  if (codec == Codec::Int4) {
    kernels::decode_kernel<Source::Int4, To>(work);
  } else if (codec == Codec::Fp8) {
    kernels::decode_kernel<Source::Fp8, To>(work);
  } else {
    kernels::decode_kernel<Source::Int8, To>(work);
  }
}

/// Every warp of the grid, one after the other.
template <DType To>
void launch(const BlockFormat& format, kernels::Work work, const std::vector<kernels::BlockJob>& jobs) {
  for (size_t j = 0; j < jobs.size(); ++j) work.job[j] = jobs[j];
  std::barrier<> meeting(32);
  kernels::meeting = &meeting;
  std::vector<std::thread> lanes;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    lanes.emplace_back([&, lane] {
      for (uint32_t job = 0; job < jobs.size(); ++job) {
        for (uint32_t warp = 0; warp < (work.tiles + kernels::kWarps - 1) / kernels::kWarps * kernels::kWarps;
             ++warp) {
          kernels::blockIdx = {warp / kernels::kWarps, job};
          kernels::threadIdx = {warp % kernels::kWarps * 32 + lane, 0};
          meeting.arrive_and_wait();  // the shared memory of the warp before is free
          run_warp<To>(format.codec, work);
        }
      }
    });
  }
  for (std::thread& lane : lanes) lane.join();
}

void check_kernel(const BlockFormat& format, uint32_t seed) {
  validate(format);
  constexpr size_t kJobs = 2;
  struct alignas(16) Chunk {
    std::byte bytes[16];
  };
  for (size_t j = 0; j < kJobs; ++j) {  // one after the other, for the end of each block is watched
    const std::vector<std::byte> block = random_block(format, seed + static_cast<uint32_t>(j));
    std::vector<Chunk> from(block.size() / 16), to(format.slot_bytes / 16);
    std::memcpy(from.data(), block.data(), block.size());
    std::memset(to.data(), 0xA5, format.slot_bytes);
    auto* bytes = reinterpret_cast<unsigned char*>(from.data());
    auto* slot = reinterpret_cast<unsigned char*>(to.data());
    kernels::block_end = bytes + block.size();
    for (const DType type : {DType::F32, DType::BF16, DType::F16}) {
      const kernels::Work work = kernels::plan(format, type);
      if (work.pieces == 0) continue;
      const std::vector<kernels::BlockJob> jobs = {{bytes, slot}};
      if (type == DType::F32) launch<DType::F32>(format, work, jobs);
      if (type == DType::BF16) launch<DType::BF16>(format, work, jobs);
      if (type == DType::F16) launch<DType::F16>(format, work, jobs);
    }
    const std::vector<std::byte> expected = expected_slot(format, block.data(), std::byte{0xA5});
    CHECK(std::memcmp(expected.data(), slot, expected.size()) == 0);
    CHECK(!kernels::outside);
  }
}

}  // namespace

int main() {
  uint32_t seed = 100;
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
    // Whole tiles, a part of one, rows that 16 bytes of the slot span, and a single value.
    for (const uint64_t cols : {256, 64, 40, 33, 1}) {
      const std::vector<std::pair<uint64_t, uint64_t>> shapes = {{9, cols}, {3, 96}};
      check_kernel(make_format(Codec::Int8, 0, DType::F32, dtype, shapes, false), seed += 10);
      check_kernel(make_format(Codec::Fp8, 0, DType::BF16, dtype, shapes, true), seed += 10);
      check_kernel(make_format(Codec::Int4, 32, DType::F16, dtype, shapes, true), seed += 10);
      check_kernel(make_format(Codec::Int4, 64, DType::F32, dtype, shapes, true), seed += 10);
      for (const DType stored : {DType::F32, DType::BF16, DType::F16}) {
        check_kernel(make_format(Codec::None, 0, stored, dtype, shapes, true), seed += 10);
      }
    }
  }
  // Several jobs in one launch go to their own slots.
  const BlockFormat format = make_format(Codec::Int8, 0, DType::F32, DType::BF16, {{16, 64}}, false);
  std::vector<std::vector<std::byte>> blocks, slots;
  std::vector<kernels::BlockJob> jobs;
  for (uint32_t j = 0; j < 3; ++j) {
    blocks.push_back(random_block(format, j));
    slots.emplace_back(format.slot_bytes);
  }
  kernels::block_end = reinterpret_cast<const unsigned char*>(UINTPTR_MAX);
  for (uint32_t j = 0; j < 3; ++j) {
    jobs.push_back({reinterpret_cast<const unsigned char*>(blocks[j].data()),
                    reinterpret_cast<unsigned char*>(slots[j].data())});
  }
  launch<DType::BF16>(format, kernels::plan(format, DType::BF16), jobs);
  for (uint32_t j = 0; j < 3; ++j) CHECK(slots[j] == expected_slot(format, blocks[j].data(), std::byte{0}));
  return specgate::test::report("codec kernels");
}
