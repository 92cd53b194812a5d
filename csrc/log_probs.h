// The log-probability of one class of each row, the row's entropy and its log-sum-exp, and the
// gradient of the logits z.
//
//   x_c     = scale z_c, or with a softcap  scale softcap tanh(z_c / softcap)
//   lse     = log sum_c exp(x_c)
//   log_p   = x_t - lse
//   entropy = -sum_c p_c log p_c = lse - sum_c p_c x_c,    p_c = exp(x_c - lse)
//   dz_c    = (p_c (g_lse - g_log_p - g_entropy (log p_c + entropy)) + g_log_p [c = t]) dx_c/dz_c
//
// g_log_p, g_entropy and g_lse are the gradients of the three results of the row.
//
// torch: log_softmax(x, 1) and what follows from it
//
// Shapes: z is (rows, classes), the classes contiguous. They may be some of all classes. Then one
// call after another, of consecutive classes, continues from the values that the one before has
// left. If each but the last has a multiple of kChunk classes, the results are bitwise those of one
// call. No result depends on another row.
//
// Memory traffic: the forward pass reads the logits once; the backward pass reads them once and
// writes the gradient once.
#pragma once

#include <cstdint>

#include "vec.h"

namespace pyfused {

enum RowValue { kLogP, kEntropy, kLse, kPivot, kSum, kWeighted, kTargetLogit, kRowValues };

// An array for each value, at a stride.
template <class D> struct RowValues {
  D* data;
  int64_t stride;
  D& at(RowValue value, int64_t row) const { return data[value * stride + row]; }
};

template <class T> struct LogProbs {
  int64_t rows, classes, first_class;
  const T* logits;
  int64_t stride;  // from one row of the logits to the next
  const int64_t* target;  // a class of all classes for each row
  int64_t ignore_index;  // a row with this target has results and a gradient of 0
  double scale;
  double softcap;  // 0 for none
  int threads;
};

template <class T> struct LogProbsGradient {
  RowValues<const double> values;  // of all classes
  RowValues<const double> grad_results;  // of the first three values
  T* grad;  // may be the logits
  int64_t stride;
};

// continues: from the values, which are those of the classes before these.
template <class T>
void log_probs(const LogProbs<T>& given, const RowValues<double>& values, bool continues);
template <class T>
void log_probs_backward(const LogProbs<T>& given, const LogProbsGradient<T>& gradient);

}  // namespace pyfused
