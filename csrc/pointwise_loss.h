// Losses that compare input and target element by element: one formula each.
//
//   loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
//   dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = upstream gradient / denominator
//
// Some formulas have a third operand. Bytes: operands (and w, where given) are read once, the gradients
// that are wanted written once.
//
// A formula is compiled as loops over one chunk in L1, for float and for double. All else is shared by
// the formulas and compiled once for each element type: conversions, weights, sums and threads.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "vec.h"

namespace pyfused {

constexpr int kMostOperands = 3;
using Parameters = std::array<double, 3>;  // a formula's numbers, in the order of its declaration

// ---- formulas -----------------------------------------------------------------------------------
// The gradients come divided by the denominator (`scale`), before they can overflow.

// torch: F.mse_loss(x, t).
template <class A> struct MseLoss {
  explicit MseLoss(const Parameters&) {}
  PYFUSED_INLINE A value(A x, A t) const { return (x - t) * (x - t); }
  PYFUSED_INLINE std::array<A, 2> gradients(A x, A t, A scale) const {
    return {2 * scale * (x - t), 2 * scale * (t - x)};
  }
};

// torch: F.smooth_l1_loss(x, t, beta=beta); F.l1_loss(x, t) where beta is 0.
template <class A> struct SmoothL1Loss {
  A beta;
  explicit SmoothL1Loss(const Parameters& parameters) : beta(A(parameters[0])) {}
  PYFUSED_INLINE A value(A x, A t) const {
    const A distance = std::abs(x - t);
    return distance < beta ? A(0.5) * distance * distance / beta : distance - A(0.5) * beta;
  }
  PYFUSED_INLINE std::array<A, 2> gradients(A x, A t, A scale) const {
    const A d = x - t;
    const A sign = d > 0 ? scale : d < 0 ? -scale : A(0);
    // NaN passes, but for the sign that is left where beta is 0.
    const A slope = std::abs(d) >= beta || beta == 0 ? sign : scale * d / beta;
    return {slope, -slope};
  }
};

// torch: F.binary_cross_entropy_with_logits(x, t).
template <class A> struct BinaryCrossEntropy {
  explicit BinaryCrossEntropy(const Parameters&) {}
  PYFUSED_INLINE A value(A x, A t) const {
    return (1 - t) * x + (softplus_of_minus(std::abs(x)) + (x < 0 ? -x : A(0)));
  }
  PYFUSED_INLINE std::array<A, 2> gradients(A x, A t, A scale) const {
    return {scale * (sigmoid(x) - t), -scale * x};
  }
};

// The same with pos_weight=p, which gets no gradient.
template <class A> struct BinaryCrossEntropyPosWeight {
  explicit BinaryCrossEntropyPosWeight(const Parameters&) {}
  PYFUSED_INLINE A value(A x, A t, A p) const {
    const A log_sigmoid = (x < 0 ? x : A(0)) - softplus_of_minus(std::abs(x));
    return (1 - t) * x - (1 + (p - 1) * t) * log_sigmoid;
  }
  PYFUSED_INLINE std::array<A, 2> gradients(A x, A t, A p, A scale) const {
    const A log1p_exp = softplus_of_minus(std::abs(x));
    const A of_one = (x < 0 ? x : A(0)) - log1p_exp, of_zero = (x > 0 ? -x : A(0)) - log1p_exp;
    return {scale * ((p * t + 1 - t) * sigmoid(x) - p * t), scale * (of_zero - p * of_one)};
  }
};

// torch: F.gaussian_nll_loss(x, t, v, full, eps). As there, the clamp passes v's gradient.
template <class A> struct GaussianNllLoss {
  A constant, least;
  explicit GaussianNllLoss(const Parameters& parameters)
      : constant(A(parameters[0] != 0 ? 0.91893853320467274 : 0)), least(A(parameters[1])) {}
  PYFUSED_INLINE A value(A x, A t, A v) const {
    const A variance = v < least ? least : v;
    return A(0.5) * (log_of(variance) + (x - t) * (x - t) / variance) + constant;
  }
  PYFUSED_INLINE std::array<A, 3> gradients(A x, A t, A v, A scale) const {
    const A variance = v < least ? least : v, d = x - t;
    const A slope = 2 * d * (A(0.5) * scale / variance);  // overflows where torch's does
    const A of_variance = A(0.5) * scale * (1 / variance - d * d / variance / variance);
    return {slope, -slope, of_variance};
  }
};

// ---- one chunk ----------------------------------------------------------------------------------

constexpr int64_t kLossChunk = 512;      // elements at a time, in L1
constexpr int64_t kLossBlock = 1 << 14;  // elements a thread takes at a time

template <class A> struct LossChunk {
  int64_t n;
  std::array<const A*, kMostOperands> operands;
  A* value;                               // null where not wanted
  std::array<A*, kMostOperands> gradients;  // likewise
  A scale, upstream;                      // of the gradients
};

template <class A, class Formula, int kOperands>
PYFUSED_INLINE A value_at(const Formula& formula, const std::array<const A*, kMostOperands>& of,
                          int64_t i) {
  if constexpr (kOperands == 3) return formula.value(of[0][i], of[1][i], of[2][i]);
  else return formula.value(of[0][i], of[1][i]);
}

template <class A, class Formula, int kOperands>
PYFUSED_INLINE auto gradients_at(const Formula& formula,
                                 const std::array<const A*, kMostOperands>& of, int64_t i,
                                 A scale) {
  if constexpr (kOperands == 3) return formula.gradients(of[0][i], of[1][i], of[2][i], scale);
  else return formula.gradients(of[0][i], of[1][i], scale);
}

// The common cases take a loop of their own; the rest computes all and keeps what is wanted.
template <class A, class Formula, int kOperands>
void evaluate(const Parameters& parameters, const LossChunk<A>& chunk) {
  const Formula formula(parameters);
  const std::array<const A*, kMostOperands> of = chunk.operands;
  const A scale = chunk.scale, upstream = chunk.upstream;
  A *const value = chunk.value, *const first = chunk.gradients[0];
  if (chunk.gradients[1] || chunk.gradients[2]) {
    alignas(kVectorBytes) A unused[kMostOperands + 1][kLossChunk];
    A* const values = value ? value : unused[kMostOperands];
    std::array<A*, kMostOperands> to = chunk.gradients;
    for (int k = 0; k < kMostOperands; ++k) to[k] = to[k] ? to[k] : unused[k];
    PYFUSED_SIMD()
    for (int64_t i = 0; i < chunk.n; ++i) {
      const auto gradients = gradients_at<A, Formula, kOperands>(formula, of, i, scale);
      values[i] = value_at<A, Formula, kOperands>(formula, of, i);
      to[0][i] = gradients[0] * upstream;
      to[1][i] = gradients[1] * upstream;
      if constexpr (gradients.size() == 3) to[2][i] = gradients[2] * upstream;
    }
  } else if (value && first) {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < chunk.n; ++i) {
      const A gradient = gradients_at<A, Formula, kOperands>(formula, of, i, scale)[0];
      value[i] = value_at<A, Formula, kOperands>(formula, of, i);
      first[i] = gradient * upstream;
    }
  } else if (value) {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < chunk.n; ++i) value[i] = value_at<A, Formula, kOperands>(formula, of, i);
  } else if (first) {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < chunk.n; ++i) {
      first[i] = gradients_at<A, Formula, kOperands>(formula, of, i, scale)[0] * upstream;
    }
  }
}

