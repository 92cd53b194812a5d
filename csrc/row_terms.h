// The equation of a loss over a row of logits x with the class index t.
//
// The state of a row, relative to a pivot near its largest logit, with e_c = exp(x_c - pivot):
//
//   sum      = sum_c e_c                     lse     = log sum_c exp(x_c) = pivot + log(sum)
//   weighted = sum_c e_c (x_c - pivot)       entropy = log(sum) - weighted / sum
//   log_p    = x_t - lse                     smooth  = sum_c w_c (x_c - pivot)
//
// In smooth, an infinite pivot is replaced by 0.
//
// A loss is a function of log_p, entropy, lse and smooth, which are called results. With g_log_p,
// g_entropy, g_lse and g_smooth, its derivatives by these, the gradient is
//
//   dx_c = e_c (a + b (x_c - pivot)) - s w_c - t [c = target]
//   a    = (g_lse - g_log_p + g_entropy weighted / sum) / sum
//   b    = -g_entropy / sum
//   s    = -g_smooth
//   t    = -g_log_p
//
// Cross-entropy:
//
//   loss   = one_hot F(-log_p) + smooth_weight sum_c w_c (lse - x_c) + z_loss lse^2
//   F(nll) = (1 - exp(-nll))^gamma nll
//
//                  smooth_weight  w_c                                         one_hot
//   class indices  smoothing / C  weight_c                                    (1 - smoothing) w_t
//   probabilities  1 - smoothing  weight_c (y_c + smoothing/C/smooth_weight)  0
//   smoothing 1    1 / C          weight_c                                    0
//
// The last line is for probabilities y with smoothing 1. For probabilities, a power of two is moved
// from smooth_weight to w_c.
// smooth_weight multiplies sums in double; rounded to a float, it would bias all terms alike.
#pragma once

#include <cmath>

#include "vec.h"

namespace pyfused {

struct RowResults {
  double log_p, entropy, lse;

  // Rounding could make log_p positive or the entropy negative; NaN is kept.
  PYFUSED_INLINE RowResults(double pivot, double sum, double log_sum, double weighted,
                            double target_logit) {
    log_p = (target_logit - pivot) - log_sum;
    log_p = log_p > 0 ? 0 : log_p;
    entropy = log_sum - weighted / sum;
    entropy = entropy < 0 ? 0 : entropy;
    lse = pivot + log_sum;
  }
};

// The derivatives of a loss by the results of a row.
struct ResultGradients {
  double log_p, entropy, lse, smooth;
};

struct RowTerms {
  double a, b, s, t;

  // dx at the target, with shifted = x_t - pivot, e = exp(shifted) and the weight w_t.
  PYFUSED_INLINE double at_target(double e, double shifted, double weight) const {
    const double rise = b == 0 || e == 0 ? 0 : b * shifted;  // 0 * inf is NaN
    return e * (a + rise) - (s == 0 ? 0 : s * weight) - t;
  }
};

// The terms of the gradient times a scale.
PYFUSED_INLINE RowTerms row_terms(const ResultGradients& g, double sum, double weighted,
                                  double scale) {
  const double by = scale / sum, dlse = g.lse - g.log_p;
  if (g.entropy == 0) return {dlse * by, 0, -g.smooth * scale, -g.log_p * scale};
  return {(dlse + g.entropy * weighted / sum) * by, -g.entropy * by, -g.smooth * scale,
          -g.log_p * scale};
}

struct LossOptions {
  double hard, smooth_weight, gamma, z_loss;  // one_hot is hard times the target's weight
};

// w_c, with prob_weight 0 for class indices and for smoothing 1, else a power of two.
template <class A>
PYFUSED_INLINE A soft_target(A weight, A probability, A prob_weight, A smooth_bias) {
  return weight * (prob_weight * probability + smooth_bias);
}

// The factors of the focal loss and of its derivative.
struct FocalFactors {
  double loss, slope;

  FocalFactors(double gamma, double nll) {
    nll = nll < 0 ? 0 : nll;  // rounding can make it negative
    const double complement = -std::expm1(-nll), p = 1 - complement;
    loss = std::pow(complement, gamma);
    const double ratio = complement > 0 ? nll / complement : 1;
    slope = loss * (1 + (p > 0 ? gamma * p * ratio : 0));  // 0 * inf is NaN
  }
};

// weight_t includes the focal factor. shifted = x_t - pivot; distance = sum_c w_c (lse - x_c).
PYFUSED_INLINE double cross_entropy_loss(const LossOptions& options, double weight_t,
                                         double shifted, double distance, double log_sum,
                                         double pivot) {
  const double lse = pivot + log_sum;
  return options.hard * weight_t * (log_sum - shifted) + options.smooth_weight * distance +
         options.z_loss * lse * lse;
}

// slope is weight_t times the derivative of F.
PYFUSED_INLINE ResultGradients cross_entropy_gradients(const LossOptions& options, double slope,
                                                       double weight_sum, double lse) {
  return {-options.hard * slope, 0, options.smooth_weight * weight_sum + 2 * options.z_loss * lse,
          -options.smooth_weight};
}

}  // namespace pyfused
