// Maximum, minimum and sum of attributions over the tokens of each sample, without the host knowing the segments.
//
// Rows are divided into blocks of kBlockRows, columns into stripes. A thread block takes one stripe of one row block
// and goes through the runs in it: rows of one segment, or rows of none. Each run of a segment leaves a partial result;
// a second kernel combines a segment's partials in row order, so that results are deterministic.
#pragma once

#include "common.cuh"
#include "ssiuu/attribution.h"

namespace ssiuu::cuda {

constexpr int64_t kBlockRows = 64;
constexpr int kRowLanes = 8;  // rows that a thread block works on at once, one a warp

// Row block k and the r-th segment in row order meet in at most one run; going down the rows k or r grows with each
// run, so k + r is a slot of its own.
struct ScorePlan {
  const Segment* segments;  // [B]
  int32_t* row_segment;     // [T] segment of each row, or -1
  int32_t* rank;            // [B] number of segments that start before this one, empty ones not counted
  int64_t num_segments;
  int64_t num_slots;
};

struct Run {
  int64_t end;      // row after its last
  int32_t segment;  // or -1
};

__device__ __forceinline__ Run next_run(const ScorePlan& plan, int64_t row, int64_t block_end) {
  const int32_t segment = plan.row_segment[row];
  if (segment >= 0) return {min(static_cast<int64_t>(plan.segments[segment].end), block_end), segment};
  while (row < block_end && plan.row_segment[row] < 0) ++row;
  return {row, -1};
}

// Takes the plan's arrays from the workspace.
ScorePlan make_score_plan(Workspace& workspace, const Segment* segments, int64_t num_segments, int64_t rows);

// Fills them.
void launch_score_plan(const ScorePlan& plan, int64_t rows, cudaStream_t stream);

// Writes scores [3, B, D] from partials [num_slots, 3, D]; zeros for empty segments.
void launch_finish_scores(const ScorePlan& plan, const float* partials, int64_t cols, float* scores,
                          cudaStream_t stream);

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

  // Combines the warps' scores and writes those of columns [stripe, min(stripe + 32 kVec, cols)) to partial [3, D]. All
  // threads of the block must call it.
  __device__ void store(float* partial, int64_t stripe, int64_t cols) const {
    constexpr int kStripe = kWarp * kVec;
    __shared__ float shared[3][kRowLanes][kStripe];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      // Transposed within the stripe, which spreads a warp over the shared memory's banks.
      const int place = i * kWarp + threadIdx.x;
      shared[0][threadIdx.y][place] = max[i];
      shared[1][threadIdx.y][place] = min[i];
      shared[2][threadIdx.y][place] = sum[i];
    }
    __syncthreads();
    const int column = threadIdx.y * kWarp + threadIdx.x;
    if (column < kStripe && stripe + column < cols) {
      const int place = column % kVec * kWarp + column / kVec;
      float result[3] = {shared[0][0][place], shared[1][0][place], shared[2][0][place]};
#pragma unroll
      for (int lane = 1; lane < kRowLanes; ++lane) {
        result[0] = running_max(result[0], shared[0][lane][place]);
        result[1] = running_min(result[1], shared[1][lane][place]);
        result[2] += shared[2][lane][place];
      }
#pragma unroll
      for (int s = 0; s < 3; ++s) partial[s * cols + stripe + column] = result[s];
    }
    __syncthreads();
  }
};

}  // namespace ssiuu::cuda
