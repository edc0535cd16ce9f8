// What every CUDA kernel here uses: launches, packed loads and stores, workspace layout.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ssiuu/types.h"

namespace ssiuu::cuda {

constexpr int kWarp = 32;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Dynamic shared memory that a block of the kernel may ask for, on the current device.
template <class... Params>
int64_t shared_memory_limit(void (*kernel)(Params...)) {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel));
  return limit - static_cast<int64_t>(attributes.sharedSizeBytes);
}

// `shared_bytes` of shared memory beside the kernel's own, for `shared_memory`.
template <class... Params, class... Args>
void launch_with_shared_memory(void (*kernel)(Params...), int64_t blocks, dim3 threads, int64_t shared_bytes,
                               cudaStream_t stream, Args... args) {
  if (blocks == 0) return;
  if (shared_bytes > 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
#if defined(__CUDACC__)
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream>>>(args...);
#else  // a C++ compiler: tests/kernels/rungs/cuda_emulation
  emulation::launch(kernel, static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), args...);
#endif
  check(cudaGetLastError());
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, dim3 threads, cudaStream_t stream, Args... args) {
  launch_with_shared_memory(kernel, blocks, threads, 0, stream, args...);
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
#else
  return reinterpret_cast<T*>(emulation::dynamic_shared);
#endif
}

// kVec consecutive elements, moved by as few instructions as there are 16-byte words in them.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T data[kVec];
};

template <class T, int kVec>
__device__ __forceinline__ void load(const T* from, float (&to)[kVec]) {
  const Pack<T, kVec> pack = *reinterpret_cast<const Pack<T, kVec>*>(from);
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = to_float(pack.data[i]);
}

template <class T, int kVec>
__device__ __forceinline__ void store(T* to, const Pack<T, kVec>& pack) {
  if constexpr (sizeof(pack) % sizeof(uint4) == 0) {
    // Said with the intrinsic: nvcc takes the assignment of a whole pack apart into elements.
#pragma unroll
    for (size_t w = 0; w < sizeof(pack) / sizeof(uint4); ++w) {
      __stwb(reinterpret_cast<uint4*>(to) + w, reinterpret_cast<const uint4*>(&pack)[w]);
    }
  } else {
    *reinterpret_cast<Pack<T, kVec>*>(to) = pack;
  }
}

template <class T, int kVec>
__device__ __forceinline__ Pack<T, kVec> rounded(const float (&from)[kVec]) {
  Pack<T, kVec> pack;
#pragma unroll
  for (int i = 0; i < kVec; ++i) pack.data[i] = from_float<T>(from[i]);
  return pack;
}

template <class T, int kVec>
__device__ __forceinline__ void store(T* to, const float (&from)[kVec]) {
  store(to, rounded<T>(from));
}

// The same to shared memory, which `store` must not be given: its intrinsic is for global addresses alone.
template <class T, int kVec>
__device__ __forceinline__ void store_shared(Pack<T, kVec>* to, const float (&from)[kVec]) {
  *to = rounded<T>(from);
}

// Whether rows of `stride` elements from `base` on can be read in packs of `bytes`.
inline bool aligned(const void* base, int64_t stride, int64_t element_size, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && stride * element_size % bytes == 0;
}

// Hands out consecutive parts of a workspace, 256-byte aligned. With a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return part;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace ssiuu::cuda
