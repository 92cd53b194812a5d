// Cross-entropy of positions whose classes are contiguous: one position at a time, vectors along
// classes.
#pragma once

#include <algorithm>
#include <new>

#include "cross_entropy_terms.h"
#include "parallel.h"
#include "rows.h"

namespace pyfused {

// loss = factor (distance + log(sum)), lse = pivot + log(sum)
struct RowLoss {
  double factor, distance, sum, pivot;
};

// kScales: the scale is not 1.
template <class T, bool kScales> class Row {
  using A = Accumulate<T>;

 public:
  Row(const CrossEntropyBatch<T>& ce, int64_t position)
      : ce(ce), position(position), logits(ce.at(ce.logits, position)),
        keeps(ce.grad_logits.data && ce.classes <= kKept<T>) {}

  static A first_max(const CrossEntropyBatch<T>& ce, int64_t position) {
    if (ce.ignored(position)) return 0;
    return A(ce.scale) * Normalizer<T>::first_max(ce.at(ce.logits, position), ce.classes);
  }

  void read(A first_max) {
    if (ce.ignored(position)) return;
    if (ce.target) target_logit = widen(*chunk(ce.target[position], 1));
    if (ce.target && ce.dense() && !ce.weight) std::fill_n(q, std::min(kChunk, ce.classes), A(1));
    keeps ? read<true>(first_max) : read<false>(first_max);
  }

  // Writes the gradients whose memory is not null. The logits' gradient may overwrite the logits.
  RowLoss finish() {
    if (ce.ignored(position)) {
      if (ce.grad_logits.data) std::fill_n(ce.at(ce.grad_logits, position), ce.classes, T{});
      for (int64_t c = 0; ce.grad_probabilities.data && c < ce.classes; ++c)
        ce.at(ce.grad_probabilities, position)[c * ce.grad_probabilities.classes] = T{};
      return {0, 0, 1, 0};
    }
    RowLoss loss;
    const double one_hot = ce.target ? ce.one_hot(position) : 0;
    if (ce.dense()) {
      target_sum = ce.target ? ce.uniform_sum + one_hot : ce.smooth_weight() * prob_sum.value();
      const double log_sum = std::log(row.sum);
      loss = {1, dense_loss(log_sum), 1, double(row.pivot) + log_sum};
    } else {
      const double distance = double(row.pivot - target_logit);
      if (ce.gamma > 0) focal = FocalFactors(ce.gamma, distance + std::log(row.sum));
      target_sum = one_hot * focal.gradient;
      loss = {one_hot * focal.loss, distance, row.sum, double(row.pivot)};
    }
    if (ce.z_loss > 0) target_sum += 2 * ce.z_loss * (double(row.pivot) + std::log(row.sum));
    if (ce.grad_probabilities.data) write_probability_gradient();
    if (ce.grad_logits.data) write_gradient();
    return loss;
  }

 private:
  const CrossEntropyBatch<T>& ce;
  const int64_t position;
  const T* const logits;
  const bool keeps;
  Normalizer<T> row;
  A target_logit = 0;
  FocalFactors focal;
  double target_sum = 0;  // dloss/dlse: sum_c q_c, plus the derivative of z_loss
  Sum distance;  // sum_c q_c / smooth_weight (pivot - x_c), without the one-hot term
  Sum prob_sum;  // sum_c q_c / smooth_weight of probabilities
  alignas(kVectorBytes) A q[kChunk];
  alignas(kVectorBytes) A buffer[kChunk];
  alignas(kVectorBytes) A scaled_logits[kScales ? kChunk : 1];

  // n logits times the scale, from a class on; the next call overwrites them.
  const auto* chunk(int64_t first, int64_t n) {
    return scaled_chunk<kScales>(logits + first, A(ce.scale), scaled_logits, n);
  }

  template <class Body> void for_chunks(const Body& body) const {
    pyfused::for_chunks(ce.classes, body);
  }

  template <bool Keeps> void read(A first_max) {
    T* const grad = Keeps ? ce.at(ce.grad_logits, position) : nullptr;
    row.template read<Keeps>([&](int64_t first, int64_t n) { return chunk(first, n); }, grad,
                             ce.classes, first_max,
                             [&](int64_t first, double by) {
                               if (ce.dense()) distance.add(by * prob_sum_before(first));
                             },
                             [&](int64_t first, int64_t n) {
                               if (ce.dense()) add_distance(distance, first, n, 0);
                             });
  }

  // q / smooth_weight of a chunk, without the one-hot term.
  const A* soft_target_at(int64_t first, int64_t n) {
    const A prob_weight = ce.prob_weight(), smooth_bias = ce.smooth_bias();
    const A* const weight = ce.weight ? ce.weight + first : nullptr;
    if (ce.target) return weight ? weight : q;
    const int64_t stride = ce.probabilities.classes;
    const T* const y = ce.at(ce.probabilities, position) + first * stride;
    const bool plain = !weight && prob_weight == 1 && smooth_bias == 0;
    if constexpr (std::is_same_v<T, A>) {
      if (plain && stride == 1) return y;
    }
    load(y, stride, q, n);
    for (int64_t i = 0; !plain && i < n; ++i) {
      q[i] = soft_target(weight ? weight[i] : A(1), q[i], prob_weight, smooth_bias);
    }
    return q;
  }

  // Adds q / smooth_weight and its product with pivot - x + shift.
  void add_distance(Sum& to, int64_t first, int64_t n, A shift) {
    const auto* const x = chunk(first, n);
    const A* const q = soft_target_at(first, n);
    const A high = row.pivot;
    add_terms<A>(to, n, [=](int64_t i) { return q[i] * ((high - widen(x[i])) + shift); });
    if (shift == 0 && !ce.target) add_terms<A>(prob_sum, n, [=](int64_t i) { return q[i]; });
  }

  // sum of q_c / smooth_weight over the classes read so far.
  double prob_sum_before(int64_t first) const {
    if (!ce.target) return prob_sum.value();
    if (!ce.weight) return double(first);
    Sum weights;
    add_terms<A>(weights, first, [&](int64_t i) { return ce.weight[i]; });
    return weights.value();
  }

  // sum_c q_c (lse - x_c). If that is NaN, it is computed again with log_sum inside of the sum: an
  // infinite weight times a pivot - x of 0 is NaN, but times pivot - x + log_sum it is not.
  double dense_loss(double log_sum) {
    const double loss =
        ce.smooth_weight() * distance.value() + target_sum * log_sum + one_hot_loss(0);
    if (!std::isnan(loss)) return loss;
    Sum terms;
    for_chunks(
        [&](int64_t, int64_t first, int64_t n) { add_distance(terms, first, n, A(log_sum)); });
    return ce.smooth_weight() * terms.value() + one_hot_loss(log_sum);
  }

  double one_hot_loss(double shift) const {
    return ce.target ? ce.one_hot(position) * (double(row.pivot - target_logit) + shift) : 0;
  }

  // p_c sum_k q_k - q_c
  void write_gradient() {
    T* const grad = ce.at(ce.grad_logits, position);
    const double scale = ce.row_scale(position) * ce.scale, factor = target_sum * scale / row.sum;
    const A high = row.pivot, smooth_weight = A(ce.smooth_weight() * scale);
    if (keeps) {
      for_chunks([&](int64_t chunk, int64_t first, int64_t n) {
        const A* const e = row.kept + first;
        const A rescaled = A(factor * row.rescale(chunk));
        if (!ce.dense()) return scaled(e, rescaled, buffer, grad + first, n);
        A* const wide = staged(grad + first, buffer);
        const A* const q = soft_target_at(first, n);
        for (int64_t i = 0; i < n; ++i) wide[i] = e[i] * rescaled - q[i] * smooth_weight;
        store(wide, grad + first, n);
      });
    } else {
      for_chunks([&](int64_t, int64_t first, int64_t n) {
        const auto* const x = chunk(first, n);
        if (!ce.dense()) {
          return scaled_exponentials(x, high, A(factor), buffer, grad + first, n, ce.streams);
        }
        A* const wide = staged(grad + first, buffer);
        scaled_exponentials(x, high, A(factor), buffer, wide, n, false);
        const A* const q = soft_target_at(first, n);
        for (int64_t i = 0; i < n; ++i) wide[i] -= q[i] * smooth_weight;
        store(wide, grad + first, n);
      });
    }
    if (!ce.target) return;
    const double p = double(exp_shifted(target_logit - high)) / row.sum;
    grad[ce.target[position]] =
        narrow<T>(A((p * target_sum - ce.target_q(position) * focal.gradient) * scale));
  }

  // smooth_weight prob_weight weight_c (lse - x_c)
  void write_probability_gradient() {
    T* const grad = ce.at(ce.grad_probabilities, position);
    const int64_t stride = ce.grad_probabilities.classes;
    const A factor = A(ce.smooth_weight() * ce.prob_weight() * ce.row_scale(position)),
            high = row.pivot;
    const A low = A(std::log(row.sum));
    for_chunks([&](int64_t, int64_t first, int64_t n) {
      const auto* const x = chunk(first, n);
      A* const out = stride == 1 ? staged(grad + first, buffer) : buffer;
      for (int64_t i = 0; i < n; ++i) out[i] = factor * ((high - widen(x[i])) + low);
      for (int64_t i = 0; ce.weight && i < n; ++i) out[i] *= ce.weight[first + i];
      store(out, grad + first * stride, stride, n);
    });
  }
};

// A block of rows, whose logarithms are computed in one vectorised loop; one at a time, they would
// stall the CPU. This saves a third of the time for rows of 200 classes, a tenth for 1,000 classes.
template <class T, bool kScales> class RowBlock {
  using A = Accumulate<T>;
  using OneRow = Row<T, kScales>;

 public:
  RowBlock(const CrossEntropyBatch<T>& ce, int64_t first)
      : ce(ce), first(first), n(std::min(rows_of_block(ce.classes), ce.positions() - first)) {}

  // Writes the gradients and, with Reduction::none, the losses; returns the sum of the losses.
  double run() {
    A first_max = OneRow::first_max(ce, first);
    for (int64_t i = 0; i < n; ++i) {
      OneRow& row = *new (row_memory) OneRow(ce, first + i);
      row.read(first_max);
      if (i + 1 < n) first_max = OneRow::first_max(ce, first + i + 1);
      const RowLoss part = row.finish();
      factor[i] = part.factor;
      distance[i] = part.distance;
      sum[i] = part.sum;
      pivot[i] = part.pivot;
    }
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      const double log_sum = log_positive(sum[i]);
      loss[i] = factor[i] * (distance[i] + log_sum);
      pivot[i] += log_sum;
    }
    for (int64_t i = 0; ce.z_loss > 0 && i < n; ++i) loss[i] += ce.z_loss * pivot[i] * pivot[i];
    return ce.finish(first, n, loss);
  }

 private:
  static constexpr int64_t kMostRows = kBlockElements / kRowClasses<T>;
  const CrossEntropyBatch<T>& ce;
  const int64_t first, n;
  double factor[kMostRows], distance[kMostRows], sum[kMostRows], pivot[kMostRows], loss[kMostRows];
  alignas(OneRow) unsigned char row_memory[sizeof(OneRow)];
};

}  // namespace pyfused
