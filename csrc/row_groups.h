// Short rows: the classes of a position are contiguous, and vectors run along them. A group has as
// many rows as a register has lanes, so that a transpose of one register for each row gives the
// maxima, or the sums, of all rows in one register.
#pragma once

#include <algorithm>

#include "exponentials.h"
#include "positions.h"
#include "transpose.h"

namespace pyfused {

#ifdef PYFUSED_HAS_REGISTERS
// The exponentials of a group stay in L1. Rows of more classes have smaller groups.
constexpr int64_t kGroupElements = 4096;

// Calls body(first class, mask) for each register of a row; kRegisters is 0 where their number is
// not a constant.
template <int kRegisters, class Body>
PYFUSED_INLINE void for_registers(int64_t classes, RowMask last, const Body& body) {
  if constexpr (kRegisters > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters - 1; ++i) body(i * kSquare, EveryLane{});
    body((kRegisters - 1) * kSquare, last);
  } else {
    int64_t c = 0;
    for (; c + kSquare < classes; c += kSquare) body(c, EveryLane{});
    body(c, last);
  }
}

// Of each row, in the row's lane.
PYFUSED_INLINE Register largest_of_rows(Square& rows) {
  transpose(rows);
  for (int step = kSquare / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) rows[i] = maximum(rows[i], rows[i + step]);
  }
  return rows[0];
}
PYFUSED_INLINE Register sum_of_rows(Square& rows) {
  transpose(rows);
  for (int step = kSquare / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) rows[i] = rows[i] + rows[i + step];
  }
  return rows[0];
}

template <class T, int kRegisters> class RowGroup {
 public:
  // As many rows as a group has, of at most kMostClasses.
  static constexpr int64_t kMostClasses = kGroupElements / 4;
  static int64_t rows(int64_t classes) {
    return std::min<int64_t>(kSquare, kGroupElements / padded(classes));
  }

  RowGroup(const Positions& shape, int64_t first, int64_t n)
      : shape(shape), first(first), n(n), classes(shape.classes), width(padded(classes)),
        last(first_of_row(classes - (width - kSquare))) {}

 protected:
  const Positions& shape;
  const int64_t first, n, classes, width;
  const RowMask last;  // of the last register of a row
  alignas(kVectorBytes) float max[kSquare];
  alignas(kVectorBytes) float sum[kSquare];        // of exp(x - max)
  alignas(kVectorBytes) float e[kGroupElements];  // exp(x - max)

  // Calls body(row in the group, the row of each view).
  template <class Body, class... U>
  PYFUSED_INLINE void for_rows(const Body& body, const View<U>&... views) const {
    const int64_t rows = n;
    for_rows_at(rows, body, std::pair<U*, int64_t>(views.data + first * views.inner, views.inner)...);
  }
  template <class Body, class... Rows>
  static PYFUSED_INLINE void for_rows_at(int64_t rows, const Body& body, Rows... at) {
    for (int64_t r = 0; r < rows; ++r) {
      body(r, at.first...);
      ((at.first += at.second), ...);
    }
  }
  template <class Body> PYFUSED_INLINE void for_registers(const Body& body) const {
    pyfused::for_registers<kRegisters>(classes, last, body);
  }

  template <bool Keeps> PYFUSED_INLINE void find_normalizer(const View<const T>& view) {
    Square high, total;
    for (Register& row : high) row = Register{};
    for_rows([&](int64_t r, const T* x) {
      Register top = Register{} - INFINITY;
      for_registers([&](int64_t c, auto mask) {
        top = maximum(within(mask, load_row(x + c, mask), -INFINITY), top);
      });
      high[r] = top;
    }, view);
    row_of_tile(max) = largest_of_rows(high);
    for (Register& row : total) row = Register{};
    for_rows([&](int64_t r, const T* x) {
      Register part = Register{};
      const float pivot = max[r];
      float* const values = e + r * width;
      for_registers([&](int64_t c, auto mask) {
        // 0 after the row's end, because an exponential that underflows is slow.
        const Register shifted = within(mask, load_row(x + c, mask) - pivot);
        const Register value = exp_floats<float>(shifted);
        if (Keeps) row_of_tile(values + c) = value;
        part = part + within(mask, value);
      });
      total[r] = part;
    }, view);
    row_of_tile(sum) = sum_of_rows(total);
  }

 private:
  static int64_t padded(int64_t classes) { return (classes + kSquare - 1) / kSquare * kSquare; }
};

// Rows of few classes, transposed: vectors run along a group of as many rows as a register has
// lanes. kSquares is how many squares the classes need.
template <class T, int kSquares> struct TransposedGroup {
  static constexpr int64_t kMostClasses = kSquares * kSquare;
  using Tile = Register[kMostClasses];

  const int64_t classes, n;  // n rows
  const RowMask last = first_of_row(classes - (kMostClasses - kSquare));

  // Calls body(square, first class, mask) for each square.
  template <class Body> PYFUSED_INLINE void for_squares(const Body& body) const {
#pragma GCC unroll 4
    for (int s = 0; s < kSquares - 1; ++s) body(s, s * kSquare, EveryLane{});
    body(kSquares - 1, (kSquares - 1) * kSquare, last);
  }

  // The rows after the last one repeat it.
  PYFUSED_INLINE void load(const T* from, int64_t stride, Tile& tile) const {
    for_squares([&](int s, int64_t c, auto mask) {
      Square rows;
      for (int i = 0; i < kSquare; ++i) {
        rows[i] = load_row(from + (n == kSquare ? i : std::min<int64_t>(i, n - 1)) * stride + c, mask);
      }
      transpose(rows);
      for (int i = 0; i < kSquare; ++i) tile[s * kSquare + i] = rows[i];
    });
  }

  // Writes value(c) of each class c.
  template <class Value>
  PYFUSED_INLINE void store(const Value& value, T* to, int64_t stride) const {
    for_squares([&](int, int64_t c, auto mask) {
      Square rows;
      for (int i = 0; i < kSquare; ++i) rows[i] = value(c + i);
      transpose(rows);
      if (n == kSquare) {
        for (int i = 0; i < kSquare; ++i) store_row(rows[i], to + i * stride + c, mask);
      } else {
        for (int i = 0; i < n; ++i) store_row(rows[i], to + i * stride + c, mask);
      }
    });
  }
};
#endif

}  // namespace pyfused
