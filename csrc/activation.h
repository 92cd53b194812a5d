// Activations: one formula each, shared by all element types and layouts.
//
//   forward   y = f(x)          reads x, writes y
//   backward  dx = f'(y) dy     reads y and dy, writes dx
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace pyfused {

// torch: F.relu(x). NaN and -0.0 pass. The gradient passes where y is neither 0 nor -0, so with NaN: in
// integers, because of a comparison AVX-512 makes a load that waits for it (1.16 times slower).
struct Relu {
  template <class A> static PYFUSED_INLINE A forward(A x) { return x < 0 ? A(0) : x; }
  template <class A> static PYFUSED_INLINE A backward(A grad_output, A output) {
    using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    const Bits magnitude = bit_cast<Bits>(output) & std::numeric_limits<Bits>::max();
    const Bits all_if_nonzero = -magnitude >> (8 * sizeof(A) - 1);
    return bit_cast<A>(bit_cast<Bits>(grad_output) & all_if_nonzero);
  }
};

// torch: F.sigmoid(x).
struct Sigmoid {
  template <class A> static PYFUSED_INLINE A forward(A x) { return sigmoid(x); }
  template <class A> static PYFUSED_INLINE A backward(A grad_output, A output) {
    return grad_output * (1 - output) * output;
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

// x *= a: what is left to do for a gradient that was computed before its upstream was known.
template <class T> void scale(T* x, Accumulate<T> a, int64_t n, int threads) {
  if (a == 1) return;
  map(x, n, threads, [=](int64_t i) { return a * widen(x[i]); });
}

// The output may be the input itself.
template <class Formula, class T>
void activation(const T* input, T* output, int64_t n, int threads) {
  map(output, n, threads, [=](int64_t i) { return Formula::forward(widen(input[i])); });
}

// A grad_output of step 0 is one element that stands for all.
template <class Formula, class T>
void activation_backward(const T* grad_output, int64_t step, const T* output, T* grad_input,
                         int64_t n, int threads) {
  const Accumulate<T> first = widen(*grad_output);
  if (step == 0) {
    map(grad_input, n, threads,
        [=](int64_t i) { return Formula::backward(first, widen(output[i])); });
  } else {
    map(grad_input, n, threads,
        [=](int64_t i) { return Formula::backward(widen(grad_output[i]), widen(output[i])); });
  }
}

}  // namespace pyfused
