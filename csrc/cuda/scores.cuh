// Maximum, minimum and sum of attributions over the tokens of each sample, without the host knowing the segments.
//
// A thread block takes one column stripe of one split of one sample's rows, and reduces over them in registers and
// shared memory. A sample of many rows is split over several blocks, whose partial scores a second kernel combines in
// row order: results are deterministic, and the partials are bounded by the number of splits.
#pragma once

#include "common.cuh"
#include "ssiuu/attribution.h"

namespace ssiuu::cuda {

constexpr int kRowLanes = 8;  // rows that a thread block works on at once, one a warp
constexpr int kThreads = kWarp * kRowLanes;
constexpr int64_t kBlockRows = 64;      // of a block of a kernel without scores
constexpr int64_t kRowsPerSplit = 128;  // partials are small beside the rows, and sums as accurate as PyTorch's
constexpr int64_t kMaxSplits = 32;

// Blocks that share a sample's rows. From sizes alone: the segments' values are on the device.
inline int64_t split_count(int64_t rows, int64_t num_segments) {
  return std::max<int64_t>(1, std::min(kMaxSplits, rows / (std::max<int64_t>(num_segments, 1) * kRowsPerSplit)));
}

struct Tile {
  int64_t segment, stripe, split;
  int64_t start, end;   // rows that the sample scores
  int64_t first, last;  // rows that this block has to write
};

// A sample's blocks write its own rows and the unscored ones up to the next sample's start; the first sample in row
// order also takes the rows before it, and sample 0 takes all where every sample is empty. So each row is written once.
// All threads of the block must call it.
__device__ __forceinline__ Tile tile_of_block(const Segment* segments, int64_t num_segments, int64_t rows,
                                              int64_t stripes, int64_t splits) {
  Tile tile;
  tile.split = blockIdx.x % splits;
  tile.stripe = blockIdx.x / splits % stripes;
  tile.segment = blockIdx.x / splits / stripes;
  const Segment own = segments[tile.segment];
  tile.start = own.start;
  tile.end = own.end;
  __shared__ int32_t next_start, before, filled;
  const int lane = threadIdx.y * kWarp + threadIdx.x;
  if (lane == 0) {
    next_start = static_cast<int32_t>(rows);
    before = filled = 0;
  }
  __syncthreads();
  for (int64_t b = lane; b < num_segments; b += kThreads) {
    const Segment other = segments[b];
    if (other.start >= other.end) continue;
    atomicAdd(&filled, 1);
    if (other.start < own.start) atomicAdd(&before, 1);
    if (other.start > own.start) atomicMin(&next_start, other.start);
  }
  __syncthreads();
  int64_t first = before == 0 ? 0 : own.start;
  int64_t last = next_start;
  if (own.start >= own.end) {
    first = 0;
    last = filled == 0 && tile.segment == 0 ? rows : 0;
  }
  const int64_t size = ceil_div(last - first, splits);
  tile.first = min(first + tile.split * size, last);
  tile.last = min(first + (tile.split + 1) * size, last);
  return tile;
}

// Writes scores [3, B, D] from those of each split, [splits, 3, B, D]; zeros for empty segments.
void launch_finish_scores(const Segment* segments, int64_t num_segments, const float* partials, int64_t splits,
                          int64_t cols, float* scores, cudaStream_t stream);

// Where the scores of one sample stand: row `row` of [.., D] for the maxima, `plane` rows on for the minima, and the
// sums.
struct ScorePlace {
  int64_t row, plane, cols;
};

// One thread's running scores of kVec columns over the rows that its warp sees.
template <int kVec>
struct RunningScores {
  float max[kVec], min[kVec], sum[kVec];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      max[i] = -INFINITY;
      min[i] = INFINITY;
      sum[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void update(int i, float value) {
    max[i] = running_max(max[i], value);
    min[i] = running_min(min[i], value);
    sum[i] += value;
  }

  // Combines the warps' scores and writes those of the stripe's columns; zeros where `empty`. All threads must call it.
  __device__ void store(float* scores, const ScorePlace& place, int64_t stripe, bool empty = false) const {
    constexpr int kStripe = kWarp * kVec;
    const float highest = combine(max, [](float a, float b) { return running_max(a, b); });
    const float lowest = combine(min, [](float a, float b) { return running_min(a, b); });
    const float total = column_sum();
    const int lane = threadIdx.y * kWarp + threadIdx.x;
    const int64_t column = stripe * kStripe + lane;
    if (lane < kStripe && column < place.cols) {
      float* target = scores + place.row * place.cols + column;
      target[0] = empty ? 0.0f : highest;
      target[place.plane * place.cols] = empty ? 0.0f : lowest;
      target[2 * place.plane * place.cols] = empty ? 0.0f : total;
    }
  }

  // The sum over all warps of column `lane` of the stripe, in the first 32 kVec threads. All threads must call it.
  __device__ float column_sum() const {
    return combine(sum, [](float a, float b) { return a + b; });
  }

 private:
  // One buffer for all combinations, each of which would have its own otherwise.
  __device__ static float (*scratch()) [kWarp * kVec] {
    __shared__ float shared[kRowLanes][kWarp * kVec];
    return shared;
  }

  template <class Combine>
  __device__ float combine(const float (&values)[kVec], Combine&& function) const {
    constexpr int kStripe = kWarp * kVec;
    float (*const shared)[kStripe] = scratch();
    __syncthreads();  // whoever used it before is done
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      // Transposed within the stripe, which spreads a warp over the shared memory's banks.
      shared[threadIdx.y][i * kWarp + threadIdx.x] = values[i];
    }
    __syncthreads();
    const int lane = threadIdx.y * kWarp + threadIdx.x;
    if (lane >= kStripe) return 0.0f;
    const int place = lane % kVec * kWarp + lane / kVec;
    float result = shared[0][place];
#pragma unroll
    for (int warp = 1; warp < kRowLanes; ++warp) result = function(result, shared[warp][place]);
    return result;
  }
};

}  // namespace ssiuu::cuda
