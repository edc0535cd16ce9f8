// Enough of CUDA to compile csrc/cuda with a C++ compiler and run its kernels on the CPU.
//
// A block's threads are fibers of one operating-system thread. Each runs until it waits, at a block's barrier or a
// warp's shuffle, and goes on when all that it waits for are there; blocks run one after another. So results are those
// of one legal order of execution. What this does not show: races between warps that no barrier orders, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 99 * 1024;  // the least among the supported: compute capability 8.6 and 8.9
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->sharedSizeBytes = 16 * 1024;
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 99 * 1024;

enum class State { kRunnable, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  ucontext_t scheduler;
  size_t current = 0;
  double shuffled[1024];
};

inline Block block;
alignas(16) inline char dynamic_shared[kSharedBytes];

inline void wait(State state) {
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
  swapcontext(&fiber.context, &block.scheduler);
}

inline void run_fiber() {
  block.kernel();
  wait(State::kDone);
}

// Lets fibers [begin, end) go on if all of them that are not done wait in `state`.
inline void release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; ++i) {
    if (block.fibers[i].state != state && block.fibers[i].state != State::kDone) return;
  }
  for (size_t i = begin; i < end; ++i) {
    if (block.fibers[i].state == state) block.fibers[i].state = State::kRunnable;
  }
}

inline void run_block(size_t threads) {
  for (Fiber& fiber : block.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kRunnable;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (;;) {
    bool ran = false, done = true;
    for (size_t i = 0; i < threads; ++i) {
      done = done && block.fibers[i].state == State::kDone;
      if (block.fibers[i].state != State::kRunnable) continue;
      ran = true;
      block.current = i;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      swapcontext(&block.scheduler, &block.fibers[i].context);
    }
    if (done) return;
    if (!ran) throw std::logic_error("threads of a block wait at different barriers");
    release(0, threads, State::kAtBarrier);
    for (size_t warp = 0; warp < threads; warp += kWarp) {
      release(warp, std::min(warp + kWarp, threads), State::kAtShuffle);
    }
  }
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned blocks, dim3 threads, size_t shared_bytes, Args... args) {
  if (shared_bytes > kSharedBytes) throw std::logic_error("more dynamic shared memory than a block has");
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  block.fibers.resize(count);
  block.kernel = [=] { kernel(args...); };
  blockDim = threads;
  gridDim = dim3(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx = dim3(i);
    std::memset(dynamic_shared, 0xff, shared_bytes);  // NaN
    run_block(count);
  }
}

template <class T>
T shuffle_down(T value, int offset) {
  const size_t lane = block.current % kWarp, warp = block.current - lane;
  std::memcpy(&block.shuffled[block.current], &value, sizeof(T));
  wait(State::kAtShuffle);
  T result = value;
  const size_t last = std::min<size_t>(kWarp, block.fibers.size() - warp);
  if (lane + offset < last) std::memcpy(&result, &block.shuffled[warp + lane + offset], sizeof(T));
  wait(State::kAtShuffle);
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::kAtBarrier); }

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return emulation::shuffle_down(value, offset);
}

inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline int atomicMin(int* address, int value) { return std::exchange(*address, std::min(*address, value)); }

// An instruction for global memory: it does not reach a block's shared memory, which keeps its NaN.
inline void __stwb(uint4* address, uint4 value) {
  const char* byte = reinterpret_cast<const char*>(address);
  const bool shared = byte >= emulation::dynamic_shared && byte < emulation::dynamic_shared + emulation::kSharedBytes;
  if (!shared) *address = value;
}

using std::max;
using std::min;
