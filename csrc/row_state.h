// The state of each row of logits z with a class index t, and the gradients of the results that are
// computed from it. The equations are in row_terms.h, with
//
//   x_c = scale z_c, or with a softcap  scale softcap tanh(z_c / softcap)
//
// Cross-entropy is -log_p, with label smoothing a sum of log_p, log(sum) and smooth.
//
// torch: log_softmax(x, 1), and its entropy and logsumexp
//
// Shapes: z is (rows, classes) with contiguous classes, which may be a block of all classes. Calls
// with consecutive blocks continue from the state that the previous call stored. If each block
// except the last has a multiple of kChunk classes, the results are bitwise equal to the results of
// one call. No result depends on another row.
//
// Memory traffic: the forward pass reads the logits once; the backward pass reads them once and
// writes the gradient once.
#pragma once

#include <cstdint>
#include <optional>

#include "vec.h"

namespace pyfused {

// A state has the fields up to kTargetLogit; or up to kIndex, the first class with the largest
// logit before the scale and the softcap, where NaN is the largest; or all. pyfused/types.py has
// the same list.
enum RowField {
  kLogP,
  kEntropy,
  kLse,
  kPivot,
  kSum,
  kWeighted,
  kTargetLogit,
  kMaximum,
  kIndex,
  kSmooth
};

// An array for each field, at a stride.
template <class D> struct RowFields {
  D* data;
  int64_t stride;
  int count;
  D& at(int field, int64_t row) const { return data[field * stride + row]; }
};

// The gradients of the first of log_p, entropy, lse and smooth: float or double, at two strides.
struct GradientFields {
  const void* data;
  int64_t stride, row_stride;
  int count, bytes;  // the number of results; the bytes of each number
  double at(int field, int64_t row) const {
    if (field >= count) return 0;
    const int64_t i = field * stride + row * row_stride;
    return bytes == 4 ? static_cast<const float*>(data)[i] : static_cast<const double*>(data)[i];
  }
};

template <class T> struct LogitRows {
  int64_t rows, classes, first_class;
  const T* logits;
  int64_t stride;  // from one row of the logits to the next
  const int64_t* target;  // for each row an index into all classes; null for none
  int64_t ignore_index;  // a row with this target has a state and a gradient of 0
  double scale;
  std::optional<double> softcap;
  const Accumulate<T>* weight;  // one for each of all classes; null for ones
  int threads;
};

template <class T> struct RowGradients {
  RowFields<const double> state;  // over all classes
  GradientFields grad_results;
  T* grad;  // may be the logits
  int64_t stride;
};

// results: copies of the first fields of the state.
// preceding: the number of classes directly before these whose state is continued; 0 for none.
template <class T>
void row_state(const LogitRows<T>& rows, const RowFields<double>& state,
               const RowFields<Accumulate<T>>& results, int64_t preceding);
template <class T>
void row_gradients(const LogitRows<T>& rows, const RowGradients<T>& gradients);

}  // namespace pyfused
