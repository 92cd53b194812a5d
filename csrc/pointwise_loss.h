// Losses that compare input and target element by element: one formula each.
//
//   loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
//   dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = upstream gradient / denominator
//
// Bytes: x, t (and w, where given) are read once, the gradients that are wanted written once.
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "vec.h"

namespace pyfused {

// torch: F.mse_loss(x, t). The gradients come divided by the denominator, before they can overflow.
struct MseLoss {
  template <class A> static PYFUSED_INLINE A value(A x, A t) { return (x - t) * (x - t); }
  template <class A> static PYFUSED_INLINE A input_gradient(A x, A t, A scale) {
    return 2 * scale * (x - t);
  }
  template <class A> static PYFUSED_INLINE A target_gradient(A x, A t, A scale) {
    return 2 * scale * (t - x);
  }
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

constexpr int64_t kLossChunk = 512;      // elements at a time, in L1
constexpr int64_t kLossBlock = 1 << 14;  // elements a thread takes at a time

// The loss and the gradients of one chunk, with weight(i) and upstream(i) inlined.
template <class Formula, class T, class Weight, class Upstream>
PYFUSED_INLINE void pointwise_chunk(const PointwiseLoss<T>& p, Sum& sum, const T* x, const T* t,
                                    int64_t first, int64_t n, bool streams, const Weight& weight,
                                    const Upstream& upstream) {
  using A = Accumulate<T>;
  const A scale = A(1 / p.denominator);
  alignas(kVectorBytes) A buffer[kLossChunk];
  const auto into = [&](T* output) { return streams ? buffer : staged(output + first, buffer); };
  if (p.reduced && p.grad_input) {  // the common case takes one loop
    A* const out = into(p.grad_input);
    add_terms<A>(sum, n, [&](int64_t i) {
      out[i] = Formula::input_gradient(widen(x[i]), widen(t[i]), scale) * upstream(i);
      return weight(i) * Formula::value(widen(x[i]), widen(t[i]));
    });
    write(out, p.grad_input + first, n, streams);
  } else if (p.reduced) {
    add_terms<A>(sum, n, [&](int64_t i) {
      return weight(i) * Formula::value(widen(x[i]), widen(t[i]));
    });
  } else if (p.grad_input) {
    A* const out = into(p.grad_input);
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      out[i] = Formula::input_gradient(widen(x[i]), widen(t[i]), scale) * upstream(i);
    }
    write(out, p.grad_input + first, n, streams);
  }
  if (p.each) {
    A* const out = into(p.each);
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) out[i] = weight(i) * Formula::value(widen(x[i]), widen(t[i]));
    write(out, p.each + first, n, streams);
  }
  if (p.grad_target) {
    A* const out = into(p.grad_target);
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      out[i] = Formula::target_gradient(widen(x[i]), widen(t[i]), scale) * upstream(i);
    }
    write(out, p.grad_target + first, n, streams);
  }
}

// The operand's elements from `first` on; an operand of step 0 fills the buffer.
template <class T>
const T* elements(const Operand<T>& operand, int64_t first, int64_t n, T* buffer) {
  if (operand.step) return operand.data + first;
  std::fill_n(buffer, n, *operand.data);
  return buffer;
}

template <class Formula, class T>
void pointwise_chunk(const PointwiseLoss<T>& p, Sum& sum, int64_t first, int64_t n, bool streams) {
  using A = Accumulate<T>;
  alignas(kVectorBytes) T x_fill[kLossChunk], t_fill[kLossChunk], fill[kLossChunk];
  const T* const x = elements(p.input, first, n, x_fill);
  const T* const t = elements(p.target, first, n, t_fill);
  if (!p.weight.data && !p.upstream.step) {
    const A upstream = p.upstream.data ? widen(*p.upstream.data) : A(1);
    return pointwise_chunk<Formula>(
        p, sum, x, t, first, n, streams, [](int64_t) { return A(1); },
        [=](int64_t) { return upstream; });
  }
  alignas(kVectorBytes) A weight[kLossChunk], upstream[kLossChunk];
  std::fill_n(weight, n, A(1));
  std::fill_n(upstream, n, A(1));
  if (p.weight.data) load(elements(p.weight, first, n, fill), weight, n);
  if (p.upstream.data) load(elements(p.upstream, first, n, fill), upstream, n);
  for (int64_t i = 0; i < n; ++i) upstream[i] *= weight[i];
  pointwise_chunk<Formula>(
      p, sum, x, t, first, n, streams, [&](int64_t i) { return weight[i]; },
      [&](int64_t i) { return upstream[i]; });
}

template <class Formula, class T> void pointwise_loss(const PointwiseLoss<T>& p) {
  const int64_t blocks = (p.n + kLossBlock - 1) / kLossBlock;
  const bool streams = size_t(p.n) * sizeof(T) >= kStreamBytes;
  std::vector<double> partial(blocks);
  parallel_for(blocks, p.threads, [&](int64_t block) {
    const int64_t end = std::min(p.n, (block + 1) * kLossBlock);
    Sum sum;
    for (int64_t first = block * kLossBlock; first < end; first += kLossChunk) {
      pointwise_chunk<Formula>(p, sum, first, std::min(kLossChunk, end - first), streams);
    }
    partial[block] = sum.value();
  });
  if (p.reduced) *p.reduced = Accumulate<T>(total<T>(partial.data(), blocks) / p.denominator);
}

}  // namespace pyfused
