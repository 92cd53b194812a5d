// How elementwise kernels read tensors with any strides, in the memory order of their outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "transpose.h"
#include "vec.h"

namespace pyfused {

using Sizes = std::vector<int64_t>;

// Elements as rows of `columns` elements. Rows are counted over outer dimensions, the last one
// first.
struct Order {
  int64_t columns = 0;
  Sizes outer;
};

// Element i is at i * step, where a step of 0 broadcasts one element. If there are row steps, one
// for each outer dimension of the order, element `column` of a row is column * step after the row.
template <class T> struct Operand {
  const T* data = nullptr;  // null if not given
  int64_t step = 0;
  Sizes row_steps;

  bool in_rows() const { return !row_steps.empty(); }
  bool in_columns() const { return in_rows() && step > 1 && row_steps.back() == 1; }

  const T* row(const Order& order, int64_t index) const {
    const T* at = data;
    for (size_t d = row_steps.size() - 1; d > 0; --d) {
      at += index % order.outer[d] * row_steps[d];
      index /= order.outer[d];
    }
    return at + index * row_steps[0];
  }
};

// The strides of tensors, in as few dimensions as possible.
struct Layout {
  Order order;
  std::vector<Sizes> steps;  // of each tensor: the row steps, empty if not in rows, and the step

  // strides: of the output, whose memory order elements have, and of each tensor. Empty strides are
  // those of a contiguous tensor, or of one that is not given.
  Layout(const Sizes& sizes, std::vector<Sizes> strides) {
    Sizes contiguous(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) contiguous[d - 1] = contiguous[d] * sizes[d];
    for (Sizes& each : strides) {
      if (each.empty()) each = contiguous;
    }
    const Sizes& output = strides[0];
    std::vector<size_t> dims(sizes.size());
    std::iota(dims.begin(), dims.end(), size_t(0));
    std::stable_sort(dims.begin(), dims.end(),
                     [&](size_t a, size_t b) { return output[a] > output[b]; });
    Sizes merged;
    std::vector<Sizes> of_each(strides.size());
    for (const size_t d : dims) {
      if (sizes[d] == 1) continue;
      const auto continues = [&](size_t k) {
        return of_each[k].back() == strides[k][d] * sizes[d];
      };
      bool merges = !merged.empty();
      for (size_t k = 0; merges && k < strides.size(); ++k) merges = continues(k);
      if (merges) merged.back() *= sizes[d];
      else merged.push_back(sizes[d]);
      for (size_t k = 0; k < strides.size(); ++k) {
        if (merges) of_each[k].back() = strides[k][d];
        else of_each[k].push_back(strides[k][d]);
      }
    }
    if (merged.empty()) {
      merged.push_back(1);
      for (Sizes& each : of_each) each.push_back(1);
    }
    order.columns = merged.back();
    order.outer.assign(merged.begin(), merged.end() - 1);
    for (size_t k = 1; k < of_each.size(); ++k) {
      Sizes& each = of_each[k];
      bool dense = true;  // rows follow each other
      for (size_t d = 1; d < each.size(); ++d) dense &= each[d - 1] == each[d] * merged[d];
      if (dense) each.erase(each.begin(), each.end() - 1);
      steps.push_back(std::move(each));
    }
  }
};

template <class T> Operand<T> operand(const T* data, const Sizes& steps) {
  return {data, steps.back(), Sizes(steps.begin(), steps.end() - 1)};
}

// n elements from an address on, in To, which is T or its accumulation type.
template <class T, class To> void gather(const T* from, int64_t step, To* to, int64_t n) {
  if (step == 0) {
    if constexpr (std::is_same_v<T, To>) std::fill_n(to, n, *from);
    else std::fill_n(to, n, widen(*from));
  } else if constexpr (!std::is_same_v<T, To>) {
    load(from, step, to, n);
  } else if (step == 1) {
    std::copy_n(from, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
  }
}

// Rows of elements, as above. Short rows are read column by column, because a call for each row
// takes longer than its elements; contiguous columns, because their elements share cache lines.
template <class T, class To>
void gather(const T* from, int64_t row_step, int64_t step, To* to, int64_t rows, int64_t columns) {
  constexpr int64_t kShort = 16;
  if (columns >= kShort && (row_step != 1 || rows < kShort)) {
    for (int64_t r = 0; r < rows; ++r) gather(from + r * row_step, step, to + r * columns, columns);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const T& element = from[c * step + r * row_step];
      if constexpr (std::is_same_v<T, To>) to[r * columns + c] = element;
      else to[r * columns + c] = widen(element);
    }
  }
}

// Calls body(address, buffer, rows, columns) for rows that differ in the last outer index only; the
// first and the last row may be parts of rows.
template <class T, class To, class Body>
void for_rows(const Operand<T>& o, const Order& order, int64_t first, int64_t n, To* to,
              const Body& body) {
  for (int64_t m; n > 0; first += m, to += m, n -= m) {
    const int64_t row = first / order.columns, column = first % order.columns;
    const bool whole = column == 0 && n >= order.columns;
    const int64_t following = order.outer.back() - row % order.outer.back();
    const int64_t rows = whole ? std::min(n / order.columns, following) : 1;
    const int64_t columns = whole ? order.columns : std::min(n, order.columns - column);
    body(o.row(order, row) + column * o.step, to, rows, columns);
    m = rows * columns;
  }
}

// n elements of an operand from `first` on, in the buffer or, if they are contiguous, in place.
template <class T, class To>
const To* gather(const Operand<T>& o, const Order& order, int64_t first, int64_t n, To* buffer) {
  const T* from = o.data + first * o.step;
  if (o.in_rows()) {
    const int64_t column = first % order.columns;
    if (column + n > order.columns) {  // several rows
      const int64_t row_step = o.row_steps.back();
      for_rows(o, order, first, n, buffer, [&](const T* at, To* to, int64_t rows, int64_t columns) {
        gather(at, row_step, o.step, to, rows, columns);
      });
      return buffer;
    }
    from = o.row(order, first / order.columns) + column * o.step;
  }
  if constexpr (std::is_same_v<T, To>) {
    if (o.step == 1) return from;
  }
  gather(from, o.step, buffer, n);
  return buffer;
}

// The same for an operand in columns.
template <class T>
void gather_columns(const Operand<T>& o, const Order& order, int64_t first, int64_t n,
                    Accumulate<T>* to) {
  using A = Accumulate<T>;
  for_rows(o, order, first, n, to, [&](const T* from, A* out, int64_t rows, int64_t columns) {
#ifdef PYFUSED_HAS_REGISTERS
    if constexpr (kTransposes<T>) {
      if (rows > 1) return load_transposed<true>(from, o.step, out, columns, rows, columns);
    }
#endif
    gather(from, 1, o.step, out, rows, columns);
  });
}

// The same as `gather`, without a call for the elements of a contiguous tensor.
template <class T, class To>
PYFUSED_INLINE const To* elements(const Operand<T>& o, const Order& order, int64_t first, int64_t n,
                                  To* buffer) {
  if constexpr (std::is_same_v<T, To>) {
    if (o.step == 1 && !o.in_rows()) return o.data + first;
  }
  return gather(o, order, first, n, buffer);
}

}  // namespace pyfused
