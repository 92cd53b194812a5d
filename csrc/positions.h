// A tensor of shape (N, C, d1, ..., dk) as positions x classes: a position is an index (n, i1, ...,
// ik) and has C elements. Softmax views a tensor of any shape in this way, with `dim` as the
// classes.
#pragma once

#include <cstdint>

namespace pyfused {

// Strides of a tensor seen as (outer, inner) positions x classes.
template <class T> struct View {
  T* data;
  int64_t outer, inner, classes;
};

struct Positions {
  int64_t outer, inner, classes;

  int64_t positions() const { return outer * inner; }
  template <class U> U* at(const View<U>& view, int64_t position) const {
    const int64_t o = outer == 1 ? 0 : position / inner;  // a division takes as long as a vector
    return view.data + o * view.outer + (position - o * inner) * view.inner;
  }
};

}  // namespace pyfused
