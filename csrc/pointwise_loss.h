// Losses that compare operands element by element. The formulas are in loss_formulas.h.
//
//   loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
//   dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = grad_output / denominator
//
// Bytes: each operand (and w, where given) is read once, the gradients that are wanted written once.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "loss_formulas.h"
#include "memory.h"
#include "parallel.h"
#include "vec.h"

namespace pyfused {

// An operand of step 0 is one element that stands for all.
template <class T> struct Operand {
  const T* data;  // null where not given
  int64_t step;
};

template <class T> struct PointwiseLoss {
  using A = Accumulate<T>;
  int64_t n;
  std::array<Operand<T>, 3> operands;
  Parameters parameters;
  Operand<T> weight;
  double denominator;           // of the mean; 1 for the others
  Operand<T> grad_output;          // the loss's gradient
  T* each;                      // n losses, or null
  A* reduced;                   // their scaled sum, or null
  std::array<T*, 3> gradients;  // null where not wanted
  int threads;
};

constexpr int64_t kLossChunk = 1024;     // elements at a time, in L1
constexpr int64_t kLossBlock = 1 << 14;  // elements a thread takes at a time

// The operand's elements from `first` on, where they lie if they can be computed with there.
template <class T>
const Accumulate<T>* elements(const Operand<T>& operand, int64_t first, int64_t n,
                              Accumulate<T>* buffer) {
  if (!operand.step) {
    std::fill_n(buffer, n, widen(*operand.data));
    return buffer;
  }
  if constexpr (std::is_same_v<T, Accumulate<T>>) return operand.data + first;
  else load(operand.data + first, buffer, n);
  return buffer;
}

// What the losses of a chunk are multiplied by, and their gradients; null where by nothing.
template <class A> struct Factors {
  const A* value = nullptr;
  const A* gradient = nullptr;
};

template <class T>
Factors<Accumulate<T>> factors(const PointwiseLoss<T>& p, int64_t first, int64_t n,
                               Accumulate<T>* weight, Accumulate<T>* grad_output) {
  Factors<Accumulate<T>> found;
  if (p.weight.data) found.value = found.gradient = elements(p.weight, first, n, weight);
  if (!p.grad_output.data) return found;
  found.gradient = elements(p.grad_output, first, n, grad_output);
  if (!found.value) return found;
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) grad_output[i] = found.gradient[i] * found.value[i];
  found.gradient = grad_output;
  return found;
}

template <class A> void multiply(A* values, const A* by, int64_t n) {
  if (!by) return;
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) values[i] *= by[i];
}

template <class T>
void pointwise_chunk(const LossFormula& formula, const PointwiseLoss<T>& p, Sum& sum, int64_t first,
                     int64_t n, bool streams) {
  using A = Accumulate<T>;
  using Buffer = A[kLossChunk];
  alignas(kVectorBytes) Buffer read[3], written[3], buffer, weight, grad_output;
  A* const value = p.each && !streams ? staged(p.each + first, buffer) : buffer;
  Sum* const summed = p.each || p.weight.data ? nullptr : &sum;
  LossChunk<A> chunk{n, {}, A(1 / p.denominator), summed, value, {}};
  for (int k = 0; k < 3; ++k) {
    const Operand<T>& operand = p.operands[k];
    chunk.operands[k] = operand.data ? elements(operand, first, n, read[k]) : chunk.operands[0];
    T* const gradient = p.gradients[k];
    if (gradient) chunk.gradients[k] = streams ? written[k] : staged(gradient + first, written[k]);
  }
  formula.in<A>()(p.parameters, chunk);
  const Factors<A> by = factors(p, first, n, weight, grad_output);
  if (p.reduced && by.value) {
    add_terms<A>(sum, n, [&](int64_t i) { return by.value[i] * value[i]; });
  }
  if (p.each) {
    multiply(value, by.value, n);
    write(value, p.each + first, n, streams);
  }
  for (int k = 0; k < 3; ++k) {
    if (!chunk.gradients[k]) continue;
    multiply(chunk.gradients[k], by.gradient, n);
    write(chunk.gradients[k], p.gradients[k] + first, n, streams);
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
