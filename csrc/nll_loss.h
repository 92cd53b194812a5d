// The negative log-likelihood of class indices, of log-probabilities x.
//
//   loss = -weight_t x_t        dloss/dx_c = -weight_t [c = t]
//
// torch: F.nll_loss(x, target, weight, ignore_index=..., reduction=...)
//
// The arguments are cross-entropy's, without probabilities or smoothing. Memory traffic: one
// element of each position is read, and the gradient, which is zero elsewhere, is written once.
#pragma once

#include "cross_entropy_terms.h"

namespace pyfused {

// Returns the first position whose target is out of range, with nothing written, or -1. The
// gradient's memory is dense.
template <class T> int64_t nll_loss(const CrossEntropy<T>& nll);

}  // namespace pyfused
