// Softmax and its logarithm along the classes of each position.
//
//   forward   softmax      y_c  = exp(x_c - lse),          lse = log sum_c exp(x_c)
//             log_softmax  y_c  = x_c - lse
//   backward  softmax      dx_c = y_c (dy_c - sum_k dy_k y_k)
//             log_softmax  dx_c = dy_c - exp(y_c) sum_k dy_k
//
// torch: F.softmax(x, dim), F.log_softmax(x, dim)
//
// Memory traffic: x, dy and y are read once from memory and the result is written once; later reads
// hit the cache.
#pragma once

#include "positions.h"

namespace pyfused {

template <class T> struct Softmax : Positions {
  bool logarithm;
  View<const T> input;  // x, or y in the backward pass
  View<const T> grad_output;  // data is null in the forward pass
  View<T> output;  // y, or dx in the backward pass
  int threads;

  bool backward() const { return grad_output.data != nullptr; }
  bool classes_contiguous() const {
    return input.classes == 1 && output.classes == 1 && (!backward() || grad_output.classes == 1);
  }
};

template <class T> void softmax(const Softmax<T>& softmax);

}  // namespace pyfused
