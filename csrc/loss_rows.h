// The positions of a block of cross-entropy: their targets, losses and terms, for each layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cross_entropy.h"
#include "parallel.h"
#include "row_terms.h"

namespace pyfused {

// The arguments, and values that are computed once for the batch. Scalars of a position are
// doubles; only vectors are rounded to A.
template <class T> struct CrossEntropyBatch : CrossEntropy<T> {
  using A = Accumulate<T>;
  double weight_sum;  // sum_c weight_c
  double denominator;
  bool streams;  // gradients larger than the cache use non-temporal stores
  // The scale of the gradients, computed once if all positions share it: a division costs as much
  // as an exponential.
  double common_scale;
  double prob_weight, smooth_bias;  // w_c = weight_c (prob_weight y_c + smooth_bias)
  LossOptions options;

  CrossEntropyBatch(const CrossEntropy<T>& ce, double weight_sum, double denominator, bool streams)
      : CrossEntropy<T>(ce), weight_sum(weight_sum), denominator(denominator), streams(streams),
        common_scale((ce.grad_output ? double(*ce.grad_output) : 1) / denominator) {
    const double uniform = ce.label_smoothing / double(ce.classes), rest = 1 - ce.label_smoothing;
    const bool reads = !ce.target && rest > 0;
    const double smooth_weight = reads ? rest : uniform;
    // The sum of w_c (lse - x_c) of probabilities must not overflow unless the loss does. A power
    // of two moves from smooth_weight to w_c without rounding.
    const double unit = ce.target ? 1 : std::exp2(std::floor(std::log2(smooth_weight)));
    prob_weight = reads ? unit : 0;
    smooth_bias = (reads ? uniform / rest : 1) * unit;
    options = {ce.target ? rest : 0, smooth_weight / unit, ce.gamma, ce.z_loss};
  }

  bool has_position_scale() const {
    return this->token_weight || (this->grad_output && this->reduction == Reduction::none);
  }
  double row_scale(int64_t position) const {
    const bool each = this->grad_output && this->reduction == Reduction::none;
    const double scale = each ? double(this->grad_output[position]) / denominator : common_scale;
    return this->token_weight ? scale * double(this->token_weight[position]) : scale;
  }

  // Multiplies n losses by the token weights, and writes them with Reduction::none. Returns their
  // sum. Losses of ignored positions are 0.
  PYFUSED_NOINLINE double finish(int64_t first, int64_t n, double* loss) const {
    for (int64_t i = 0; this->token_weight && i < n; ++i) {
      loss[i] *= double(this->token_weight[first + i]);
    }
    for (int64_t i = 0; (this->target || this->token_weight) && i < n; ++i)
      loss[i] = this->ignored(first + i) ? 0 : loss[i];
    for (int64_t i = 0; this->loss && this->reduction == Reduction::none && i < n; ++i) {
      this->loss[first + i] = A(loss[i]);
    }
    return total<T>(loss, n);
  }
};

// At most kRows positions, of which a layout finds the pivots, sums and target logits.
template <class T, int64_t kRows> struct LossRows {
  using A = Accumulate<T>;
  using Lanes = double[kRows];
  bool any_ignored = false;
  int64_t label[kRows];  // -1 for a position that is ignored, or without a class index
  alignas(kVectorBytes) Lanes row_scale;
  alignas(kVectorBytes) Lanes target_weight;  // with gamma: times the focal factor
  alignas(kVectorBytes) Lanes slope;  // with gamma: target_weight times the factor's slope
  alignas(kVectorBytes) Lanes distance;  // sum_c w_c (lse - x_c), where it is dense
  alignas(kVectorBytes) Lanes weight_sum;  // sum_c w_c, where it is dense
  alignas(kVectorBytes) Lanes log_sum;
  alignas(kVectorBytes) Lanes loss;
  alignas(kVectorBytes) A target_logit[kRows];
  alignas(kVectorBytes) A a[kRows];
  alignas(kVectorBytes) A s[kRows];
  alignas(kVectorBytes) A at_target[kRows];

  // Finds the targets of n positions. Later lanes have none.
  void find_targets(const CrossEntropyBatch<T>& ce, int64_t first, int64_t n,
                    int64_t lanes = kRows) {
    std::fill_n(row_scale, lanes, ce.common_scale);
    for (int64_t i = 0; ce.has_position_scale() && i < n; ++i)
      row_scale[i] = ce.row_scale(first + i);
    std::fill_n(label, lanes, -1);
    int64_t ignored = 0;
    for (int64_t i = 0; ce.target && i < n; ++i) label[i] = ce.target[first + i];
    for (int64_t i = 0; i < n; ++i) ignored += ce.ignored(first + i);
    any_ignored = ignored > 0;
    for (int64_t i = 0; any_ignored && i < n; ++i) label[i] = ce.ignored(first + i) ? -1 : label[i];
    for (int64_t i = 0; i < lanes; ++i) target_weight[i] = label[i] < 0 ? 0 : 1;
    for (int64_t i = 0; ce.weight && i < n; ++i) {
      if (label[i] >= 0) target_weight[i] = double(ce.weight[label[i]]);
    }
    std::fill_n(target_logit, lanes, A(0));
    if (ce.dense()) std::fill_n(weight_sum, lanes, ce.weight_sum);
  }

  template <class S> PYFUSED_INLINE void find_log_sums(const S* sum, int64_t n) {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) log_sum[i] = log_positive(double(sum[i]));
  }

