// The hinge of each class that comes within a margin of the target's, as in a multi-class SVM.
//
//   z_c  = max(0, margin - x_t + x_c)
//   loss = weight_t / C sum_{c != t} z_c^p,    p = 1 or 2
//   dloss/dx_c = weight_t / C p z_c^(p - 1) [z_c > 0],    dloss/dx_t = -(the sum of these)
//
// torch: F.multi_margin_loss(x, target, p=..., margin=..., weight=..., reduction=...)
//
// Shapes: x is (N, C), dense. Memory traffic: x is read once and the gradient is written once.
#pragma once

#include "cross_entropy_terms.h"

namespace pyfused {

template <class T> struct MultiMargin {
  using A = Accumulate<T>;
  int64_t rows, classes;
  const T* input;
  const int64_t* target;
  const A* weight;  // one for each class; null for ones
  bool squared;     // p = 2
  double margin;
  Reduction reduction;
  const A* grad_output;  // for each row with Reduction::none, else one; null for ones
  A* loss;               // for each row with Reduction::none, else one; null if not wanted
  T* grad_input;         // null if not wanted
  int threads;
};

// Returns the first row whose target is out of range, with nothing written, or -1.
template <class T> int64_t multi_margin_loss(const MultiMargin<T>& mm);

}  // namespace pyfused