struct LossFormula {
  const char* name;
  size_t operands;
  void (*of_float)(const Parameters&, const LossChunk<float>&);
  void (*of_double)(const Parameters&, const LossChunk<double>&);

  void operator()(const Parameters& p, const LossChunk<float>& chunk) const { of_float(p, chunk); }
  void operator()(const Parameters& p, const LossChunk<double>& chunk) const { of_double(p, chunk); }
};

template <template <class> class Formula, int kOperands>
constexpr LossFormula loss_formula(const char* name) {
  return {name, kOperands, evaluate<float, Formula<float>, kOperands>,
          evaluate<double, Formula<double>, kOperands>};
}

constexpr LossFormula kLossFormulas[] = {
    loss_formula<MseLoss, 2>("mse_loss"),
    loss_formula<SmoothL1Loss, 2>("smooth_l1_loss"),
    loss_formula<BinaryCrossEntropy, 2>("binary_cross_entropy_with_logits"),
    loss_formula<BinaryCrossEntropyPosWeight, 3>("binary_cross_entropy_with_logits_pos_weight"),
    loss_formula<GaussianNllLoss, 3>("gaussian_nll_loss"),
};

// ---- all of them --------------------------------------------------------------------------------

// An operand of step 0 is one element that stands for all.
template <class T> struct Operand {
  const T* data;  // null where not given: ones
  int64_t step;
};

