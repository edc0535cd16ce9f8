// Python bindings. Pointers arrive as integers (0: absent) and were checked by the caller; the GIL is released while a
// kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "ssiuu/cpu_features.h"
#include "ssiuu/kernels.h"

namespace py = pybind11;

namespace {

using ssiuu::Activation;
using ssiuu::DType;
using ssiuu::Segment;
using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

ssiuu::HiddenForwardParams hidden_forward_params(int dtype, int activation, int64_t rows, int64_t cols, Address x,
                                                 int64_t x_stride, Address up, int64_t up_stride, Address h,
                                                 int64_t h_stride) {
  return {DType(dtype), Activation(activation), rows, cols, pointer(x), x_stride, pointer(up), up_stride, pointer(h),
          h_stride};
}

ssiuu::HiddenBackwardParams hidden_backward_params(int dtype, int activation, int64_t rows, int64_t cols, Address x,
                                                   int64_t x_stride, Address up, int64_t up_stride, Address grad_h,
                                                   int64_t grad_h_stride, Address grad_x, int64_t grad_x_stride,
                                                   Address grad_up, int64_t grad_up_stride, Address h, int64_t h_stride,
                                                   Address segments, int64_t num_segments, int64_t longest,
                                                   Address h_scores, Address x_scores, Address weight, Address ratio,
                                                   Address bank, Address bank_rows) {
  return {DType(dtype),
          Activation(activation),
          rows,
          cols,
          pointer(x),
          x_stride,
          pointer(up),
          up_stride,
          pointer(grad_h),
          grad_h_stride,
          pointer(grad_x),
          grad_x_stride,
          pointer(grad_up),
          grad_up_stride,
          pointer(h),
          h_stride,
          pointer<Segment>(segments),
          num_segments,
          longest,
          pointer<float>(h_scores),
          pointer<float>(x_scores),
          {pointer<float>(weight), pointer<float>(ratio), pointer<float>(bank), pointer<int64_t>(bank_rows)}};
}

ssiuu::TokenScoresParams token_scores_params(int dtype, int64_t rows, int64_t cols, Address z, int64_t z_stride,
                                             Address grad_z, int64_t grad_z_stride, Address segments,
                                             int64_t num_segments, Address scores) {
  return {DType(dtype),  rows,
          cols,          pointer(z),
          z_stride,      pointer(grad_z),
          grad_z_stride, pointer<Segment>(segments),
          num_segments,  pointer<float>(scores)};
}

// One entry a parameter in each list; exp_avg and exp_avg_sq may be 0, and seeds empty.
ssiuu::PenaltyParams penalty_params(int param_dtype, int grad_dtype, int state_dtype, const std::vector<int64_t>& sizes,
                                    const std::vector<Address>& param, const std::vector<Address>& grad,
                                    const std::vector<Address>& target_grad,
                                    const std::vector<Address>& prev_attribution, const std::vector<Address>& exp_avg,
                                    const std::vector<Address>& exp_avg_sq, const std::vector<uint32_t>& seeds,
                                    const std::array<double, ssiuu::kStepScalars>& scalars, Address device_scalars,
                                    bool keep_anchor, Address stats) {
  ssiuu::PenaltyParams params{DType(param_dtype),
                              DType(grad_dtype),
                              DType(state_dtype),
                              {},
                              ssiuu::bit_cast<ssiuu::StepScalars>(scalars),
                              pointer<ssiuu::StepScalars>(device_scalars),
                              keep_anchor,
                              !seeds.empty(),
                              pointer<double>(stats)};
  for (size_t i = 0; i < sizes.size(); ++i) {
    params.tensors.push_back({sizes[i], pointer(param[i]), pointer(grad[i]), pointer(target_grad[i]),
                              pointer(prev_attribution[i]), pointer(exp_avg[i]), pointer(exp_avg_sq[i]),
                              seeds.empty() ? 0 : seeds[i]});
  }
  return params;
}

template <class Params>
struct Launcher {
  using Cpu = void (*)(const Params&);
  using Cuda = void (*)(const Params&, void* workspace, ssiuu::cuda::Stream stream);
};

#if defined(SSIUU_WITH_CUDA)
#define SSIUU_CUDA_LAUNCH(op) &ssiuu::cuda::op
#else
#define SSIUU_CUDA_LAUNCH(op) nullptr
#endif

// Defines <op>_cpu(names...), and <op>_cuda(names..., workspace, stream) where there is a CUDA launcher.
template <class Params, class... Args, class... Names>
void define_op(py::module_& m, const std::string& op, typename Launcher<Params>::Cpu cpu,
               typename Launcher<Params>::Cuda cuda, Params (*make_params)(Args...), Names... names) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def((op + "_cpu").c_str(), [=](Args... args) { cpu(make_params(args...)); }, no_gil, py::arg(names)...);
  if (cuda == nullptr) return;
  m.def((op + "_cuda").c_str(),
        [=](Args... args, Address workspace, Address stream) {
          cuda(make_params(args...), pointer(workspace), pointer<CUstream_st>(stream));
        },
        no_gil, py::arg(names)..., py::arg("workspace"), py::arg("stream"));
}

