// Runs CUDA kernels on a CPU, one fiber a CUDA thread, so that their indexing, reductions and barriers are tested where
// there is no GPU. Covers what head_cuda.cu uses. Misaligned 16-byte accesses abort; fibers can be scheduled backwards,
// so that a missing barrier changes the result.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

inline Index threadIdx, blockIdx;

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 256 << 10;
inline bool backwards = false;

struct Fiber {
  ucontext_t context;
  bool done;
};

// The fibers of one block, run in turn by one CPU thread.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  ucontext_t scheduler;
  std::function<void()> kernel;
  unsigned current = 0;
  std::vector<int> arrived;     // at the barrier of each warp, and last of the block
  std::vector<int> generation;  // counts how often each barrier opened
  std::vector<uint32_t> exchange;
};
inline Block* block = nullptr;

inline void pause() {
  Block& b = *block;
  const unsigned me = b.current;
  swapcontext(&b.fibers[me].context, &b.scheduler);
  threadIdx.x = b.current = me;
}

inline void wait_at(int barrier, int expected) {
  Block& b = *block;
  const int generation = b.generation[barrier];
  if (++b.arrived[barrier] == expected) {
    b.arrived[barrier] = 0;
    ++b.generation[barrier];
  }
  while (b.generation[barrier] == generation) pause();
}

inline void run_fiber() {
  block->kernel();
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

inline void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  Block state;
  block = &state;
  state.fibers.resize(threads);
  state.stacks.resize(threads * kStack);
  state.kernel = std::move(kernel);
  state.exchange.resize(threads);
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = backwards ? blocks - 1 - i : i;
    state.arrived.assign(threads / kWarpSize + 1, 0);
    state.generation.assign(threads / kWarpSize + 1, 0);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = state.fibers[t];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = state.stacks.data() + t * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned left = threads; left > 0;) {
      for (unsigned k = 0; k < threads; ++k) {
        const unsigned t = backwards ? threads - 1 - k : k;
        if (state.fibers[t].done) continue;
        threadIdx.x = state.current = t;
        swapcontext(&state.scheduler, &state.fibers[t].context);
        if (state.fibers[t].done) --left;
      }
    }
  }
  block = nullptr;
}

template <typename T>
void check_aligned(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) {
    fprintf(stderr, "misaligned %zu-byte access\n", sizeof(T));
    abort();
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  const auto& block = *cuda_on_cpu::block;
  cuda_on_cpu::wait_at(int(block.arrived.size()) - 1, int(block.fibers.size()));
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  auto& block = *cuda_on_cpu::block;
  const unsigned me = threadIdx.x;
  const int warp = int(me) / cuda_on_cpu::kWarpSize;
  memcpy(&block.exchange[me], &x, sizeof x);
  cuda_on_cpu::wait_at(warp, cuda_on_cpu::kWarpSize);
  float other;
  memcpy(&other, &block.exchange[me ^ unsigned(mask)], sizeof other);
  cuda_on_cpu::wait_at(warp, cuda_on_cpu::kWarpSize);
  return other;
}

inline uint4 __ldcs(const uint4* from) {
  cuda_on_cpu::check_aligned(from);
  return *from;
}
inline void __stcs(uint4* to, uint4 x) {
  cuda_on_cpu::check_aligned(to);
  *to = x;
}

extern "C" inline __attribute__((used)) void cuda_on_cpu_backwards(int backwards) {
  cuda_on_cpu::backwards = backwards != 0;
}
