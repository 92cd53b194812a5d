// Activations: one formula each, shared by all element types and layouts.
//
//   forward   y = f(x)          reads x, writes y
//   backward  dx = f'(y) dy     reads y and dy, writes dx
#pragma once

#include <algorithm>

#include "parallel.h"
#include "vec.h"

namespace pyfused {

// torch: F.relu(x). NaN and -0.0 pass, and so does the gradient where y is NaN.
struct Relu {
  template <class A> static PYFUSED_INLINE A forward(A x) { return x < 0 ? A(0) : x; }
  template <class A> static PYFUSED_INLINE A backward(A grad_output, A output) {
    return output <= 0 ? A(0) : grad_output;
  }
};

constexpr int64_t kActivationBlock = 16384;

template <class Body> void for_blocks(int64_t n, int threads, const Body& body) {
  parallel_for((n + kActivationBlock - 1) / kActivationBlock, threads, [&](int64_t block) {
    const int64_t first = block * kActivationBlock;
    body(first, std::min(kActivationBlock, n - first));
  });
}

// The output may be the input itself.
template <class Formula, class T>
void activation(const T* input, T* output, int64_t n, int threads) {
  for_blocks(n, threads, [=](int64_t first, int64_t count) {
    PYFUSED_SIMD()
    for (int64_t i = first; i < first + count; ++i) {
      output[i] = narrow<T>(Formula::forward(widen(input[i])));
    }
  });
}

// A grad_output of step 0 is one element that stands for all.
template <class Formula, class T>
void activation_backward(const T* grad_output, int64_t step, const T* output, T* grad_input,
                         int64_t n, int threads) {
  for_blocks(n, threads, [=](int64_t first, int64_t count) {
    const auto run = [=](auto upstream) {
      PYFUSED_SIMD()
      for (int64_t i = first; i < first + count; ++i) {
        grad_input[i] = narrow<T>(Formula::backward(upstream(i), widen(output[i])));
      }
    };
    if (step == 0) {
      const Accumulate<T> constant = widen(*grad_output);
      run([=](int64_t) { return constant; });
    } else {
      run([=](int64_t i) { return widen(grad_output[i]); });
    }
  });
}

}  // namespace pyfused
