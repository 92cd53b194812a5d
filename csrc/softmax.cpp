#include "softmax.h"

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "memory.h"
#include "parallel.h"
#include "row_groups.h"
#include "rows.h"

namespace pyfused {

// ---- row layout: classes contiguous -------------------------------------------------------------

template <class T> class SoftmaxRow {
  using A = Accumulate<T>;

 public:
  SoftmaxRow(const Softmax<T>& softmax, int64_t position, bool streams)
      : softmax(softmax), position(position), classes(softmax.classes), streams(streams),
        input(softmax.at(softmax.input, position)), output(softmax.at(softmax.output, position)) {}

  void forward() {
    const bool keeps = !softmax.logarithm && classes <= kKept<T>;
    keeps ? read<true>() : read<false>();
    const A high = row.pivot, low = A(std::log(row.sum));
    const double factor = 1 / row.sum;
    for_chunks(classes, [&](int64_t chunk, int64_t first, int64_t n) {
      T* const y = output + first;
      if (softmax.logarithm) {
        const A* const x = widened(input + first, buffer, n);
        for (int64_t i = 0; i < n; ++i) buffer[i] = (x[i] - high) - low;
        write(buffer, y, n, streams);
      } else if (keeps) {
        scaled(row.kept + first, A(factor * row.rescale(chunk)), buffer, y, n);
      } else {
        scaled_exponentials(input + first, high, A(factor), buffer, y, n, streams);
      }
    });
  }

  void backward() {
    const T* const grad_output = softmax.at(softmax.grad_output, position);
    Sum sum;
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      const A* const dy = widened(grad_output + first, grad_buffer, n);
      if (softmax.logarithm) return add_terms<A>(sum, n, [=](int64_t i) { return dy[i]; });
      const A* const y = widened(input + first, buffer, n);
      add_terms<A>(sum, n, [=](int64_t i) { return dy[i] * y[i]; });
    });
    const A total = A(sum.value());
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      const A* const dy = widened(grad_output + first, grad_buffer, n);
      if (softmax.logarithm) {
        scaled_exponentials(input + first, A(0), total, buffer, buffer, n, false);
        for (int64_t i = 0; i < n; ++i) buffer[i] = dy[i] - buffer[i];
      } else {
        const A* const y = widened(input + first, buffer, n);
        for (int64_t i = 0; i < n; ++i) buffer[i] = y[i] * (dy[i] - total);
      }
      write(buffer, output + first, n, streams);
    });
  }

 private:
  const Softmax<T>& softmax;
  const int64_t position, classes;
  const bool streams;
  const T* const input;
  T* const output;
  Normalizer<T> row;
  alignas(kVectorBytes) A buffer[kChunk];
  alignas(kVectorBytes) A grad_buffer[kChunk];

  template <bool Keeps> void read() {
    const A first_max = Normalizer<T>::first_max(input, classes);
    row.template read<Keeps>(
        input, output, classes, first_max, [](int64_t, double) {}, [](int64_t, int64_t) {});
  }
};

// ---- column layout: positions contiguous --------------------------------------------------------

template <class T, int64_t kColumns, int64_t kTileClasses>
class SoftmaxColumns : Columns<T, kColumns, kTileClasses> {
  using Base = Columns<T, kColumns, kTileClasses>;
  using A = Accumulate<T>;
  using Base::for_tiles, Base::for_groups, Base::load_tile, Base::store_tile;
  using Base::sum, Base::log_sum, Base::max, Base::x, Base::e;

 public:
  using Base::kPositions;

  SoftmaxColumns(const Softmax<T>& softmax, int64_t first, bool streams)
      : Base(softmax, first, streams), softmax(softmax) {}

  void forward() {
    Base::find_normalizer(softmax.input);
    if (softmax.logarithm) Base::find_log_sum();
    alignas(kVectorBytes) A last[kColumns];  // what is subtracted, or multiplied by
    for (int64_t b = 0; softmax.logarithm && b < kColumns; ++b) last[b] = A(log_sum[b]);
    for (int64_t b = 0; !softmax.logarithm && b < kColumns; ++b) last[b] = A(1 / sum[b]);
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        if (softmax.logarithm) {
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] = (x[i][b] - max[b]) - last[b];
        } else {
          if (softmax.classes > kTileClasses) exponentials(x[i], max, e[i], kColumns);
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] *= last[b];
        }
      }
      store_tile(e, softmax.output, c, k);
    });
  }

  void backward() {
    std::fill_n(sum, kColumns, 0.0);
    for_pairs([&](int64_t, int64_t k) {
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns] = {};
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) {
            part[b] += softmax.logarithm ? e[i][b] : e[i][b] * x[i][b];
          }
        }
        for (int64_t b = 0; b < kColumns; ++b) sum[b] += double(part[b]);
      });
    });
    alignas(kVectorBytes) A total[kColumns];
    std::copy_n(sum, kColumns, total);
    std::fill_n(max, kColumns, A(0));
    for_pairs([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        if (softmax.logarithm) {
          exponentials(x[i], max, x[i], kColumns);
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] -= x[i][b] * total[b];
        } else {
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] = x[i][b] * (e[i][b] - total[b]);
        }
      }
      store_tile(e, softmax.output, c, k);
    });
  }

 private:
  const Softmax<T>& softmax;
  bool paired = false;

  // Calls body(first class, classes) with y in x and dy in e.
  template <class Body> void for_pairs(const Body& body) {
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      if (softmax.classes > kTileClasses || !paired) load_tile(softmax.grad_output, c, k, e);
      paired = true;
      body(c, k);
    });
  }
};

