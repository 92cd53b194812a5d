// Cross-entropy of class indices with short rows: groups of rows, vectors along classes.
#pragma once

#include <algorithm>

#include "loss_rows.h"
#include "row_groups.h"
#include "rows.h"

namespace pyfused {

#ifdef PYFUSED_HAS_REGISTERS
template <class T> class CrossEntropyGroup : RowGroup<T> {
  using Base = RowGroup<T>;
  using Base::classes, Base::width, Base::first, Base::n, Base::max, Base::sum, Base::e;
  using Base::weighted, Base::index;

 public:
  using Base::rows;

  CrossEntropyGroup(const CrossEntropyBatch<T>& ce, int64_t first)
      : Base(ce.classes, first, std::min(rows(ce.classes), ce.positions() - first)), ce(ce) {}

  double run() {
    const auto logits = Base::rows_of(ce.logits);
    if (ce.metrics.lse) Base::template find_normalizer<true, true>(logits);
    else if (ce.grad_logits.data) Base::template find_normalizer<true>(logits);
    else Base::template find_normalizer<false>(logits);
    of.find_targets(ce, first, n);
    for (int64_t r = 0; r < n; ++r) {
      if (of.label[r] >= 0) of.target_logit[r] = widen(logits.row[r * logits.stride + of.label[r]]);
    }
    of.find_log_sums(sum, kSquare);
    if (ce.metrics.lse) of.write_metrics(ce, first, n, max, sum, weighted, index);
    of.find_terms(ce, n, max, sum);
    of.find_losses(ce, kSquare, max);
    T* grad = ce.grad_logits.data ? ce.at(ce.grad_logits, first) : nullptr;
    for (int64_t r = 0; grad && r < n; ++r, grad += ce.grad_logits.inner) write_gradient(r, grad);
    return ce.finish(first, n, of.loss);
  }

 private:
  const CrossEntropyBatch<T>& ce;
  LossRows<T, kSquare> of;

  void write_gradient(int64_t r, T* grad) {
    if (of.label[r] < 0) return void(std::fill_n(grad, classes, T{}));
    const float* const kept = e + r * width;
    const float a = of.a[r];
    Base::for_registers([&](int64_t c, auto mask) {
      PYFUSED_PREFETCH(grad + c + kPrefetchDistance<T>);
      store_row(row_of_tile(kept + c) * a, grad + c, mask);
    });
    grad[of.label[r]] = narrow<T>(of.at_target[r]);
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
