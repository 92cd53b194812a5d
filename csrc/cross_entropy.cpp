// Checks the targets, runs blocks of positions in parallel in one of two layouts, and adds the
// losses up in a fixed order.
#include "cross_entropy.h"

#include <algorithm>
#include <vector>

#include "cross_entropy_columns.h"
#include "cross_entropy_rows.h"
#include "memory.h"
#include "parallel.h"
#include "target_statistics.h"

namespace pyfused {

// The sum of the losses, in blocks of so many positions.
template <class Block, class T>
double sum_of_blocks(const CrossEntropyBatch<T>& batch, int64_t positions) {
  const int64_t blocks = (batch.positions() + positions - 1) / positions;
  std::vector<double> partial(blocks);
  parallel_for_with<Block>(blocks, batch.threads, [&](int64_t block, auto workspace) {
    partial[block] = workspace.make(batch, block * positions).run();
  });
  return total<T>(partial.data(), blocks);
}

template <class T> int64_t cross_entropy(const CrossEntropy<T>& ce) {
  const FlushSubnormals flush;
  using A = Accumulate<T>;
  const TargetStatistics statistics = target_statistics(ce);
  if (statistics.out_of_range >= 0) return statistics.out_of_range;
  const bool mean = ce.reduction == Reduction::mean, each = ce.reduction == Reduction::none;
  const double denominator = mean ? ce.denominator.value_or(statistics.denominator) : 1;
  const size_t bytes = size_t(ce.positions() * ce.classes) * sizeof(T);
  Sum weights;
  for (int64_t c = 0; ce.weight && c < ce.classes; ++c) weights.add(ce.weight[c]);
  const double uniform_sum = ce.uniform() * (ce.weight ? weights.value() : double(ce.classes));
  const bool rows = ce.logits.classes == 1 && ce.classes >= kRowClasses<T> &&
                    (!ce.grad_logits.data || ce.grad_logits.classes == 1);
  T* const grad = ce.grad_logits.data;
  bool streams = bytes >= kStreamBytes;
  if (streams && rows) streams = grad != ce.logits.data && has_pages(grad, bytes);
  const CrossEntropyBatch<T> batch(ce, uniform_sum, denominator, streams);

  using Wide = CrossEntropyColumns<T, 128, kFewClasses>;
  using Tall = CrossEntropyColumns<T, 32, 128>;
  double loss;
  if (rows && ce.scale == 1) {
    loss = sum_of_blocks<RowBlock<T, false>>(batch, rows_of_block(ce.classes));
  } else if (rows) {
    loss = sum_of_blocks<RowBlock<T, true>>(batch, rows_of_block(ce.classes));
  } else if (ce.classes <= kFewClasses) {
    loss = sum_of_blocks<Wide>(batch, Wide::kPositions);
  } else {
    loss = sum_of_blocks<Tall>(batch, Tall::kPositions);
  }
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
