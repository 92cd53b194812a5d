// Short rows: the classes of a position are contiguous, and vectors run along them. A group has as
// many rows as a register has lanes, so that a transpose of one register for each row gives the
// maxima, or the sums, of all rows in one register.
#pragma once

#include <algorithm>
#include <cmath>

#include "exponentials.h"
#include "positions.h"
#include "transpose.h"

namespace pyfused {

#ifdef PYFUSED_HAS_REGISTERS
// The exponentials of a group stay in L1: rows of many classes have smaller groups.
constexpr int64_t kGroupElements = 4096;

// The most classes of a row: a lane adds up 32 terms at most, which keeps rounding errors small.
constexpr int64_t kGroupClasses = int64_t(32) * kSquare;

// Combines the lanes of each row; the result is in the row's lane.
template <class Combine> PYFUSED_INLINE Register across(Square& rows, const Combine& combine) {
  transpose(rows);
  for (int step = kSquare / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) rows[i] = combine(rows[i], rows[i + step]);
  }
  return rows[0];
}

template <class T> class RowGroup {
 public:
  static int64_t rows(int64_t classes) {
    return std::min<int64_t>(kSquare, kGroupElements / padded(classes));
  }

 protected:
  // Rows first to first + n, at most rows(classes), whose distance is the views' inner stride.
  RowGroup(int64_t classes, int64_t first, int64_t n)
      : classes(classes), width(padded(classes)), first(first), n(n),
        last(first_of_row(classes - (width - kSquare))) {}

  const int64_t classes, width, first, n;
  const RowMask last;  // the mask of a row's last register
  alignas(kVectorBytes) float max[kSquare];
  alignas(kVectorBytes) float sum[kSquare];       // the sum of exp(x - max)
  alignas(kVectorBytes) float e[kGroupElements];  // exp(x - max)
  // With Weighted: the sum of exp(x - max) (x - max), and the first class with x = max.
  alignas(kVectorBytes) float weighted[kSquare], index[kSquare];

  // The group's first row in memory, and the distance of its rows.
  template <class U> struct Rows {
    U* row;
    int64_t stride;
  };
  template <class U> Rows<U> rows_of(const View<U>& view) const {
    return {view.data + first * view.inner, view.inner};
  }

  // Calls body(row in the group, its address in each memory).
  template <class Body, class... U>
  PYFUSED_INLINE void for_rows(const Body& body, Rows<U>... rows) const {
    for (int64_t r = 0; r < n; ++r) {
      body(r, rows.row...);
      ((rows.row += rows.stride), ...);
    }
  }

  // Calls body(first class, mask) for each register of a row. With kOne there is only one.
  template <bool kOne = false, class Body>
  PYFUSED_INLINE void for_registers(const Body& body) const {
    int64_t c = 0;
    for (; !kOne && c + kSquare < classes; c += kSquare) body(c, EveryLane{});
    // Masked stores of outputs that are not in the cache are up to 4 times slower.
    width == classes ? body(c, EveryLane{}) : body(c, last);
  }

  // The sums of the lanes of row(row in the group, its address in each memory).
  template <class Row, class... U>
  PYFUSED_INLINE Register sums(const Row& row, Rows<U>... rows) const {
    Square lanes = {};
    for_rows([&](int64_t r, auto... at) { lanes[r] = row(r, at...); }, rows...);
    return across(lanes, [](Register x, Register y) { return x + y; });
  }

  template <bool Keeps, bool Weighted = false>
  PYFUSED_INLINE void find_normalizer(Rows<const T> rows) {
    Square largest = {};
    for_rows(
        [&](int64_t r, const T* x) {
          largest[r] = Register{} - INFINITY;
          for_registers([&](int64_t c, auto mask) {
            const Register value = within(mask, load_row(x + c, mask), -INFINITY);
            largest[r] = maximum(value, largest[r]);
          });
        },
        rows);
    row_of_tile(max) = across(largest, [](Register x, Register y) { return maximum(x, y); });
    Square products = {};
    row_of_tile(sum) = sums(
        [&](int64_t r, const T* x) {
          const float high = max[r];
          float* const kept = e + r * width;
          Register part = {}, product = {};
          int64_t first_of_max = classes;
          for_registers([&](int64_t c, auto mask) {
            PYFUSED_PREFETCH(x + c + kPrefetchDistance<T>);
            const Register logit = load_row(x + c, mask);
            // 0 after the row's end, because an exponential that underflows is slow.
            const Register shifted = within(mask, logit - high);
            const Register value = exp_floats<float>(shifted);
            if (Keeps) row_of_tile(kept + c) = value;
            part = part + within(mask, value);
            if (!Weighted) return;
            product = product + value * maximum(-104.0f, shifted);  // exp(-104) is 0, 0 * inf NaN
            const int64_t lane = first_equal(logit, high);
            first_of_max = std::min(first_of_max, lane < kSquare ? c + lane : classes);
          });
          if (Weighted) products[r] = product;
          if (Weighted) index[r] = float(first_of_max);
          return part;
        },
        rows);
    const auto add = [](Register x, Register y) { return x + y; };
    if (Weighted) row_of_tile(weighted) = across(products, add);
  }

 private:
  static int64_t padded(int64_t classes) { return (classes + kSquare - 1) / kSquare * kSquare; }
};
#endif

}  // namespace pyfused
