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

// Combines, of each row, the lanes; the result is in the row's lane.
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
  const RowMask last;  // of a row's last register
  alignas(kVectorBytes) float max[kSquare];
  alignas(kVectorBytes) float sum[kSquare];       // of exp(x - max)
  alignas(kVectorBytes) float e[kGroupElements];  // exp(x - max)

  // Calls body(row in the group, address of the row in each view).
  template <class Body, class... U>
  PYFUSED_INLINE void for_rows(const Body& body, const View<U>&... views) const {
    for_rows_at(n, body, std::pair(views.data + first * views.inner, views.inner)...);
  }

  // Calls body(first class, mask) for each register of a row. With kOne there is only one.
  template <bool kOne = false, class Body>
  PYFUSED_INLINE void for_registers(const Body& body) const {
    int64_t c = 0;
    for (; !kOne && c + kSquare < classes; c += kSquare) body(c, EveryLane{});
    body(c, last);
  }

  // The sums of the lanes of row(row in the group, address of the row in each view).
  template <class Row, class... U>
  PYFUSED_INLINE Register sums(const Row& row, const View<U>&... views) const {
    Square lanes = {};
    for_rows([&](int64_t r, auto... at) { lanes[r] = row(r, at...); }, views...);
    return across(lanes, [](Register x, Register y) { return x + y; });
  }

  template <bool Keeps> PYFUSED_INLINE void find_normalizer(const View<const T>& view) {
    Square largest = {};
    for_rows(
        [&](int64_t r, const T* x) {
          largest[r] = Register{} - INFINITY;
          for_registers([&](int64_t c, auto mask) {
            const Register value = within(mask, load_row(x + c, mask), -INFINITY);
            largest[r] = maximum(value, largest[r]);
          });
        },
        view);
    row_of_tile(max) = across(largest, [](Register x, Register y) { return maximum(x, y); });
    row_of_tile(sum) = sums(
        [&](int64_t r, const T* x) {
          const float high = max[r];
          float* const kept = e + r * width;
          Register part = {};
          for_registers([&](int64_t c, auto mask) {
            // 0 after the row's end, because an exponential that underflows is slow.
            const Register shifted = within(mask, load_row(x + c, mask) - high);
            const Register value = exp_floats<float>(shifted);
            if (Keeps) row_of_tile(kept + c) = value;
            part = part + within(mask, value);
          });
          return part;
        },
        view);
  }

 private:
  static int64_t padded(int64_t classes) { return (classes + kSquare - 1) / kSquare * kSquare; }

  template <class Body, class... Rows>
  static PYFUSED_INLINE void for_rows_at(int64_t n, const Body& body, Rows... rows) {
    for (int64_t r = 0; r < n; ++r) {
      body(r, rows.first...);
      ((rows.first += rows.second), ...);
    }
  }
};
#endif

}  // namespace pyfused
