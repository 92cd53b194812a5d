// The hinge loss of each class whose score is within a margin of the target's, as in an SVM.
//
//   z_c  = max(0, margin - x_t + x_c)
//   loss = weight_t / C sum_{c != t} z_c^p,    p = 1 or 2
//   dloss/dx_c = weight_t / C p z_c^(p - 1) [z_c > 0],    dloss/dx_t = -(the sum of these)
//
// With several targets per row, terminated by -1, every class that is not a target is compared with
// every target:
//
//   z_tc = max(0, 1 - x_t + x_c)
//   loss = 1 / C sum_t sum_{c not in targets} z_tc
//   dloss/dx_c = 1 / C sum_t [z_tc > 0],    dloss/dx_t = -1 / C sum_c [z_tc > 0]
//
// torch: F.multi_margin_loss(x, target, p=..., margin=..., weight=..., reduction=...)
//        F.multilabel_margin_loss(x, target, reduction=...)
//
// Shapes: x is (N, C), dense, and the targets are (N), or (N, C) if there are several. Memory
// traffic: x and the targets are read once and the gradient is written once.
#pragma once

#include "cross_entropy_terms.h"

namespace pyfused {

template <class T> struct MultiMargin {
  using A = Accumulate<T>;
  int64_t rows, classes;
  const T* input;
  const int64_t* target;
  bool multilabel;  // a row has several targets, p = 1, margin = 1, and no weight
  const A* weight;  // one for each class; null for ones
  bool squared;  // p = 2
  double margin;
  Reduction reduction;
  const A* grad_output;  // for each row with Reduction::none, else one; null for ones
  A* loss;  // for each row with Reduction::none, else one; null if not computed
  T* grad_input;  // null if not computed
  int threads;
};

// Returns the index of the first target that is out of range, or -1.
template <class T> int64_t multi_margin_loss(const MultiMargin<T>& mm);

}  // namespace pyfused
