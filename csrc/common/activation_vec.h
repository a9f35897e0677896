// The activations on sixteen lanes: the value, and value and slope together where the backward needs both.
//
//   SiLU        x s(x)                               with s(x) = 1 / (1 + e^-x)
//   GELU, tanh  x s(2 sqrt(2/pi) (x + 0.044715 x^3))  which is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
//   GELU, erf   x (1 + erf(x / sqrt(2))) / 2
//   ReLU        max(x, 0), with slope 0 at 0
#pragma once

#include "common/vec.h"

namespace {

struct ValueAndSlope {
  f32x16 value, slope;
};

// s(x) and 1 - s(x). The second is e^-x s(x), to all digits; the difference would have lost them where s is near 1.
struct Sigmoid {
  f32x16 value, rest;
};

ML_INLINE Sigmoid sigmoid(f32x16 x) {
  const f32x16 e = exp(-x), s = splat(1.0f) / (splat(1.0f) + e);
  return {s, e < splat(1e30f) ? e * s : splat(1.0f)};
}

struct Silu {
  static ML_INLINE f32x16 value(f32x16 x) { return x / (splat(1.0f) + exp(-x)); }
  static ML_INLINE ValueAndSlope both(f32x16 x) {
    const Sigmoid s = sigmoid(x);
    const f32x16 y = x * s.value;
    return {y, s.value + y * s.rest};
  }
};

struct GeluTanh {
  // Beyond 20 the sigmoid is 0 or 1 to the last bit, and x^3 of large numbers would overflow. NaN stays NaN.
  static ML_INLINE f32x16 clamped(f32x16 x) {
    x = x > splat(20.0f) ? splat(20.0f) : x;
    return x < splat(-20.0f) ? splat(-20.0f) : x;
  }
  static ML_INLINE f32x16 value(f32x16 x) {
    const f32x16 c = clamped(x);
    return x / (splat(1.0f) + exp(c * (c * c * splat(-2 * 0.79788456f * 0.044715f) - splat(2 * 0.79788456f))));
  }
  static ML_INLINE ValueAndSlope both(f32x16 x) {
    const f32x16 c = clamped(x), square = c * c;
    const Sigmoid s = sigmoid(c * (square * splat(2 * 0.79788456f * 0.044715f) + splat(2 * 0.79788456f)));
    const f32x16 inner = square * splat(6 * 0.79788456f * 0.044715f) + splat(2 * 0.79788456f);
    return {x * s.value, s.value + c * s.value * s.rest * inner};
  }
};

struct GeluErf {
  // Phi(x) = (1 + erf(x / sqrt(2))) / 2, and e^(-x^2 / 2), which the slope needs too. Abramowitz and Stegun, 7.1.26:
  // erf(z) = 1 - (a1 t + ... + a5 t^5) e^(-z^2) with t = 1 / (1 + p z) for z >= 0, to 1.5e-7.
  static ML_INLINE f32x16 distribution(f32x16 x, f32x16* density) {
    const f32x16 z = (x < splat(0.0f) ? -x : x) * splat(0.70710678f);
    const f32x16 t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * z);
    f32x16 p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    *density = z > splat(9.3f) ? splat(0.0f) : exp(-z * z);  // exp does not go below e^-87
    const f32x16 tail = splat(0.5f) * p * t * *density;
    return x < splat(0.0f) ? tail : splat(1.0f) - tail;
  }
  static ML_INLINE f32x16 value(f32x16 x) {
    f32x16 density;
    return x * distribution(x, &density);
  }
  static ML_INLINE ValueAndSlope both(f32x16 x) {
    f32x16 density;
    const f32x16 phi = distribution(x, &density);
    const f32x16 c = GeluTanh::clamped(x);  // beyond, the density is 0, and x could be infinite
    return {x * phi, phi + c * density * splat(0.39894228f)};
  }
};

struct Relu {
  static ML_INLINE f32x16 value(f32x16 x) { return x < splat(0.0f) ? splat(0.0f) : x; }
  static ML_INLINE ValueAndSlope both(f32x16 x) {
    return {value(x), x > splat(0.0f) ? splat(1.0f) : splat(0.0f)};
  }
};

}  // namespace
