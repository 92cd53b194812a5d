// Losses that compare operands element by element. The formulas f are in formulas.h.
//
//   loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
//   dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = grad_output / denominator
//
// Memory traffic: each operand and w are read once, each gradient is written once.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "strides.h"
#include "vec.h"

namespace pyfused {

using Parameters = std::array<double, 3>;  // the numeric parameters of a formula

constexpr int kOperands = 4;  // at most

// n elements of each operand, in L1. Null gradients are not computed.
template <class A> struct LossChunk {
  int64_t n;
  std::array<const A*, kOperands> operands;
  A scale;    // multiplies the gradients
  Sum* sum;   // accumulates the losses; if null, they are written to `value`
  A* value;
  std::array<A*, kOperands> gradients;
};

template <class A> using LossLoops = void(const Parameters&, const LossChunk<A>&);

struct LossFormula {
  const char* name;
  LossLoops<float>* in_float;
  LossLoops<double>* in_double;
  static constexpr bool kSums = true;  // evaluate() adds up the losses
  static constexpr int64_t kChunk = 1024;  // elements at a time, in L1
  template <class A> struct Registers {};  // memory of a formula besides the chunk's buffers

  template <class A>
  void evaluate(const Parameters& parameters, const LossChunk<A>& chunk, Registers<A>&) const {
    if constexpr (sizeof(A) == sizeof(float)) in_float(parameters, chunk);
    else in_double(parameters, chunk);
  }
};

std::vector<LossFormula> loss_formulas();

template <class T> struct PointwiseLoss {
  using A = Accumulate<T>;
  int64_t n;
  std::array<Operand<T>, kOperands> operands;
  Parameters parameters;
  Operand<T> weight;
  double denominator;           // of a mean; 1 for other reductions
  Operand<T> grad_output;
  T* unreduced;                 // n losses, or null
  A* reduced;                   // their sum / denominator, also beside `unreduced`; or null
  std::array<T*, kOperands> gradients;  // null if not computed
  int threads;
  Order order;
};

// Formula: LossFormula, or ProgramFormula of program.h.
template <class Formula, class T>
void pointwise_loss(const Formula& formula, const PointwiseLoss<T>& p);

}  // namespace pyfused
