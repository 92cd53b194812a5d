#include "multi_margin_loss.h"

#include <algorithm>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "rows.h"

namespace pyfused {

// Returns the loss of a row, and writes its gradient times `scale`.
template <class T> double multi_margin_row(const MultiMargin<T>& mm, int64_t row, double scale) {
  using A = Accumulate<T>;
  alignas(kVectorBytes) A buffer[kChunk];
  const T* const input = mm.input + row * mm.classes;
  T* const gradient = mm.grad_input ? mm.grad_input + row * mm.classes : nullptr;
  const int64_t label = mm.target[row];
  const bool squared = mm.squared;
  const A slack = A(mm.margin) - widen(input[label]);
  const double row_weight = (mm.weight ? double(mm.weight[label]) : 1) / double(mm.classes);
  const A factor = A((squared ? 2 : 1) * row_weight * scale);
  Sum losses, slopes;
  for_chunks(mm.classes, [&](int64_t, int64_t first, int64_t n) {
    const A* const x = widened(input + first, buffer, n);
    // The target's own z is the margin. It is subtracted below. NaN counts as 0, as in torch.
    const auto z = [=](int64_t i) { return slack + x[i] > 0 ? slack + x[i] : A(0); };
    if (squared) add_terms<A>(losses, n, [=](int64_t i) { return z(i) * z(i); });
    else add_terms<A>(losses, n, z);
    if (!gradient) return;
    const auto slope = [=](int64_t i) { return squared ? z(i) : slack + x[i] > 0 ? A(1) : A(0); };
    add_terms<A>(slopes, n, slope);
    for (int64_t i = 0; i < n; ++i) buffer[i] = slope(i) * factor;
    store(buffer, gradient + first, n);
  });
  const A target_slack = slack + widen(input[label]);
  const double target_z = target_slack > 0 ? double(target_slack) : 0;
  if (gradient) {
    const double slope_sum = slopes.value() - (squared ? target_z : double(target_slack > 0));
    gradient[label] = narrow<T>(A(-slope_sum * double(factor)));
  }
  return row_weight * (losses.value() - (squared ? target_z * target_z : target_z));
}

template <class T> int64_t multi_margin_loss(const MultiMargin<T>& mm) {
  using A = Accumulate<T>;
  for (int64_t row = 0; row < mm.rows; ++row) {
    if (uint64_t(mm.target[row]) >= uint64_t(mm.classes)) return row;
  }
  const bool each = mm.reduction == Reduction::none;
  const double denominator = mm.reduction == Reduction::mean ? double(mm.rows) : 1;
  const int64_t size = rows_of_block(mm.classes), blocks = (mm.rows + size - 1) / size;
  std::vector<double> partial(blocks);
  parallel_for(blocks, mm.threads, [&](int64_t block) {
    Sum sum;
    const int64_t end = std::min(mm.rows, (block + 1) * size);
    for (int64_t row = block * size; row < end; ++row) {
      const double grad_output = mm.grad_output ? double(mm.grad_output[each ? row : 0]) : 1;
      const double loss = multi_margin_row(mm, row, grad_output / denominator);
      if (mm.loss && each) mm.loss[row] = A(loss);
      sum.add(loss);
    }
    partial[block] = sum.value();
  });
  if (mm.loss && !each) *mm.loss = A(total<T>(partial.data(), blocks) / denominator);
  return -1;
}

template int64_t multi_margin_loss(const MultiMargin<float>&);
template int64_t multi_margin_loss(const MultiMargin<double>&);
template int64_t multi_margin_loss(const MultiMargin<bfloat16>&);
template int64_t multi_margin_loss(const MultiMargin<float16>&);

}  // namespace pyfused
