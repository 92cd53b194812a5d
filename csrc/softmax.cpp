#include "softmax.h"

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "memory.h"
#include "parallel.h"
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
    alignas(kVectorBytes) A factor[kColumns], low[kColumns];
    for (int64_t b = 0; b < kColumns; ++b) {
      factor[b] = A(1 / sum[b]);
      low[b] = A(log_sum[b]);
    }
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        if (softmax.logarithm) {
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] = (x[i][b] - max[b]) - low[b];
        } else {
          exponentials(x[i], max, e[i], kColumns);
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] *= factor[b];
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
