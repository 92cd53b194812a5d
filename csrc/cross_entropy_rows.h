// Cross-entropy of positions whose classes are contiguous: one position at a time, vectors along
// classes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "loss_rows.h"
#include "rows.h"

namespace pyfused {

// A block of rows, whose logarithms are computed in one vectorised loop; one at a time, they would
// stall the CPU. This saves a tenth of the time for rows of 130 to 200 classes.
template <class T, bool kInPlace> class RowBlock {
  using A = Accumulate<T>;
  using OneRow = Row<T, kInPlace>;

 public:
  RowBlock(const CrossEntropyBatch<T>& ce, int64_t first)
      : ce(ce), first(first), n(std::min(rows_of_block(ce.classes), ce.positions() - first)),
        keeps(ce.grad_logits.data && ce.classes <= kKept<T> && !ce.metrics.lse),
        predicts(ce.prediction || ce.metrics.lse) {}

  // Writes the gradients and, with Reduction::none, the losses; returns the sum of the losses.
  double run() {
    rows.find_targets(ce, first, n, n);
    if (ce.target && ce.dense() && !ce.weight) std::fill_n(w, std::min(kChunk, ce.classes), A(1));
    A next_max = first_max(0);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t position = first + i;
      T* const grad = ce.grad_logits.data ? ce.at(ce.grad_logits, position) : nullptr;
      const T* const logits = ce.at(ce.logits, position);
      OneRow& row = Workspace<OneRow>{row_memory}.make(logits, ce.classes, ce.scale);
      const A row_max = next_max;
      if (ce.prediction) ce.prediction[ce.positions() + position] = -1;
      if (ce.ignored(position)) {
        if (i + 1 < n) next_max = first_max(i + 1);
        clear(position, grad);
        pivot[i] = 0;
        sum[i] = 1;
        weighted[i] = index[i] = 0;
        continue;
      }
      if (rows.label[i] >= 0) rows.target_logit[i] = widen(*row.chunk(rows.label[i], 1));
      maximum = kLowest;
      chunk_of_maximum = -1;
      // Metrics are those of a scale of 1.
      if (kInPlace && ce.metrics.lse) read<false, kInPlace>(row, i, grad, row_max);
      else if (keeps) read<true, false>(row, i, grad, row_max);
      else read<false, false>(row, i, grad, row_max);
      const bool finite = std::isnormal(row.state.sum);  // 0 if all logits are -inf
      if (predicts) predict(logits, i, finite);
      if (i + 1 < n) next_max = first_max(i + 1);
      finish(row, i, grad);
    }
    rows.find_log_sums(sum, n);
    if (ce.metrics.lse) rows.write_metrics(ce, first, n, pivot, sum, weighted, index);
    rows.find_losses(ce, n, pivot);
    return ce.finish(first, n, rows.loss);
  }

 private:
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();
  static constexpr int64_t kMostRows = kBlockElements / kRowClasses<T>;
  const CrossEntropyBatch<T>& ce;
  const int64_t first, n;
  const bool keeps, predicts;
  LossRows<T, kMostRows> rows;
  alignas(kVectorBytes) double sum[kMostRows];
  alignas(kVectorBytes) double weighted[kMostRows];
  alignas(kVectorBytes) double index[kMostRows];  // the first class with the largest logit
  alignas(kVectorBytes) A pivot[kMostRows];
  alignas(kVectorBytes) A w[kChunk];
  alignas(OneRow) unsigned char row_memory[sizeof(OneRow)];
  A maximum;  // the largest x of a row, and the first class of its chunk
  int64_t chunk_of_maximum;

  A first_max(int64_t i) const {
    if (ce.ignored(first + i)) return 0;
    return A(ce.scale) * Normalizer<T>::first_max(ce.at(ce.logits, first + i), ce.classes);
  }

  PYFUSED_INLINE void raise_maximum(A high, int64_t at) {
    if (!(high > maximum)) return;
    maximum = high;
    chunk_of_maximum = at;
  }

  // Finds the largest logit, which NaN is in a row that is not finite, and its first class. The
  // gradient may overwrite the logits afterwards.
  PYFUSED_NOINLINE void predict(const T* logits, int64_t i, bool finite) {
    const T* const highest = finite ? largest_logit(logits) : largest_or_nan(logits);
    index[i] = double(highest - logits);
    if (!ce.prediction) return;
    ce.prediction[first + i] = double(widen(*highest));
    ce.prediction[ce.positions() + first + i] = index[i];
  }

  const T* largest_or_nan(const T* logits) const {
    const T* const end = logits + ce.classes;
    const T* const nan = std::find_if(logits, end, [](T x) { return std::isnan(widen(x)); });
    const auto less = [](T x, T y) { return widen(x) < widen(y); };
    return nan == end ? std::max_element(logits, end, less) : nan;
  }

  const T* largest_logit(const T* logits) {
    if (ce.scale != 1) {  // it may have rounded several logits to the largest x
      maximum = kLowest;
      for_chunks(ce.classes, [&](int64_t, int64_t at, int64_t n) {
        raise_maximum(largest(logits + at, n, maximum), at);
      });
    }
    constexpr int64_t kStep = 64;  // a scalar loop over the chunk would take as long as reading it
    const T* const x = logits + chunk_of_maximum;
    const int64_t n = std::min(kChunk, ce.classes - chunk_of_maximum);
    int64_t i = 0;
    while (i + kStep < n && largest(x + i, kStep, kLowest) < maximum) i += kStep;
    while (widen(x[i]) != maximum) ++i;
    return x + i;
  }

