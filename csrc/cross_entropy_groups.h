// Cross-entropy of class indices with short rows: groups of rows, vectors along classes.
#pragma once

#include <algorithm>

#include "cross_entropy_terms.h"
#include "parallel.h"
#include "row_groups.h"
#include "rows.h"

namespace pyfused {

#ifdef PYFUSED_HAS_REGISTERS
template <class T> class CrossEntropyGroup : RowGroup<T> {
  using Base = RowGroup<T>;
  using Base::classes, Base::width, Base::first, Base::n, Base::max, Base::sum, Base::e;

 public:
  using Base::rows;

  CrossEntropyGroup(const CrossEntropyBatch<T>& ce, int64_t first)
      : Base(ce.classes, first, std::min(rows(ce.classes), ce.positions() - first)), ce(ce) {}

  double run() {
    const auto logits = Base::rows_of(ce.logits);
    ce.grad_logits.data ? Base::template find_normalizer<true>(logits)
                        : Base::template find_normalizer<false>(logits);
    read_targets(logits.row, logits.stride);
    find_loss();
    T* grad = ce.grad_logits.data ? ce.at(ce.grad_logits, first) : nullptr;
    for (int64_t r = 0; grad && r < n; ++r, grad += ce.grad_logits.inner) write_gradient(r, grad);
    return ce.finish(first, n, loss);
  }

 private:
  const CrossEntropyBatch<T>& ce;
  double one_hot[kSquare], scale[kSquare], loss[kSquare];
  float target_logit[kSquare];
  float factor[kSquare];     // multiplies exp(x - max) in the gradient
  float at_target[kSquare];  // the gradient at the target

  void read_targets(const T* x, int64_t stride) {
    for (int r = 0; r < kSquare; ++r) {
      target_logit[r] = max[r];
      one_hot[r] = 0;
      scale[r] = ce.common_scale;
    }
    for (int64_t r = 0; r < n; ++r, x += stride) {
      if (ce.ignored(first + r)) continue;
      target_logit[r] = widen(x[ce.target[first + r]]);
      one_hot[r] = ce.weight ? ce.one_hot(first + r) : 1;
      if (ce.has_position_scale()) scale[r] = ce.row_scale(first + r);
    }
  }

  void find_loss() {
    double log_sum[kSquare], target_sum[kSquare], target_q[kSquare];
    PYFUSED_SIMD()
    for (int r = 0; r < kSquare; ++r) {
      log_sum[r] = log_positive(double(sum[r]));
      loss[r] = one_hot[r] * (log_sum[r] + double(max[r] - target_logit[r]));
      target_sum[r] = target_q[r] = one_hot[r];
    }
    for (int64_t r = 0; (ce.gamma > 0 || ce.z_loss > 0) && r < n; ++r) {
      if (ce.ignored(first + r)) continue;
      const double lse = double(max[r]) + log_sum[r];
      if (ce.gamma > 0) {
        const FocalFactors focal(ce.gamma, log_sum[r] + double(max[r] - target_logit[r]));
        loss[r] *= focal.loss;
        target_sum[r] = target_q[r] = one_hot[r] * focal.gradient;
      }
      if (ce.z_loss > 0) {
        loss[r] += ce.z_loss * lse * lse;
        target_sum[r] += 2 * ce.z_loss * lse;
      }
    }
    PYFUSED_SIMD()
    for (int r = 0; r < kSquare; ++r) {
      const double by = target_sum[r] * scale[r] / double(sum[r]);
      const double p = double(exp_shifted(target_logit[r] - max[r]));
      factor[r] = float(by);
      at_target[r] = float(p * by - target_q[r] * scale[r]);
    }
  }

  void write_gradient(int64_t r, T* grad) {
    const int64_t position = first + r;
    if (ce.ignored(position)) return void(std::fill_n(grad, classes, T{}));
    const float* const kept = e + r * width;
    const float by = factor[r];
    Base::for_registers([&](int64_t c, auto mask) {
      PYFUSED_PREFETCH(grad + c + kPrefetchDistance<T>);
      store_row(row_of_tile(kept + c) * by, grad + c, mask);
    });
    grad[ce.target[position]] = narrow<T>(at_target[r]);
  }
};

constexpr int64_t kFewGrouped = 48;

// Fewer classes would leave lanes idle; more classes use the row layout.
template <class T> bool takes_groups(const CrossEntropy<T>& ce) {
  return ce.target && !ce.dense() && ce.scale == 1 && ce.outer == 1 && ce.logits.classes == 1 &&
         (!ce.grad_logits.data || ce.grad_logits.classes == 1) && ce.classes > kFewGrouped &&
         ce.classes < kRowClasses<T> && ce.classes <= kGroupClasses;
}
#endif

}  // namespace pyfused
