// Losses that compare operands element by element. The formulas f are in loss_formulas.h.
//
//   loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
//   dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = grad_output / denominator
//
// Memory traffic: each operand and w are read once, each wanted gradient is written once.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace pyfused {

using Parameters = std::array<double, 3>;  // a formula's numbers

template <class A> struct LossChunk;
template <class A> using LossLoops = void(const Parameters&, const LossChunk<A>&);

struct LossFormula {
  const char* name;
  LossLoops<float>* in_float;
  LossLoops<double>* in_double;

  template <class A> LossLoops<A>* in() const {
    if constexpr (sizeof(A) == sizeof(float)) return in_float;
    else return in_double;
  }
};

std::vector<LossFormula> loss_formulas();

// With step 0, one element is broadcast.
template <class T> struct Operand {
  const T* data;  // null if not given
  int64_t step;
};

template <class T> struct PointwiseLoss {
  using A = Accumulate<T>;
  int64_t n;
  std::array<Operand<T>, 3> operands;
  Parameters parameters;
  Operand<T> weight;
  double denominator;           // of the mean; 1 for the others
  Operand<T> grad_output;
  T* each;                      // n losses, or null
  A* reduced;                   // their sum / denominator, or null
  std::array<T*, 3> gradients;  // null if not wanted
  int threads;
};

template <class T> void pointwise_loss(const LossFormula& formula, const PointwiseLoss<T>& p);

}  // namespace pyfused