py::dict build_info() {
  py::dict info;
  const std::string features = ssiuu::cpu::compiled_features();
  info["cpu_isa"] = features.empty() ? "baseline" : features;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(SSIUU_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_archs"] = SSIUU_CUDA_ARCHS;
  info["why_no_cuda"] = "";
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["why_no_cuda"] = SSIUU_WHY_NO_CUDA;
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

void set_num_threads([[maybe_unused]] int count) {
#if defined(_OPENMP)
  omp_set_num_threads(count);
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of ssiuu_kernels on raw pointers; use ssiuu_kernels.ops.";
  define_op(m, "hidden_forward", &ssiuu::cpu::hidden_forward, SSIUU_CUDA_LAUNCH(hidden_forward), &hidden_forward_params,
            "dtype", "activation", "rows", "cols", "x", "x_stride", "up", "up_stride", "h", "h_stride");
  define_op(m, "hidden_backward", &ssiuu::cpu::hidden_backward, SSIUU_CUDA_LAUNCH(hidden_backward),
            &hidden_backward_params, "dtype", "activation", "rows", "cols", "x", "x_stride", "up", "up_stride",
            "grad_h", "grad_h_stride", "grad_x", "grad_x_stride", "grad_up", "grad_up_stride", "h", "h_stride",
            "segments", "num_segments", "longest", "h_scores", "x_scores", "weight", "ratio", "bank", "bank_rows");
  define_op(m, "token_scores", &ssiuu::cpu::token_scores, SSIUU_CUDA_LAUNCH(token_scores), &token_scores_params,
            "dtype", "rows", "cols", "z", "z_stride", "grad_z", "grad_z_stride", "segments", "num_segments", "scores");
  for (const bool adamw : {false, true}) {
    define_op(m, adamw ? "penalty_adamw" : "penalty", adamw ? &ssiuu::cpu::penalty_adamw : &ssiuu::cpu::penalty,
              adamw ? SSIUU_CUDA_LAUNCH(penalty_adamw) : SSIUU_CUDA_LAUNCH(penalty), &penalty_params, "param_dtype",
              "grad_dtype", "state_dtype", "sizes", "param", "grad", "target_grad", "prev_attribution", "exp_avg",
              "exp_avg_sq", "seeds", "scalars", "device_scalars", "keep_anchor", "stats");
  }

#if defined(SSIUU_WITH_CUDA)
  m.def("hidden_backward_workspace_bytes", &ssiuu::cuda::hidden_backward_workspace_bytes, py::arg("rows"),
        py::arg("cols"), py::arg("num_segments"), py::arg("scores"));
  m.def("token_scores_workspace_bytes", &ssiuu::cuda::token_scores_workspace_bytes, py::arg("rows"), py::arg("cols"),
        py::arg("num_segments"));
  m.def("penalty_workspace_bytes", &ssiuu::cuda::penalty_workspace_bytes, py::arg("sizes"));
  m.def("penalty_adamw_workspace_bytes", &ssiuu::cuda::penalty_workspace_bytes, py::arg("sizes"));
#endif

  m.def("build_info", &build_info, "What the module was compiled with.");
  m.def("cpu_lacks", &ssiuu::cpu::missing_features, "Instruction set extensions compiled for that this CPU lacks.");
  m.def("set_num_threads", &set_num_threads, py::arg("count"), "How many threads the calling thread's kernels use.");
}
