#include "multi_margin_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "rows.h"
#include "target_statistics.h"

namespace pyfused {

// The number of elements of a row, rounded up to whole vectors.
template <class A> int64_t whole_vectors(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Returns the loss of a row, and writes its gradient times `scale`.
template <class T> double multi_margin_row(const MultiMargin<T>& mm, int64_t row, double scale) {
  using A = Accumulate<T>;
  alignas(kVectorBytes) A z[kChunk];
  const T* const input = mm.input + row * mm.classes;
  T* const gradient = mm.grad_input ? mm.grad_input + row * mm.classes : nullptr;
  const int64_t label = mm.target[row];
  const bool squared = mm.squared;
  const A slack = A(mm.margin) - widen(input[label]);
  const double row_weight = (mm.weight ? double(mm.weight[label]) : 1) / double(mm.classes);
  const A factor = A((squared ? 2 : 1) * row_weight * scale);
  Sum losses, slopes;
  for_chunks(mm.classes, [&](int64_t, int64_t first, int64_t n) {
    const A* const x = widened(input + first, z, n);
    for (int64_t i = 0; i < n; ++i) z[i] = slack + x[i] > 0 ? slack + x[i] : A(0);  // 0 for NaN
    if (first <= label && label < first + n) z[label - first] = 0;
    if (squared) add_terms<A>(losses, n, [&](int64_t i) { return z[i] * z[i]; });
    else add_terms<A>(losses, n, [&](int64_t i) { return z[i]; });
    if (!gradient) return;
    const auto slope = [&](int64_t i) { return squared ? z[i] : z[i] > 0 ? A(1) : A(0); };
    add_terms<A>(slopes, n, slope);
    for (int64_t i = 0; i < n; ++i) z[i] = slope(i) * factor;
    store(z, gradient + first, n);
  });
  if (gradient) gradient[label] = narrow<T>(A(-slopes.value() * double(factor)));
  return row_weight * losses.value();
}

// The same for a row with several targets. `x` and `slopes` have room for a row in whole vectors.
template <class T>
double multilabel_margin_row(const MultiMargin<T>& mm, int64_t row, double scale, Accumulate<T>* x,
                             Accumulate<T>* slopes) {
  using A = Accumulate<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();  // its z is 0
  const T* const input = mm.input + row * mm.classes;
  const int64_t n = whole_vectors<A>(mm.classes);
  const int64_t* const target = mm.target + row * mm.classes;
  const int64_t* const end = std::find(target, target + mm.classes, -1);
  load(input, x, mm.classes);
  std::fill(x + mm.classes, x + n, kNone);
  std::fill_n(slopes, n, A(0));
  for (const int64_t* t = target; t < end; ++t) x[*t] = kNone;
  Sum losses;
  for (const int64_t* t = target; t < end; ++t) {
    const A slack = 1 - widen(input[*t]);
    add_terms<A>(losses, n, [=](int64_t i) {
      const A z = slack + x[i];
      return z > 0 ? z : A(0);
    });
    if (!mm.grad_input) continue;
    A count = 0;
    PYFUSED_SIMD(reduction(+ : count))
    for (int64_t i = 0; i < n; ++i) {
      const A slope = slack + x[i] > 0 ? A(1) : A(0);
      slopes[i] += slope;
      count += slope;
    }
    slopes[*t] -= count;
  }
  if (mm.grad_input) {
    const A factor = A(scale / double(mm.classes));
    for (int64_t i = 0; i < mm.classes; ++i) slopes[i] *= factor;
    store(slopes, mm.grad_input + row * mm.classes, mm.classes);
  }
  return losses.value() / double(mm.classes);
}

template <class T> int64_t multi_margin_loss(const MultiMargin<T>& mm) {
  using A = Accumulate<T>;
  const int64_t targets = mm.multilabel ? mm.classes : 1;  // per row
  const bool each = mm.reduction == Reduction::none;
  const double denominator = mm.reduction == Reduction::mean ? double(mm.rows) : 1;
  const int64_t size = rows_of_block(mm.classes);
  std::vector<int64_t> wrong((mm.rows + size - 1) / size);
  const int64_t room = mm.multilabel ? whole_vectors<A>(mm.classes) : 0;
  const auto run = [&](int64_t begin, int64_t end, auto workspace) {
    Sum sum;
    const int64_t allowed = mm.multilabel ? -1 : 0;  // besides the classes; 0 is one of them
    wrong[begin / size] = invalid_class_index(mm.target + begin * targets, (end - begin) * targets,
                                              mm.classes, allowed);
    if (wrong[begin / size] >= 0) return 0.0;
    A* const x = static_cast<A*>(workspace.memory);
    for (int64_t row = begin; row < end; ++row) {
      const double grad_output = mm.grad_output ? double(mm.grad_output[each ? row : 0]) : 1;
      const double scale = grad_output / denominator;
      const double loss = mm.multilabel ? multilabel_margin_row(mm, row, scale, x, x + room)
                                        : multi_margin_row(mm, row, scale);
      if (mm.loss && each) mm.loss[row] = A(loss);
      sum.add(loss);
    }
    return sum.value();
  };
  const double loss = sum_of_blocks<T, A>(mm.rows, size, mm.threads, run, 2 * room * sizeof(A));
  for (size_t block = 0; block < wrong.size(); ++block) {
    if (wrong[block] >= 0) return int64_t(block) * size * targets + wrong[block];
  }
  if (mm.loss && !each) *mm.loss = A(loss / denominator);
  return -1;
}

template int64_t multi_margin_loss(const MultiMargin<float>&);
template int64_t multi_margin_loss(const MultiMargin<double>&);
template int64_t multi_margin_loss(const MultiMargin<bfloat16>&);
template int64_t multi_margin_loss(const MultiMargin<float16>&);

}  // namespace pyfused
