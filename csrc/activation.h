// Activations: one formula each, shared by all element types and layouts.
//
//   forward   y = f(x)          reads x, writes y
//   backward  dx = f'(x) dy     reads dy, and y or x, whichever is saved; writes dx
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace pyfused {

// A formula's parameter is 0 where it takes none.
template <class A> struct Activation {
  explicit Activation(double) {}
};

// torch: F.relu(x). NaN and -0.0 pass. The gradient passes where y is neither 0 nor -0, so with NaN: in
// integers, because of a comparison AVX-512 makes a load that waits for it (1.16 times slower).
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
  explicit LeakyRelu(double p) : slope(A(p)) {}
  A forward(A x) const { return between(x, x); }
  A backward(A grad_output, A y) const { return between(y, grad_output); }

 private:
  A between(A sign, A value) const {  // computed for all, so that loops have no branch
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
  explicit Softcap(double p) : cap(A(p)) {}
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
  static constexpr A kTwice = A(1.5957691216057308), kCubic = A(0.044715);  // 2 sqrt(2 / pi)
  static A share(A x) { return sigmoid(kTwice * (x + kCubic * x * x * x)); }
  A forward(A x) const { return x * share(x); }
  A backward(A grad_output, A x) const {
    const A y = share(x), slope = kTwice * (1 + 3 * kCubic * x * x);
    return grad_output * (y + x * (y * (1 - y) * slope));
  }
};

constexpr int64_t kActivationBlock = 1 << 14;  // elements a thread takes at a time
constexpr int64_t kActivationChunk = 512;      // elements at a time, in L1

template <class T, class Value>
void map(T* output, int64_t n, int threads, const Value& value) {
  const int64_t blocks = (n + kActivationBlock - 1) / kActivationBlock;
  parallel_for(blocks, threads, [=](int64_t block) {
    const int64_t end = std::min(n, (block + 1) * kActivationBlock);
    for (int64_t first = block * kActivationBlock; first < end; first += kActivationChunk) {
      const int64_t count = std::min(kActivationChunk, end - first);
      alignas(kVectorBytes) Accumulate<T> buffer[kActivationChunk];
      Accumulate<T>* const out = staged(output + first, buffer);
      PYFUSED_SIMD()
      for (int64_t i = 0; i < count; ++i) out[i] = value(first + i);
      store(out, output + first, count);
    }
  });
}

// x *= a: what is left to do for a gradient that was computed before its grad_output was known.
template <class T> void scale(T* x, Accumulate<T> a, int64_t n, int threads) {
  if (a == 1) return;
  map(x, n, threads, [=](int64_t i) { return a * widen(x[i]); });
}

// The output may be the input itself.
template <template <class> class Formula, class T>
void activation(const T* input, T* output, double parameter, int64_t n, int threads) {
  const Formula<Accumulate<T>> f(parameter);
  map(output, n, threads, [=](int64_t i) { return f.forward(widen(input[i])); });
}

// A grad_output of step 0 is one element that stands for all.
template <template <class> class Formula, class T>
void activation_backward(const T* grad_output, int64_t step, const T* saved, T* grad_input,
                         double parameter, int64_t n, int threads) {
  const Formula<Accumulate<T>> f(parameter);
  const Accumulate<T> first = widen(*grad_output);
  if (step == 0) {
    map(grad_input, n, threads, [=](int64_t i) { return f.backward(first, widen(saved[i])); });
  } else {
    map(grad_input, n, threads,
        [=](int64_t i) { return f.backward(widen(grad_output[i]), widen(saved[i])); });
  }
}

}  // namespace pyfused
