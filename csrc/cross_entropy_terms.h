// The equations and the arguments of cross-entropy.
//
//   lse     = log sum_c exp(x_c) = max + log sum_c exp(x_c - max)
//   q_c     = smooth_weight weight_c (prob_weight y_c + smooth_bias) + one_hot [c = target]
//   loss    = sum_c q_c (lse - x_c)
//   dloss/dx_c = p_c sum_k q_k - q_c,    p_c = exp(x_c - lse)
//   dloss/dy_c = smooth_weight prob_weight weight_c (lse - x_c)
//
// q is the soft target, p the softmax. The coefficients are
//
//                  smooth_weight  prob_weight  smooth_bias                    one_hot
//   class indices  smoothing / C  0            1                              (1 - smoothing) w_t
//   probabilities  1 - smoothing  1            smoothing / C / smooth_weight  0
//   smoothing 1    1 / C          0            1                              0
//
// The last line is for probabilities with smoothing 1.
//
// With a scale, x is scale times the logits, whose gradient is scale dloss/dx.
//
// z_loss adds z_loss lse^2 to the loss, and 2 z_loss lse p_c to dloss/dx_c.
//
// Focal loss (class indices without smoothing): with nll = lse - x_t and p = exp(-nll), the loss
// is weight_t (1 - p)^gamma nll, and the gradients are those above times
//   (1 - p)^gamma + gamma (1 - p)^(gamma - 1) p nll
//
// smooth_weight multiplies sums in double; rounded to a float, it would bias all terms alike.
//
// torch: F.cross_entropy(x, target, weight, ignore_index=..., label_smoothing=..., reduction=...)
//
// Shapes: x is (N, C, d1, ..., dk). Memory traffic: the logits are read once from memory and the
// gradient is written once; later reads hit the cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "parallel.h"
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
  bool normalized = false;            // the logits are log-probabilities: nll_loss
  int64_t token_weight = 0;           // address of one A for each position; 0 for ones
  std::optional<double> denominator;  // by default, the summed weight of valid targets
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

  const A* token_weights = reinterpret_cast<const A*>(token_weight);  // factors of the losses
  bool dense() const { return target == nullptr || label_smoothing > 0; }
  double uniform() const { return label_smoothing / double(this->classes); }
  bool follows_probabilities() const { return !target && label_smoothing < 1; }
  double smooth_weight() const { return follows_probabilities() ? 1 - label_smoothing : uniform(); }
  A prob_weight() const { return A(follows_probabilities()); }
  A smooth_bias() const { return follows_probabilities() ? A(uniform() / smooth_weight()) : A(1); }
  // Whether the loss and the gradients of a position are 0, whatever its logits are.
  bool ignored(int64_t position) const {
    return (target && target[position] == ignore_index) ||
           (token_weights && token_weights[position] == 0);
  }
  double one_hot(int64_t position) const {
    return weight ? (1 - label_smoothing) * double(weight[target[position]]) : 1 - label_smoothing;
  }
  double target_q(int64_t position) const {  // q at the target class
    const double one = weight ? double(weight[target[position]]) : 1;
    return label_smoothing > 0 ? uniform() * one + one_hot(position)
                               : one_hot(position);  // 0 * inf is NaN
  }
};

// The arguments, and values that are computed once for the batch. Scalars of a position are
// doubles; only vectors are rounded to A.
template <class T> struct CrossEntropyBatch : CrossEntropy<T> {
  double uniform_sum;  // uniform * sum_c weight_c
  double denominator;
  // The scale of the gradients, computed once if all positions share it: a division costs as much
  // as an exponential.
  double common_scale;
  bool streams;  // gradients larger than the cache use non-temporal stores

  CrossEntropyBatch(const CrossEntropy<T>& ce, double uniform_sum, double denominator, bool streams)
      : CrossEntropy<T>(ce), uniform_sum(uniform_sum), denominator(denominator),
        common_scale((ce.grad_output ? double(*ce.grad_output) : 1) / denominator),
        streams(streams) {}

  bool has_position_scale() const {
    return this->token_weights || (this->grad_output && this->reduction == Reduction::none);
  }
  double row_scale(int64_t position) const {
    const bool each = this->grad_output && this->reduction == Reduction::none;
    const double scale = each ? double(this->grad_output[position]) / denominator : common_scale;
    return this->token_weights ? scale * double(this->token_weights[position]) : scale;
  }

  // Multiplies n losses by the token weights, and writes them with Reduction::none. Returns their
  // sum. Losses of ignored positions are 0.
  PYFUSED_NOINLINE double finish(int64_t first, int64_t n, double* loss) const {
    for (int64_t i = 0; this->token_weights && i < n; ++i) {
      loss[i] *= double(this->token_weights[first + i]);
    }
    for (int64_t i = 0; (this->target || this->token_weights) && i < n; ++i)
      loss[i] = this->ignored(first + i) ? 0 : loss[i];
    for (int64_t i = 0; this->loss && this->reduction == Reduction::none && i < n; ++i) {
      this->loss[first + i] = Accumulate<T>(loss[i]);
    }
    return total<T>(loss, n);
  }
};

// The factors of the focal loss and of its gradients.
struct FocalFactors {
  double loss = 1, gradient = 1;

  FocalFactors() = default;
  FocalFactors(double gamma, double nll) {
    nll = nll < 0 ? 0 : nll;  // rounding can make it negative
    const double complement = -std::expm1(-nll), p = 1 - complement;
    loss = std::pow(complement, gamma);
    const double ratio = complement > 0 ? nll / complement : 1;
    gradient = loss * (1 + (p > 0 ? gamma * p * ratio : 0));  // 0 * inf is NaN
  }
};

// q_c / smooth_weight without the one-hot term.
template <class A>
PYFUSED_INLINE A soft_target(A weight, A probability, A prob_weight, A smooth_bias) {
  return weight * (prob_weight * probability + smooth_bias);
}

}  // namespace pyfused