template <class T> struct PointwiseLoss {
  using A = Accumulate<T>;
  int64_t n;
  std::array<Operand<T>, kMostOperands> operands;
  Parameters parameters;
  Operand<T> weight;
  double denominator;   // of the mean; 1 for the others
  Operand<T> upstream;  // the loss's gradient
  T* each;              // n losses, or null
  A* reduced;           // their scaled sum, or null
  std::array<T*, kMostOperands> gradients;  // null where not wanted
  int threads;
};

template <class A> using ChunkBuffer = A[kLossChunk];

// The operand's elements from `first` on: in place, or in the buffer.
template <class T>
PYFUSED_INLINE const Accumulate<T>* elements(const Operand<T>& operand, int64_t first, int64_t n,
                                             Accumulate<T>* buffer) {
  if (!operand.step) {
    std::fill_n(buffer, n, operand.data ? widen(*operand.data) : Accumulate<T>(1));
  } else if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return operand.data + first;
  } else {
    load(operand.data + first, buffer, n);
  }
  return buffer;
}

template <class A> PYFUSED_INLINE void multiply(A* to, const A* by, int64_t n) {
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) to[i] *= by[i];
}

template <class T>
void pointwise_chunk(const LossFormula& formula, const PointwiseLoss<T>& p, Sum& sum, int64_t first,
                     int64_t n, bool streams) {
  using A = Accumulate<T>;
  alignas(kVectorBytes) ChunkBuffer<A> read[kMostOperands], values, written[kMostOperands];
  alignas(kVectorBytes) ChunkBuffer<A> weights, upstreams;
  const bool plain = !p.weight.data && !p.upstream.step;
  LossChunk<A> chunk{n, {}, nullptr, {}, A(1 / p.denominator), A(1)};
  if (plain && p.upstream.data) chunk.upstream = widen(*p.upstream.data);
  for (size_t k = 0; k < formula.operands; ++k) {
    chunk.operands[k] = elements(p.operands[k], first, n, read[k]);
  }
  if (p.each) chunk.value = streams ? values : staged(p.each + first, values);
  if (p.reduced) chunk.value = values;
  for (size_t k = 0; k < formula.operands; ++k) {
    T* const to = p.gradients[k];
    if (to) chunk.gradients[k] = streams ? written[k] : staged(to + first, written[k]);
  }
  formula(p.parameters, chunk);
  if (!plain) {
    const A* const weight = elements(p.weight, first, n, weights);
    const A* const upstream = elements(p.upstream, first, n, upstreams);
    if (chunk.value) multiply(chunk.value, weight, n);
    for (A* const gradient : chunk.gradients) {
      if (!gradient) continue;
      PYFUSED_SIMD()
      for (int64_t i = 0; i < n; ++i) gradient[i] *= upstream[i] * weight[i];
    }
  }
  if (p.reduced) add_terms<A>(sum, n, [&](int64_t i) { return values[i]; });
  if (p.each) write(chunk.value, p.each + first, n, streams);
  for (size_t k = 0; k < formula.operands; ++k) {
    if (p.gradients[k]) write(chunk.gradients[k], p.gradients[k] + first, n, streams);
  }
}

template <class T> void pointwise_loss(const LossFormula& formula, const PointwiseLoss<T>& p) {
  const int64_t blocks = (p.n + kLossBlock - 1) / kLossBlock;
  const bool streams = size_t(p.n) * sizeof(T) >= kStreamBytes;
  std::vector<double> partial(blocks);
  parallel_for(blocks, p.threads, [&](int64_t block) {
    const int64_t end = std::min(p.n, (block + 1) * kLossBlock);
    Sum sum;
    for (int64_t first = block * kLossBlock; first < end; first += kLossChunk) {
      pointwise_chunk(formula, p, sum, first, std::min(kLossChunk, end - first), streams);
    }
    partial[block] = sum.value();
  });
  if (p.reduced) *p.reduced = Accumulate<T>(total<T>(partial.data(), blocks) / p.denominator);
}

}  // namespace pyfused
