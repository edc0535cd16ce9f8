// Python bindings. Pointers arrive as integers (0: absent) and were checked by the caller; the GIL is released while a
// kernel runs.
#include <pybind11/pybind11.h>

#include <string>

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

void glu_forward_cpu(int dtype, int activation, int64_t rows, int64_t cols, Address gate, int64_t gate_stride,
                     Address up, int64_t up_stride, Address h, int64_t h_stride) {
  ssiuu::cpu::glu_forward({DType(dtype), Activation(activation), rows, cols, pointer(gate), gate_stride, pointer(up),
                           up_stride, pointer(h), h_stride});
}

void glu_backward_cpu(int dtype, int activation, int64_t rows, int64_t cols, Address gate, int64_t gate_stride,
                      Address up, int64_t up_stride, Address grad_h, int64_t grad_h_stride, Address grad_gate,
                      int64_t grad_gate_stride, Address grad_up, int64_t grad_up_stride, Address h, int64_t h_stride,
                      Address segments, int64_t num_segments, Address h_scores, Address gate_scores) {
  ssiuu::cpu::glu_backward({DType(dtype),
                            Activation(activation),
                            rows,
                            cols,
                            pointer(gate),
                            gate_stride,
                            pointer(up),
                            up_stride,
                            pointer(grad_h),
                            grad_h_stride,
                            pointer(grad_gate),
                            grad_gate_stride,
                            pointer(grad_up),
                            grad_up_stride,
                            pointer(h),
                            h_stride,
                            pointer<Segment>(segments),
                            num_segments,
                            pointer<float>(h_scores),
                            pointer<float>(gate_scores)});
}

void token_scores_cpu(int dtype, int64_t rows, int64_t cols, Address z, int64_t z_stride, Address grad_z,
                      int64_t grad_z_stride, Address segments, int64_t num_segments, Address scores) {
  ssiuu::cpu::token_scores({DType(dtype), rows, cols, pointer(z), z_stride, pointer(grad_z), grad_z_stride,
                            pointer<Segment>(segments), num_segments, pointer<float>(scores)});
}

void penalty_cpu(int param_dtype, int grad_dtype, int state_dtype, int64_t n, Address param, Address grad,
                 Address target_grad, Address prev_attribution, double weight, int64_t step, Address stats) {
  ssiuu::cpu::penalty({DType(param_dtype), DType(grad_dtype), DType(state_dtype), n, pointer(param), pointer(grad),
                       pointer(target_grad), pointer(prev_attribution), weight, step, pointer<double>(stats)});
}

void penalty_adamw_cpu(int param_dtype, int grad_dtype, int state_dtype, int64_t n, Address param, Address grad,
                       Address target_grad, Address prev_attribution, Address exp_avg, Address exp_avg_sq, int64_t step,
                       double lr, double beta1, double beta2, double eps, double weight_decay, double weight,
                       Address stats) {
  ssiuu::cpu::penalty_adamw({DType(param_dtype), DType(grad_dtype), DType(state_dtype), n, pointer(param),
                             pointer(grad), pointer(target_grad), pointer(prev_attribution), pointer(exp_avg),
                             pointer(exp_avg_sq), step, lr, beta1, beta2, eps, weight_decay, weight,
                             pointer<double>(stats)});
}

bool cpu_has(const std::string& feature) {
#if defined(__x86_64__)
  // __builtin_cpu_supports takes literals only.
  if (feature == "avx2") return __builtin_cpu_supports("avx2");
  if (feature == "fma") return __builtin_cpu_supports("fma");
  if (feature == "bmi2") return __builtin_cpu_supports("bmi2");
  if (feature == "avx512f") return __builtin_cpu_supports("avx512f");
  if (feature == "avx512dq") return __builtin_cpu_supports("avx512dq");
  if (feature == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (feature == "avx512vl") return __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

bool cpu_supported() {
  for (const char* const* feature = ssiuu::cpu::kCompiledFeatures; *feature != nullptr; ++feature) {
    if (!cpu_has(*feature)) return false;
  }
  return true;
}

std::string cpu_isa() {
  std::string isa;
  for (const char* const* feature = ssiuu::cpu::kCompiledFeatures; *feature != nullptr; ++feature) {
    isa += (isa.empty() ? "" : " ") + std::string(*feature);
  }
  return isa.empty() ? "baseline" : isa;
}

py::dict build_info() {
  py::dict info;
  info["cpu_isa"] = cpu_isa();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda_archs"] = std::string(SSIUU_CUDA_ARCHS);
  info["cuda"] = !std::string(SSIUU_CUDA_ARCHS).empty();
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of ssiuu_kernels on raw pointers; use ssiuu_kernels.ops.";
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def("glu_forward_cpu", &glu_forward_cpu, no_gil, py::arg("dtype"), py::arg("activation"), py::arg("rows"),
        py::arg("cols"), py::arg("gate"), py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"), py::arg("h"),
        py::arg("h_stride"));
  m.def("glu_backward_cpu", &glu_backward_cpu, no_gil, py::arg("dtype"), py::arg("activation"), py::arg("rows"),
        py::arg("cols"), py::arg("gate"), py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"),
        py::arg("grad_h"), py::arg("grad_h_stride"), py::arg("grad_gate"), py::arg("grad_gate_stride"),
        py::arg("grad_up"), py::arg("grad_up_stride"), py::arg("h"), py::arg("h_stride"), py::arg("segments"),
        py::arg("num_segments"), py::arg("h_scores"), py::arg("gate_scores"));
  m.def("token_scores_cpu", &token_scores_cpu, no_gil, py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("z"),
        py::arg("z_stride"), py::arg("grad_z"), py::arg("grad_z_stride"), py::arg("segments"), py::arg("num_segments"),
        py::arg("scores"));
  m.def("penalty_cpu", &penalty_cpu, no_gil, py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("state_dtype"),
        py::arg("n"), py::arg("param"), py::arg("grad"), py::arg("target_grad"), py::arg("prev_attribution"),
        py::arg("weight"), py::arg("step"), py::arg("stats"));
  m.def("penalty_adamw_cpu", &penalty_adamw_cpu, no_gil, py::arg("param_dtype"), py::arg("grad_dtype"),
        py::arg("state_dtype"), py::arg("n"), py::arg("param"), py::arg("grad"), py::arg("target_grad"),
        py::arg("prev_attribution"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("step"), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("weight"),
        py::arg("stats"));
  m.def("build_info", &build_info, "What the module was compiled with.");
  m.def("cpu_supported", &cpu_supported, "Whether this CPU has every instruction set extension compiled for.");
}
