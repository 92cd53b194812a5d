// The formulas of the activations.
//
//   forward   y = f(x)
//   backward  dx = f'(x) dy, from dy and either y or x, whichever the operator saves
//
// A formula takes its numbers, at most three, in the constructor. Reading, rounding, loops and
// threads are in activation.cpp.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "activation.h"
#include "vec.h"

namespace pyfused {
PYFUSED_INLINE_ALL

// The base of the formulas without parameters.
template <class A> struct Activation {
  explicit Activation(const Parameters&) {}
};

// torch: F.relu(x). NaN and -0.0 are kept. The gradient passes where y is neither 0 nor -0, NaN
// included. It is an integer mask: with a comparison, GCC makes the AVX-512 load of grad_output a
// masked one, which waits for the comparison (1.16 times slower).
template <class A> struct Relu : Activation<A> {
  using Activation<A>::Activation;
  A forward(A x) const { return x < 0 ? A(0) : x; }
  A backward(A grad_output, A y) const {
    using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    const Bits magnitude = bit_cast<Bits>(y) & std::numeric_limits<Bits>::max();
    const Bits all_if_nonzero = -magnitude >> (8 * sizeof(A) - 1);
    return bit_cast<A>(bit_cast<Bits>(grad_output) & all_if_nonzero);
  }
};

// torch: F.leaky_relu(x, slope). The output has the input's sign, as the slope is not negative.
template <class A> struct LeakyRelu {
  A slope;
  explicit LeakyRelu(const Parameters& p) : slope(A(p[0])) {}
  A forward(A x) const { return scaled_where_negative(x, x); }
  A backward(A grad_output, A y) const { return scaled_where_negative(y, grad_output); }

 private:
  A scaled_where_negative(A sign, A value) const {
    // Computed unconditionally, so that loops have no branch.
    const A less = slope * value;
    return sign > 0 ? value : less;
  }
};

// torch: F.sigmoid(x).
template <class A> struct Sigmoid : Activation<A> {
  using Activation<A>::Activation;
  A forward(A x) const { return sigmoid(x); }
  A backward(A grad_output, A y) const { return grad_output * (1 - y) * y; }
};

// torch: F.tanh(x).
template <class A> struct Tanh : Activation<A> {
  using Activation<A>::Activation;
  A forward(A x) const { return tanh_of(x); }
  A backward(A grad_output, A y) const { return grad_output * (1 - y * y); }
};

// torch: cap * tanh(x / cap).
template <class A> struct Softcap {
  A cap;
  explicit Softcap(const Parameters& p) : cap(A(p[0])) {}
  A forward(A x) const { return cap * tanh_of(x / cap); }
  A backward(A grad_output, A x) const {
    const A y = tanh_of(x / cap);
    return grad_output * (1 - y * y);
  }
};

// torch: F.silu(x) = x sigmoid(x).
template <class A> struct Silu : Activation<A> {
  using Activation<A>::Activation;
  A forward(A x) const { return x * sigmoid(x); }
  A backward(A grad_output, A x) const {
    const A y = sigmoid(x);
    return grad_output * (y * (1 + x * (1 - y)));
  }
};

// torch: F.gelu(x) = x P(X <= x), X of the standard normal distribution.
template <class A> struct Gelu : Activation<A> {
  using Activation<A>::Activation;
  A forward(A x) const { return x * Normal<A>(x).below; }
  A backward(A grad_output, A x) const {
    const Normal<A> normal(x);
    return grad_output * (normal.below + x * normal.density);
  }
};

// torch: F.gelu(x, approximate="tanh"), as (1 + tanh(u)) / 2 = sigmoid(2 u).
template <class A> struct GeluTanh : Activation<A> {
  using Activation<A>::Activation;
  static constexpr A kTwice = A(1.5957691216057308);  // 2 sqrt(2 / pi)
  static constexpr A kCubic = A(0.044715);
  static A gate(A x) { return sigmoid(kTwice * (x + kCubic * x * x * x)); }
  A forward(A x) const { return x * gate(x); }
  A backward(A grad_output, A x) const {
    const A y = gate(x), slope = kTwice * (1 + 3 * kCubic * x * x);
    return grad_output * (y + x * (y * (1 - y) * slope));
  }
};

PYFUSED_INLINE_END
}  // namespace pyfused
