// The activations in one thread of a CUDA kernel; activation_vec.h has the equations.
#pragma once

#include "common/activation.h"
#include "common/cuda.cuh"
#include "common/format.h"

namespace ml {

struct ValueAndSlope {
  float value, slope;
};

// 1 - s where s = 1 / (1 + e): the difference itself would lose its digits where s is near 1.
__device__ __forceinline__ float rest_of(float e, float s) { return e < 1e30f ? e * s : 1.0f; }

template <Activation activation>
__device__ __forceinline__ ValueAndSlope value_and_slope(float x) {
  if constexpr (activation == Activation::kSilu) {
    const float e = expf(-x), s = 1.0f / (1.0f + e), y = x * s;
    return {y, s + y * rest_of(e, s)};
  } else if constexpr (activation == Activation::kGelu) {
    // Beyond 20 the sigmoid is 0 or 1 to the last bit, and x^3 of large numbers would overflow. NaN stays NaN.
    const float c = x > 20.0f ? 20.0f : x < -20.0f ? -20.0f : x;
    const float twice = 2.0f * 0.79788456f, square = c * c;
    const float e = expf(-c * (square * (twice * 0.044715f) + twice)), s = 1.0f / (1.0f + e);
    return {x * s, s + c * s * rest_of(e, s) * (square * (3.0f * twice * 0.044715f) + twice)};
  } else if constexpr (activation == Activation::kGeluErf) {
    const float phi = 0.5f * (1.0f + erff(x * 0.70710678f));
    const float c = x > 20.0f ? 20.0f : x < -20.0f ? -20.0f : x;
    return {x * phi, phi + c * (0.39894228f * expf(-0.5f * c * c))};
  } else {
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  }
}

// Calls `launch` with the format as a type and the activation as a constant: launch(T{}, Constant<activation>{}).
template <Activation activation>
struct Constant {
  static constexpr Activation value = activation;
};

template <class T, class Launch>
void with_activation(Activation activation, Launch launch) {
  switch (activation) {
    case Activation::kSilu: return launch(T{}, Constant<Activation::kSilu>{});
    case Activation::kGelu: return launch(T{}, Constant<Activation::kGelu>{});
    case Activation::kRelu: return launch(T{}, Constant<Activation::kRelu>{});
    case Activation::kGeluErf: return launch(T{}, Constant<Activation::kGeluErf>{});
  }
}

template <class Launch>
void with_format_and_activation(Format format, Activation activation, Launch launch) {
  switch (format) {
    case Format::kFp32: return with_activation<float>(activation, launch);
    case Format::kBf16: return with_activation<__nv_bfloat16>(activation, launch);
    case Format::kFp16: return with_activation<__half>(activation, launch);
  }
}

}  // namespace ml