  // Called once for each position, where there is a gamma.
  void add_focal_factor(const CrossEntropyBatch<T>& ce, int64_t i, A pivot) {
    const FocalFactors focal(ce.gamma, log_sum[i] + double(pivot - target_logit[i]));
    slope[i] = target_weight[i] * focal.slope;
    target_weight[i] *= focal.loss;
  }

  // kDense: without smoothing or probabilities, w is 0.
  template <bool kDense>
  PYFUSED_INLINE RowTerms find_terms(const LossOptions& options, const double* slope, int64_t i,
                                     A pivot, double sum, double lse, double scale) {
    const double weights = kDense ? weight_sum[i] : 0;
    const ResultGradients g = cross_entropy_gradients(options, slope[i], weights, lse);
    const RowTerms terms = row_terms(g, sum, 0, row_scale[i] * scale);
    const double e = double(exp_shifted(target_logit[i] - pivot));
    at_target[i] = A(terms.at_target(e, 0, target_weight[i]));
    return terms;
  }

  // The terms of all positions, from their log_sum.
  template <class S>
  void find_terms(const CrossEntropyBatch<T>& ce, int64_t n, const A* pivot, const S* sum) {
    for (int64_t i = 0; ce.gamma > 0 && i < n; ++i) {
      if (label[i] >= 0) add_focal_factor(ce, i, pivot[i]);
    }
    const double* const slopes = ce.gamma > 0 ? slope : target_weight;
    ce.dense() ? find_all_terms<true>(ce, ce.options, slopes, pivot, sum)
               : find_all_terms<false>(ce, {1, 0, ce.gamma, ce.z_loss}, slopes, pivot, sum);
  }

  template <bool kDense, class S>
  PYFUSED_INLINE void find_all_terms(const CrossEntropyBatch<T>& ce, const LossOptions options,
                                     const double* slopes, const A* pivot, const S* sum) {
    const double scale = ce.scale;
    PYFUSED_SIMD()
    for (int64_t i = 0; i < kRows; ++i) {
      const double lse = double(pivot[i]) + log_sum[i];
      const RowTerms terms =
          find_terms<kDense>(options, slopes, i, pivot[i], double(sum[i]), lse, scale);
      a[i] = A(terms.a);
      if (kDense) s[i] = A(terms.s);
    }
  }

  // Writes the metrics of n positions, from their log_sum and the first class with the largest
  // logit of each.
  template <class S, class I>
  PYFUSED_NOINLINE void write_metrics(const CrossEntropyBatch<T>& ce, int64_t first, int64_t n,
                                      const A* pivot, const S* sum, const S* weighted,
                                      const I* index) const {
    using Limits = std::numeric_limits<double>;
    const Metrics<A> to = ce.metrics;
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      const double high = double(pivot[i]), total = double(sum[i]);
      const RowResults row(high, total, log_sum[i], double(weighted[i]), double(target_logit[i]));
      const bool finite = std::abs(high) < Limits::infinity() && total < Limits::infinity();
      const bool ignored = label[i] < 0;
      to.log_p[first + i] = ignored ? A(0) : A(row.log_p);
      to.entropy[first + i] = ignored ? A(0) : A(row.entropy);
      to.lse[first + i] = ignored ? A(0) : A(finite ? row.lse : Limits::quiet_NaN());
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t prediction = int64_t(index[i]);
      to.prediction[first + i] = label[i] < 0 ? ce.ignore_index : prediction;
      to.correct[first + i] = prediction == label[i];
    }
  }

  PYFUSED_INLINE void find_losses(const CrossEntropyBatch<T>& ce, int64_t n, const A* pivot) {
    const LossOptions options = ce.options;
    const bool dense = ce.dense();
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      loss[i] = cross_entropy_loss(options, target_weight[i], double(target_logit[i] - pivot[i]),
                                   dense ? distance[i] : 0, log_sum[i], double(pivot[i]));
    }
  }
};

}  // namespace pyfused
