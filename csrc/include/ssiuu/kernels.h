// The kernels' interface: one parameter struct and one launcher an op. Free of torch and of Python.
//
// Strides are in elements, from one row to the next; elements of a row are contiguous. Sizes are 64-bit. Names in
// brackets are shapes: T rows, F or D columns, B samples, N scalars.
#pragma once

#include <vector>

#include "ssiuu/step.h"
#include "ssiuu/types.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace ssiuu {

// h = act(x) * up, or act(x) where up is null; x is the gate of a gated MLP.
struct HiddenForwardParams {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;  // [T, F]
  int64_t x_stride;
  const void* up;  // [T, F] or null
  int64_t up_stride;
  void* h;  // [T, F]
  int64_t h_stride;
};

// The penalty on neurons; bank is null where there is none.
struct NeuronPenaltyParams {
  const float* weight;       // [1] lambda
  const float* ratio;        // [B] turns grad_h into dP/dh
  float* bank;               // [N, F] A of the last step, NaN where a sample has not been seen; overwritten
  const int64_t* bank_rows;  // [B] row of each sample in the bank, or -1
};

// Gradients, and h where asked for, are written for all rows; scores cover the rows of the segments, from the float32
// values before they are rounded to dtype and before the penalty. An empty segment scores 0; NaN propagates.
struct HiddenBackwardParams {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;  // [T, F]
  int64_t x_stride;
  const void* up;  // [T, F] or null
  int64_t up_stride;
  const void* grad_h;  // [T, F]
  int64_t grad_h_stride;
  void* grad_x;  // [T, F]
  int64_t grad_x_stride;
  void* grad_up;  // [T, F], null together with up
  int64_t grad_up_stride;
  void* h;  // [T, F] or null
  int64_t h_stride;
  const Segment* segments;  // [B], disjoint, any order; read with scores or a penalty
  int64_t num_segments;
  int64_t longest;  // rows of the longest segment, or 0: not known on the host
  float* h_scores;  // [3, B, F] max, min, sum of h * grad_h; null together with x_scores
  float* x_scores;  // [3, B, F] the same of x * grad_x
  NeuronPenaltyParams penalty;
};

struct TokenScoresParams {
  DType dtype;
  int64_t rows, cols;
  const void* z;  // [T, D]
  int64_t z_stride;
  const void* grad_z;  // [T, D]
  int64_t grad_z_stride;
  const Segment* segments;  // [B], disjoint, any order
  int64_t num_segments;
  float* scores;  // [3, B, D] max, min, sum of z * grad_z; an empty segment scores 0
};

// One parameter, with what belongs to it.
struct PenaltyTensors {
  int64_t n;
  void* param;              // [N]
  void* grad;               // [N]
  const void* target_grad;  // [N]
  void* prev_attribution;   // [N]
  void* exp_avg;            // [N], null without AdamW
  void* exp_avg_sq;         // [N], null without AdamW
  uint32_t seed;            // of the stochastic rounding
};

// penalty: reads grad, and writes the sum of grad and the penalty gradient back to it. penalty_adamw: feeds that sum to
// AdamW, and leaves the gradients as they are. Both store A in prev_attribution.
struct PenaltyParams {
  DType param_dtype;
  DType grad_dtype;   // of grad and target_grad
  DType state_dtype;  // of prev_attribution, exp_avg and exp_avg_sq
  std::vector<PenaltyTensors> tensors;
  StepScalars scalars;
  const StepScalars* device_scalars;  // where the tensors are; null: `scalars` count
  bool keep_anchor;                   // from the second step on, prev_attribution stays where it is not NaN
  bool stochastic;                    // AdamW's bfloat16 results are rounded at random
  double* stats;                      // [5] of all tensors, see PenaltyStats
};

namespace cpu {

void hidden_forward(const HiddenForwardParams& params);
void hidden_backward(const HiddenBackwardParams& params);
void token_scores(const TokenScoresParams& params);
void penalty(const PenaltyParams& params);
void penalty_adamw(const PenaltyParams& params);

}  // namespace cpu

// Pointers are device pointers, segments and stats too. Nothing waits for the device; workspace is device memory of at
// least the bytes asked for, free again when the stream has passed the kernel.
namespace cuda {

using Stream = CUstream_st*;

int64_t hidden_backward_workspace_bytes(int64_t rows, int64_t cols, int64_t num_segments, bool scores);
int64_t token_scores_workspace_bytes(int64_t rows, int64_t cols, int64_t num_segments);
int64_t penalty_workspace_bytes(const std::vector<int64_t>& sizes);  // of penalty and of penalty_adamw

void hidden_forward(const HiddenForwardParams& params, void* workspace, Stream stream);  // workspace may be null
void hidden_backward(const HiddenBackwardParams& params, void* workspace, Stream stream);
void token_scores(const TokenScoresParams& params, void* workspace, Stream stream);
void penalty(const PenaltyParams& params, void* workspace, Stream stream);
void penalty_adamw(const PenaltyParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace ssiuu