// ---- groups of short rows ------------------------------------------------------------------------

#ifdef PYFUSED_HAS_REGISTERS
template <class T, int kRegisters> class SoftmaxGroup : RowGroup<T, kRegisters> {
  using Base = RowGroup<T, kRegisters>;
  using Base::first, Base::n, Base::width, Base::max, Base::sum, Base::e;
  using Base::for_rows, Base::for_registers;

 public:
  using Base::kMostClasses, Base::rows;

  SoftmaxGroup(const Softmax<T>& softmax, int64_t first, int64_t n)
      : Base(softmax, first, n), softmax(softmax) {}

  void forward() {
    softmax.logarithm ? log_softmax() : plain();
  }

  void backward() {
    Square parts;
    for (Register& row : parts) row = Register{};
    for_rows([&](int64_t r, const T* y, const T* dy) {
      Register part = Register{};
      for_registers([&](int64_t c, auto mask) {
        const Register term = load_row(dy + c, mask);
        part = part + (softmax.logarithm ? term : term * load_row(y + c, mask));
      });
      parts[r] = part;
    }, softmax.input, softmax.grad_output);
    row_of_tile(sum) = sum_of_rows(parts);
    for_rows([&](int64_t r, const T* y, const T* dy, T* dx) {
      const float total = sum[r];
      for_registers([&](int64_t c, auto mask) {
        const Register of_output = load_row(dy + c, mask), value = load_row(y + c, mask);
        const Register gradient = softmax.logarithm
                                      ? of_output - exp_floats<T>(value) * total
                                      : value * (of_output - total);
        store_row(gradient, dx + c, mask);
      });
    }, softmax.input, softmax.grad_output, softmax.output);
  }

 private:
  const Softmax<T>& softmax;

  void plain() {
    Base::template find_normalizer<true>(softmax.input);
    row_of_tile(sum) = 1.0f / row_of_tile(sum);
    for_rows([&](int64_t r, T* y) {
      const float factor = sum[r];
      const float* const values = e + r * width;
      for_registers([&](int64_t c, auto mask) {
        store_row(row_of_tile(values + c) * factor, y + c, mask);
      });
    }, softmax.output);
  }

  void log_softmax() {
    Base::template find_normalizer<false>(softmax.input);
    alignas(kVectorBytes) float low[kSquare];
    for (int r = 0; r < kSquare; ++r) low[r] = log_of(sum[r]);
    for_rows([&](int64_t r, const T* x, T* y) {
      const float high = max[r], shift = low[r];
      for_registers([&](int64_t c, auto mask) {
        store_row((load_row(x + c, mask) - high) - shift, y + c, mask);
      });
    }, softmax.input, softmax.output);
  }
};
#endif

#ifdef PYFUSED_HAS_REGISTERS
PYFUSED_INLINE Register log_of_lanes(Register x) {
  alignas(kVectorBytes) float lanes[kSquare];
  row_of_tile(lanes) = x;
  for (int i = 0; i < kSquare; ++i) lanes[i] = log_of(lanes[i]);
  return row_of_tile(lanes);
}

template <int kSquares, class T> class SoftmaxTransposed {
  using Group = TransposedGroup<T, kSquares>;

 public:
  SoftmaxTransposed(const Softmax<T>& softmax, int64_t first, int64_t n)
      : softmax(softmax), classes(softmax.classes), group{classes, n}, first(first) {}

  void forward() {
    group.load(at(softmax.input), softmax.input.inner, x);
    Register high = x[0], sum = Register{};
    for (int64_t c = 1; c < classes; ++c) high = maximum(x[c], high);
    for (int64_t c = 0; c < classes; ++c) {
      const Register e = exp_floats<float>(x[c] - high);
      if (!softmax.logarithm) x[c] = e;
      sum = sum + e;
    }
    if (softmax.logarithm) {
      const Register low = log_of_lanes(sum);
      group.store([&](int64_t c) { return (x[c] - high) - low; }, at(softmax.output), softmax.output.inner);
    } else {
      const Register factor = 1.0f / sum;
      group.store([&](int64_t c) { return x[c] * factor; }, at(softmax.output), softmax.output.inner);
    }
  }

  void backward() {
    typename Group::Tile dy;
    group.load(at(softmax.input), softmax.input.inner, x);
    group.load(at(softmax.grad_output), softmax.grad_output.inner, dy);
    Register sum = Register{};
    if (softmax.logarithm) {
      for (int64_t c = 0; c < classes; ++c) sum = sum + dy[c];
      group.store([&](int64_t c) { return dy[c] - exp_floats<T>(x[c]) * sum; }, at(softmax.output), softmax.output.inner);
    } else {
      for (int64_t c = 0; c < classes; ++c) sum = sum + dy[c] * x[c];
      group.store([&](int64_t c) { return x[c] * (dy[c] - sum); }, at(softmax.output), softmax.output.inner);
    }
  }

 private:
  const Softmax<T>& softmax;
  const int64_t classes;
  const Group group;
  const int64_t first;
  typename Group::Tile x;

  template <class U> U* at(const View<U>& view) const { return view.data + first * view.inner; }
};
#endif

