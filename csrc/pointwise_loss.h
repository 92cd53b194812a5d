// Losses that compare input and target element by element: one formula each.
//
//   loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
//   dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = upstream gradient / denominator
//
// Bytes: x, t (and w, where given) are read once, the gradients that are wanted written once.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace pyfused {

// torch: F.mse_loss(x, t)
struct SquaredError {
  template <class A> static PYFUSED_INLINE A value(A x, A t) { return (x - t) * (x - t); }
  template <class A> static PYFUSED_INLINE A input_gradient(A x, A t) { return 2 * (x - t); }
  template <class A> static PYFUSED_INLINE A target_gradient(A x, A t) { return 2 * (t - x); }
};

// An operand of step 0 is one element that stands for all.
template <class T> struct Operand {
  const T* data;  // null where not given: ones
  int64_t step;
};

template <class T> struct PointwiseLoss {
  using A = Accumulate<T>;
  int64_t n;
  Operand<T> input, target, weight;
  double denominator;     // of the mean; 1 for the others
  Operand<T> upstream;    // the loss's gradient
  T* each;                // n losses, or null
  A* reduced;             // their scaled sum, or null
  T* grad_input;          // null where not wanted
  T* grad_target;         // likewise
  int threads;
};

constexpr int64_t kLossChunk = 512;      // elements at a time, in L1, and summed in Accumulate<T>
constexpr int64_t kLossBlock = 1 << 14;  // elements a thread takes at a time, summed in double

template <class T>
PYFUSED_INLINE void load(const Operand<T>& operand, int64_t first, Accumulate<T>* to, int64_t n) {
  if (operand.data && operand.step) {
    load(operand.data + first, to, n);
  } else {
    std::fill_n(to, n, operand.data ? widen(*operand.data) : Accumulate<T>(1));
  }
}

template <class Formula, class T>
double pointwise_chunk(const PointwiseLoss<T>& p, int64_t first, int64_t n) {
  using A = Accumulate<T>;
  alignas(kVectorBytes) A x[kLossChunk], t[kLossChunk], w[kLossChunk], out[kLossChunk];
  load(p.input, first, x, n);
  load(p.target, first, t, n);
  if (p.weight.data) load(p.weight, first, w, n);
  A sum = 0;
  if (p.each || p.reduced) {
    for (int64_t i = 0; i < n; ++i) out[i] = Formula::value(x[i], t[i]);
    for (int64_t i = 0; p.weight.data && i < n; ++i) out[i] *= w[i];
    if (p.each) store(out, p.each + first, n);
    PYFUSED_SIMD(reduction(+ : sum))
    for (int64_t i = 0; i < n; ++i) sum += out[i];
  }
  if (!p.grad_input && !p.grad_target) return sum;

  alignas(kVectorBytes) A u[kLossChunk];
  load(p.upstream, first, u, n);
  const A scale = A(1 / p.denominator);
  for (int64_t i = 0; i < n; ++i) u[i] *= scale;
  for (int64_t i = 0; p.weight.data && i < n; ++i) u[i] *= w[i];
  if (p.grad_input) {
    for (int64_t i = 0; i < n; ++i) out[i] = u[i] * Formula::input_gradient(x[i], t[i]);
    store(out, p.grad_input + first, n);
  }
  if (p.grad_target) {
    for (int64_t i = 0; i < n; ++i) out[i] = u[i] * Formula::target_gradient(x[i], t[i]);
    store(out, p.grad_target + first, n);
  }
  return sum;
}

template <class Formula, class T> void pointwise_loss(const PointwiseLoss<T>& p) {
  const int64_t blocks = (p.n + kLossBlock - 1) / kLossBlock;
  std::vector<double> partial(blocks);
  parallel_for(blocks, p.threads, [&](int64_t block) {
    const int64_t end = std::min(p.n, (block + 1) * kLossBlock);
    for (int64_t first = block * kLossBlock; first < end; first += kLossChunk) {
      partial[block] += pointwise_chunk<Formula>(p, first, std::min(kLossChunk, end - first));
    }
  });
  if (!p.reduced) return;
  double total = 0;
  for (const double part : partial) total += part;
  *p.reduced = Accumulate<T>(total / p.denominator);
}

}  // namespace pyfused
