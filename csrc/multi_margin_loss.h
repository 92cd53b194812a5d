// The hinge of each class that comes within a margin of the target's, as in a multi-class SVM.
//
//   z_c  = max(0, margin - x_t + x_c)
//   loss = weight_t / C sum_{c != t} z_c^p,    p = 1 or 2
//   dloss/dx_c = weight_t / C p z_c^(p - 1) [z_c > 0],    dloss/dx_t = -(the sum of these)
//
// torch: F.multi_margin_loss(x, target, p=..., margin=..., weight=..., reduction=...)
//
// Shapes: x is (N, C), dense. Bytes: it is read once from memory and the gradient written once.
#pragma once

#include <algorithm>
#include <vector>

#include "cross_entropy_terms.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"

namespace pyfused {

template <class T> struct MultiMargin {
  using A = Accumulate<T>;
  int64_t rows, classes;
  const T* input;
  const int64_t* target;
  const A* weight;  // one a class, or null for ones
  bool squared;     // p = 2
  double margin;
  Reduction reduction;
  const A* grad_output;  // the loss's gradient: one a row for none, else one; null for ones
  A* loss;            // one a row for none, else one; null where not wanted
  T* grad_input;      // null where not wanted
  int threads;
};

// The loss of a row, and its gradient times `scale`.
template <class T> double multi_margin_row(const MultiMargin<T>& mm, int64_t row, double scale) {
  using A = Accumulate<T>;
  alignas(kVectorBytes) A buffer[kChunk];
  const T* const input = mm.input + row * mm.classes;
  T* const gradient = mm.grad_input ? mm.grad_input + row * mm.classes : nullptr;
  const int64_t label = mm.target[row];
  const bool squared = mm.squared;
  const A slack = A(mm.margin) - widen(input[label]);
  const double share = (mm.weight ? double(mm.weight[label]) : 1) / double(mm.classes);
  const A factor = A((squared ? 2 : 1) * share * scale);
  Sum losses, slopes;
  for_parts(mm.classes, [&](int64_t, int64_t first, int64_t n) {
    const A* const x = widened(input + first, buffer, n);
    // The target's own is the margin's, which goes below. NaN counts for nothing, as in torch.
    const auto z = [=](int64_t i) { return slack + x[i] > 0 ? slack + x[i] : A(0); };
    if (squared) add_terms<A>(losses, n, [=](int64_t i) { return z(i) * z(i); });
    else add_terms<A>(losses, n, z);
    if (!gradient) return;
    const auto slope = [=](int64_t i) { return squared ? z(i) : slack + x[i] > 0 ? A(1) : A(0); };
    add_terms<A>(slopes, n, slope);
    for (int64_t i = 0; i < n; ++i) buffer[i] = slope(i) * factor;
    store(buffer, gradient + first, n);
  });
  const A own = slack + widen(input[label]);
  const double most = own > 0 ? double(own) : 0;
  if (gradient) {
    const double others = slopes.value() - (squared ? most : double(own > 0));
    gradient[label] = narrow<T>(A(-others * double(factor)));
  }
  return share * (losses.value() - (squared ? most * most : most));
}

// Returns the first row whose target is out of range, with nothing written, or -1.
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

}  // namespace pyfused
