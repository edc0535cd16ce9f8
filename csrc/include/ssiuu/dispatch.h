// From run-time codes to template arguments.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "ssiuu/activation.h"
#include "ssiuu/types.h"

namespace ssiuu {

// Calls function(T{}) with the element type of dtype.
template <class Function>
void dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kBFloat16:
      return function(BFloat16{});
  }
  throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

// The same for the three types of a parameter's tensors.
template <class Function>
void dispatch_dtypes(DType param, DType grad, DType state, Function&& function) {
  dispatch_dtype(param, [&](auto p) {
    dispatch_dtype(grad, [&](auto g) { dispatch_dtype(state, [&](auto s) { function(p, g, s); }); });
  });
}

// Calls function(Act{}) with the formulas of the activation.
template <class Function>
void dispatch_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kSilu:
      return function(Silu{});
    case Activation::kGelu:
      return function(Gelu{});
    case Activation::kGeluTanh:
      return function(GeluTanh{});
    case Activation::kRelu:
      return function(Relu{});
    case Activation::kReluSquared:
      return function(ReluSquared{});
  }
  throw std::invalid_argument("unknown activation code " + std::to_string(static_cast<int>(activation)));
}

// Calls function(T{}, Act{}, gated) with gated a std::bool_constant.
template <class Function>
void dispatch_mlp(DType dtype, Activation activation, bool gated, Function&& function) {
  dispatch_dtype(dtype, [&](auto element) {
    dispatch_activation(activation, [&](auto act) {
      gated ? function(element, act, std::true_type{}) : function(element, act, std::false_type{});
    });
  });
}

}  // namespace ssiuu
