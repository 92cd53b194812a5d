// Cross-entropy of a batch, and the negative log-likelihood of log-probabilities. The equations are
// in row_terms.h. With a scale, x is scale times the logits, whose gradient is scale dloss/dx. The
// gradient of probabilities y is
//
//   dloss/dy_c = smooth_weight prob_weight weight_c (lse - x_c)
//
// with prob_weight 1, or 0 for smoothing 1.
//
// torch: F.cross_entropy(x, target, weight, ignore_index=..., label_smoothing=..., reduction=...)
//
// Shapes: x is (N, C, d1, ..., dk). Memory traffic: the logits are read once from memory and the
// gradient is written once; later reads hit the cache.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "positions.h"
#include "vec.h"

namespace pyfused {

enum class Reduction { none = 0, mean = 1, sum = 2 };

struct CrossEntropyOptions {
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::mean;
  double label_smoothing = 0;
  double gamma = 0;
  double z_loss = 0;
  double scale = 1;
  bool normalized = false;  // the logits are log-probabilities: nll_loss
  std::optional<double> denominator;  // by default, the summed weight of valid targets
};

// One of each for each position, for class indices and a scale of 1: the results of row_terms.h,
// the first class with the largest logit, and whether it is the target. Where the position is
// ignored, they are 0, ignore_index and false. Where no logit is above -inf, or one is NaN or inf,
// lse is NaN and the others are undefined.
template <class A> struct Metrics {
  A *log_p, *lse;  // null if no metrics are computed
  int64_t* prediction;
  bool* correct;
  A* entropy;
};

template <class T> struct CrossEntropy : Positions, CrossEntropyOptions {
  using A = Accumulate<T>;
  View<const T> logits;
  const int64_t* target;  // a class index for each position; null for probabilities
  View<const T> probabilities;  // a distribution for each position
  const A* weight;  // one for each class; null for ones
  const A* grad_output;  // for each position with Reduction::none, else one; null for ones
  A* loss;  // for each position with Reduction::none, else one; null if not computed
  View<T> grad_logits;  // data is null if not computed
  View<T> grad_probabilities;  // data is null if not computed
  int threads;
  const A* token_weight = nullptr;  // one factor of the loss for each position; null for ones
  // Two numbers for each position, null if not computed: first the largest logit of each, before
  // the scale, then its first class, where NaN is the largest; the class is -1 where the position
  // is ignored. Only for rows of row_classes() contiguous classes.
  double* prediction = nullptr;
  Metrics<A> metrics = {};

  bool dense() const { return target == nullptr || label_smoothing > 0; }
  // Whether the loss and the gradients of a position are 0, whatever its logits are.
  bool ignored(int64_t position) const {
    return (target && target[position] == ignore_index) ||
           (token_weight && token_weight[position] == 0);
  }
};

// Returns the first position whose target is out of range, with nothing written, or -1.
template <class T> int64_t cross_entropy(const CrossEntropy<T>& ce);

// The negative log-likelihood of class indices, of log-probabilities x. The gradient's memory is
// dense. Memory traffic: one element of each position is read, and the gradient is written once.
//
//   loss = -weight_t x_t        dloss/dx_c = -weight_t [c = t]
//
// torch: F.nll_loss(x, target, weight, ignore_index=..., reduction=...)
template <class T> int64_t nll_loss(const CrossEntropy<T>& nll);

// The fewest contiguous classes for the row layout, for float, double, bfloat16 and float16.
std::array<int64_t, 4> row_classes();

}  // namespace pyfused
