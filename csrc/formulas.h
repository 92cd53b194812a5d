// The formulas of pointwise losses and activations, which `make formulas` generates from
// pyfused/ops/elementwise.py. Each is the loss of an element with its gradients, or an activation
//
//   forward   y = f(x)
//   backward  dx = f'(x) dy, from dy and either y or x, whichever the operator saves
//
// for float and double. They are in loss_formulas.inc and activation_formulas.inc, so that another
// formula recompiles one file. The constructor of a formula takes its parameters, at most three,
// and computes constants from them in double. Reading, rounding, weights, sums, loops and threads
// are in pointwise_loss.cpp and activation.cpp, which include the formulas.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "activation.h"
#include "pointwise_loss.h"
#include "vec.h"

namespace pyfused {
PYFUSED_INLINE_ALL

// The gradient of an operand that a formula does not differentiate is never requested.
template <class A> struct Formula {
  explicit Formula(const Parameters&) {}
  A grad_target(A, A, A, A) const { return 0; }
  A grad_other(A, A, A, A) const { return 0; }
};

PYFUSED_INLINE_END
}  // namespace pyfused
