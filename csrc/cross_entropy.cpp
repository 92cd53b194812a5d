// Checks the targets, runs blocks of positions in parallel in one of two layouts, and adds the
// losses up in a fixed order.
#include "cross_entropy.h"

#include <algorithm>
#include <limits>

#include "cross_entropy_columns.h"
#include "cross_entropy_groups.h"
#include "cross_entropy_rows.h"
#include "memory.h"
#include "parallel.h"
#include "target_statistics.h"

namespace pyfused {

// Returns the sum of the losses, computed in blocks of `positions`.
template <class Block, class T>
double sum_in_blocks(const CrossEntropyBatch<T>& batch, int64_t positions) {
  const auto run = [&](int64_t first, int64_t, auto workspace) {
    return workspace.make(batch, first).run();
  };
  return sum_of_blocks<T, Block>(batch.positions(), positions, batch.threads, run);
}

// Returns the sum of the losses, computed in the fastest layout.
template <class T> double sum_of_losses(const CrossEntropyBatch<T>& batch, bool rows) {
  using Wide = CrossEntropyColumns<T, kWide, kFewClasses>;
  using Tall = CrossEntropyColumns<T, kNarrow, 128>;
#ifdef PYFUSED_HAS_REGISTERS
  if constexpr (kTransposes<T>) {
    using Group = CrossEntropyGroup<T>;
    if (takes_groups(batch)) return sum_in_blocks<Group>(batch, Group::rows(batch.classes));
  }
#endif
  if (rows && batch.scale == 1) {
    return sum_in_blocks<RowBlock<T, true>>(batch, rows_of_block(batch.classes));
  }
  if (rows) return sum_in_blocks<RowBlock<T, false>>(batch, rows_of_block(batch.classes));
  const bool wide = batch.classes <= kFewClasses || classes_of_line(batch) > 1;
  return wide ? sum_in_blocks<Wide>(batch, Wide::positions_of_block(batch))
              : sum_in_blocks<Tall>(batch, Tall::positions_of_block(batch));
}

template <class T> int64_t cross_entropy(const CrossEntropy<T>& ce) {
  const FlushSubnormals flush;
  using A = Accumulate<T>;
  const TargetStatistics statistics = target_statistics(ce);
  if (statistics.out_of_range >= 0) return statistics.out_of_range;
  const bool mean = ce.reduction == Reduction::mean, each = ce.reduction == Reduction::none;
  double denominator = mean ? ce.denominator.value_or(statistics.denominator) : 1;
  if (denominator == 0) denominator = std::numeric_limits<double>::quiet_NaN();  // as torch's mean
  const size_t bytes = size_t(ce.positions() * ce.classes) * sizeof(T);
  Sum weights;  // for 50,000 classes this takes half as long as a row
  if (ce.weight && ce.label_smoothing > 0) {
    add_terms<A>(weights, ce.classes, [&](int64_t c) { return ce.weight[c]; });
  }
  const double weight_sum = ce.weight ? weights.value() : double(ce.classes);
  const bool rows = ce.logits.classes == 1 && ce.classes >= kRowClasses<T> &&
                    (!ce.grad_logits.data || ce.grad_logits.classes == 1);
  T* const grad = ce.grad_logits.data;
  bool streams = bytes >= kStreamBytes;
  if (streams && rows) streams = grad != ce.logits.data && has_pages(grad, bytes);
  const CrossEntropyBatch<T> batch(ce, weight_sum, denominator, streams);
  const double loss = sum_of_losses(batch, rows);
  if (ce.loss && !each) *ce.loss = A(loss / denominator);
  return -1;
}

std::array<int64_t, 4> row_classes() {
  return {kRowClasses<float>, kRowClasses<double>, kRowClasses<bfloat16>, kRowClasses<float16>};
}

template int64_t cross_entropy(const CrossEntropy<float>&);
template int64_t cross_entropy(const CrossEntropy<double>&);
template int64_t cross_entropy(const CrossEntropy<bfloat16>&);
template int64_t cross_entropy(const CrossEntropy<float16>&);

}  // namespace pyfused