  void clear(int64_t position, T* grad) const {
    if (grad) std::fill_n(grad, ce.classes, T{});
    for (int64_t c = 0; ce.grad_probabilities.data && c < ce.classes; ++c)
      ce.at(ce.grad_probabilities, position)[c * ce.grad_probabilities.classes] = T{};
  }

  // w of a chunk of row i.
  const A* weights(int64_t i, int64_t at, int64_t n) {
    const A* const weight = ce.weight ? ce.weight + at : nullptr;
    if (ce.target) return weight ? weight : w;
    const A prob_weight = A(ce.prob_weight), smooth_bias = A(ce.smooth_bias);
    const int64_t stride = ce.probabilities.classes;
    const T* const y = ce.at(ce.probabilities, first + i) + at * stride;
    const bool plain = !weight && prob_weight == 1 && smooth_bias == 0;
    if constexpr (std::is_same_v<T, A>) {
      if (plain && stride == 1) return y;
    }
    load(y, stride, w, n);
    for (int64_t k = 0; !plain && k < n; ++k) {
      w[k] = soft_target(weight ? weight[k] : A(1), w[k], prob_weight, smooth_bias);
    }
    return w;
  }

  void add_weights(Sum& to, int64_t i, int64_t at, int64_t n) {
    const A* const w = weights(i, at, n);
    add_terms<A>(to, n, [=](int64_t k) { return w[k]; });
  }

  // Adds w (pivot - x + shift).
  template <class U>
  void add_distance(Sum& to, const U* x, A pivot, A shift, int64_t i, int64_t at, int64_t n) {
    const A* const w = weights(i, at, n);
    add_terms<A>(to, n, [=](int64_t k) { return w[k] * ((pivot - widen(x[k])) + shift); });
  }

  // Finds the state of a row, and its distance relative to the pivot.
  template <bool Keeps, bool Weighted> void read(OneRow& row, int64_t i, T* grad, A row_max) {
    Sum distance, weight_sum;
    A previous = 0;
    const auto add_chunk = [&](const auto* x, int64_t at, int64_t n) {
      if (predicts) raise_maximum(at ? largest(x, n, maximum) : row_max, at);
      const A high = row.state.pivot;
      if (!ce.dense()) return;
      if (at > 0 && high != previous) {
        Sum before;
        for_chunks(at, [&](int64_t, int64_t at, int64_t n) { add_weights(before, i, at, n); });
        distance.add((double(high) - double(previous)) * before.value());
      }
      previous = high;
      add_distance(distance, x, high, 0, i, at, n);
      if (!ce.target) add_weights(weight_sum, i, at, n);
    };
    row.template read<Keeps, Weighted>(grad, add_chunk, row_max);
    rows.distance[i] = distance.value();
    if (!ce.target) rows.weight_sum[i] = weight_sum.value();
  }

  // Writes the gradients whose memory is not null. The logits' gradient may overwrite the logits.
  void finish(OneRow& row, int64_t i, T* grad) {
    const A high = pivot[i] = row.state.pivot;
    sum[i] = row.state.sum;
    double lse = 0;
    if (ce.dense() || ce.gamma > 0 || ce.z_loss > 0) {
      rows.log_sum[i] = std::log(sum[i]);
      lse = double(high) + rows.log_sum[i];
    }
    weighted[i] = row.state.weighted;
    if (ce.dense()) rows.distance[i] += rows.weight_sum[i] * rows.log_sum[i];
    if (ce.dense() && std::isnan(rows.distance[i])) {
      // An infinite weight times a pivot - x of 0 is NaN, but times lse - x it is not.
      Sum distance;
      const A low = A(rows.log_sum[i]);
      for_chunks(ce.classes, [&](int64_t, int64_t at, int64_t n) {
        add_distance(distance, row.chunk(at, n), high, low, i, at, n);
      });
      rows.distance[i] = distance.value();
    }
    if (ce.gamma > 0) rows.add_focal_factor(ce, i, high);
    const double* const slopes = ce.gamma > 0 ? rows.slope : rows.target_weight;
    const auto find = [&](auto dense) {
      return rows.template find_terms<dense>(ce.options, slopes, i, high, sum[i], lse, ce.scale);
    };
    const RowTerms terms = ce.dense() ? find(std::true_type()) : find(std::false_type());
    if (ce.grad_probabilities.data) write_probability_gradient(row, i);
    if (!grad) return;
    row.write_gradient(terms, keeps, grad, ce.streams,
                       [&](int64_t at, int64_t n) { return weights(i, at, n); });
    if (rows.label[i] >= 0) grad[rows.label[i]] = narrow<T>(rows.at_target[i]);
  }

  // smooth_weight prob_weight weight_c (lse - x_c)
  void write_probability_gradient(OneRow& row, int64_t i) {
    T* const grad = ce.at(ce.grad_probabilities, first + i);
    const int64_t stride = ce.grad_probabilities.classes;
    const A factor = A(ce.options.smooth_weight * ce.prob_weight * rows.row_scale[i]);
    const A high = pivot[i], low = A(rows.log_sum[i]);
    for_chunks(ce.classes, [&](int64_t, int64_t at, int64_t n) {
      const auto* const x = row.chunk(at, n);
      A* const out = stride == 1 ? staged(grad + at, w) : w;
      for (int64_t k = 0; k < n; ++k) out[k] = factor * ((high - widen(x[k])) + low);
      for (int64_t k = 0; ce.weight && k < n; ++k) out[k] *= ce.weight[at + k];
      store(out, grad + at * stride, stride, n);
    });
  }
};

}  // namespace pyfused