// ---- the batch ----------------------------------------------------------------------------------

template <class T> void softmax_rows(const Softmax<T>& softmax, bool streams) {
  const int64_t size = rows_of_block(softmax.classes);
  parallel_for((softmax.positions() + size - 1) / size, softmax.threads, [&](int64_t block) {
    const int64_t end = std::min(softmax.positions(), (block + 1) * size);
    for (int64_t position = block * size; position < end; ++position) {
      SoftmaxRow<T> row(softmax, position, streams);
      softmax.backward() ? row.backward() : row.forward();
    }
  });
}

#ifdef PYFUSED_HAS_REGISTERS
template <int N, class T> void softmax_groups(const Softmax<T>& softmax) {
  const int64_t rows = SoftmaxGroup<T, N>::rows(softmax.classes);
  const int64_t size = std::max<int64_t>(1, rows_of_block(softmax.classes) / rows) * rows;
  parallel_for((softmax.positions() + size - 1) / size, softmax.threads, [&](int64_t block) {
    const int64_t end = std::min(softmax.positions(), (block + 1) * size);
    for (int64_t first = block * size; first < end; first += rows) {
      SoftmaxGroup<T, N> group(softmax, first, std::min(rows, end - first));
      softmax.backward() ? group.backward() : group.forward();
    }
  });
}
#endif

#ifdef PYFUSED_HAS_REGISTERS
template <int N, class T> void softmax_transposed(const Softmax<T>& softmax) {
  const int64_t rows = kSquare;
  const int64_t size = std::max<int64_t>(1, rows_of_block(softmax.classes) / rows) * rows;
  parallel_for((softmax.positions() + size - 1) / size, softmax.threads, [&](int64_t block) {
    const int64_t end = std::min(softmax.positions(), (block + 1) * size);
    for (int64_t first = block * size; first < end; first += rows) {
      SoftmaxTransposed<N, T> group(softmax, first, std::min(rows, end - first));
      softmax.backward() ? group.backward() : group.forward();
    }
  });
}
#endif

template <class Block, class T> void softmax_columns(const Softmax<T>& softmax, bool streams) {
  constexpr int64_t size = Block::kPositions;
  parallel_for((softmax.positions() + size - 1) / size, softmax.threads, [&](int64_t block) {
    Block columns(softmax, block * size, streams);
    softmax.backward() ? columns.backward() : columns.forward();
  });
}

template <class T> void softmax(const Softmax<T>& softmax) {
  const size_t bytes = size_t(softmax.positions() * softmax.classes) * sizeof(T);
  const bool streams = bytes >= kStreamBytes && has_pages(softmax.output.data, bytes);
#ifdef PYFUSED_HAS_REGISTERS
  if constexpr (kTransposes<T>) {
    static const int64_t lo = getenv("GLO") ? atoi(getenv("GLO")) : 9, hi = getenv("GHI") ? atoi(getenv("GHI")) : 256;
    if (softmax.classes_contiguous() && softmax.classes >= lo && softmax.classes <= hi) {
      static const int mx = getenv("GN") ? atoi(getenv("GN")) : 4;
      static const int gt = getenv("GT") ? atoi(getenv("GT")) : 2;
      const int64_t N = (softmax.classes + kSquare - 1) / kSquare;
      if (N <= gt) switch (N) { case 1: return softmax_transposed<1>(softmax); case 2: return softmax_transposed<2>(softmax); case 3: return softmax_transposed<3>(softmax);
       case 4: return softmax_transposed<4>(softmax); }
      switch (N > mx ? 0 : N) { case 1: return softmax_groups<1>(softmax); case 2: return softmax_groups<2>(softmax); case 3: return softmax_groups<3>(softmax);
       case 4: return softmax_groups<4>(softmax); }
      return softmax_groups<0>(softmax);
    }
  }
#endif
  if (softmax.classes_contiguous() && softmax.classes >= kRowClasses<T>) {
    softmax_rows(softmax, streams);
  } else if (softmax.classes <= kFewClasses) {
    softmax_columns<SoftmaxColumns<T, 128, kFewClasses>>(softmax, streams);
  } else {
    softmax_columns<SoftmaxColumns<T, 32, 128>>(softmax, streams);
  }
}

template void softmax(const Softmax<float>&);
template void softmax(const Softmax<double>&);
template void softmax(const Softmax<bfloat16>&);
template void softmax(const Softmax<float16>&);

}  // namespace pyfused
