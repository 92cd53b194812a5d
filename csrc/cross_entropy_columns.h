// Cross-entropy of a block of positions: classes strided, positions contiguous, vectors along
// positions.
#pragma once

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "cross_entropy_terms.h"
#include "parallel.h"

namespace pyfused {

template <class T, int64_t kColumns, int64_t kTileClasses>
class CrossEntropyColumns : Columns<T, kColumns, kTileClasses> {
  using Base = Columns<T, kColumns, kTileClasses>;
  using A = Accumulate<T>;
  using Tile = A[kTileClasses][kColumns];
  using Lanes = double[kColumns];
  using Base::first, Base::n, Base::sum, Base::log_sum, Base::max, Base::x, Base::e;
  using Base::load_tile, Base::store_tile, Base::for_groups;

 public:
  using Base::kPositions;

  CrossEntropyColumns(const CrossEntropyBatch<T>& ce, int64_t first)
      : Base(ce, first, std::min(kColumns, ce.positions() - first), ce.streams, ce.scale), ce(ce) {}

  double run() {
    find_targets();
    ce.grad_logits.data ? Base::template find_normalizer<true>(ce.logits)
                        : Base::template find_normalizer<false>(ce.logits);
    Base::find_log_sum();
    find_target_logits();
    if (ce.dense()) {
      find_dense_loss(false);
      // If max - x is 0, its product with an infinite weight is NaN. max - x + log_sum avoids this.
      if (std::any_of(loss, loss + n, [](double l) { return std::isnan(l); }))
        find_dense_loss(true);
    } else {
      find_sparse_loss();
    }
    if (ce.grad_probabilities.data) write_probability_gradient();
    if (ce.grad_logits.data) write_gradient();
    if (ce.z_loss > 0) add_z_loss();
    return ce.finish(first, n, loss);
  }

 private:
  const CrossEntropyBatch<T>& ce;
  bool any_ignored = false;
  int64_t label[kColumns];  // -1 for a target that is ignored
  alignas(kVectorBytes) Lanes row_scale;
  alignas(kVectorBytes) Lanes one_hot;
  alignas(kVectorBytes) Lanes target_q;  // q at the target
  alignas(kVectorBytes) Lanes target_sum;  // dloss/dlse: sum_c q_c, plus the derivative of z_loss
  alignas(kVectorBytes) Lanes loss;
  alignas(kVectorBytes) A target_logit[kColumns];
  alignas(kVectorBytes) Tile q;

  template <class Body> void for_tiles(const Body& body) { Base::for_tiles(ce.logits, body); }

  void find_targets() {
    std::fill_n(row_scale, kColumns, ce.common_scale);
    for (int64_t b = 0; ce.has_position_scale() && b < n; ++b)
      row_scale[b] = ce.row_scale(first + b);
    std::fill_n(label, kColumns, -1);
    int64_t ignored = 0;
    for (int64_t b = 0; ce.target && b < n; ++b) label[b] = ce.target[first + b];
    for (int64_t b = 0; b < n; ++b) ignored += ce.ignored(first + b);
    any_ignored = ignored > 0;
    for (int64_t b = 0; any_ignored && b < n; ++b) label[b] = ce.ignored(first + b) ? -1 : label[b];
    if (!ce.weight) {
      const double common_one_hot = ce.one_hot(first), common_target_q = ce.target_q(first);
      for (int64_t b = 0; b < kColumns; ++b) {
        one_hot[b] = label[b] < 0 ? 0 : common_one_hot;
        target_q[b] = label[b] < 0 ? 0 : common_target_q;
      }
      return;
    }
    for (int64_t b = 0; b < kColumns; ++b) {
      one_hot[b] = label[b] < 0 ? 0 : ce.one_hot(first + b);
      target_q[b] = label[b] < 0 ? 0 : ce.target_q(first + b);
    }
  }

  // Called after the logits were read, when they are in the cache.
  void find_target_logits() {
    std::fill_n(target_logit, kColumns, A(0));
    if (ce.target && ce.classes <= kTileClasses) {
      for_targets(0, ce.classes, [&](int64_t i, int64_t b) { target_logit[b] = x[i][b]; });
      return;
    }
    for (int64_t b = 0; ce.target && b < n; ++b) {
      if (label[b] < 0) continue;
      const A logit = widen(ce.at(ce.logits, first + b)[label[b] * ce.logits.classes]);
      target_logit[b] = A(ce.scale) * logit;
    }
  }

  void add_z_loss() {
    for (int64_t b = 0; b < n; ++b) {
      const double lse = double(max[b]) + log_sum[b];
      loss[b] += ce.z_loss * lse * lse;
    }
  }

  // q / smooth_weight of a tile, without the one-hot term.
  void load_soft_target(int64_t c, int64_t k) {
    const A prob_weight = ce.prob_weight(), smooth_bias = ce.smooth_bias();
    if (!ce.target) load_tile(ce.probabilities, c, k, q);
    for (int64_t i = 0; i < k; ++i) {
      const A weight = ce.weight ? ce.weight[c + i] : A(1);
      for (int64_t b = 0; b < kColumns; ++b) {
        q[i][b] = soft_target(weight, ce.target ? A(0) : q[i][b], prob_weight, smooth_bias);
      }
    }
  }

  // Calls body(class in the tile, position in the block) for the targets within the tile.
  template <class Body> void for_targets(int64_t c, int64_t k, const Body& body) {
    for (int64_t b = 0; ce.target && b < n; ++b) {
      if (uint64_t(label[b] - c) < uint64_t(k)) body(label[b] - c, b);
    }
  }

  // sum_c q_c (lse - x_c), with log_sum outside of the sum, or inside of it where `shifted`.
  void find_dense_loss(bool shifted) {
    alignas(kVectorBytes) A shift[kColumns];
    for (int64_t b = 0; b < kColumns; ++b) shift[b] = shifted ? A(log_sum[b]) : A(0);
    std::fill_n(loss, kColumns, 0.0);
    std::fill_n(target_sum, kColumns, 0.0);
    for_tiles([&](int64_t c, int64_t k) {
      load_soft_target(c, k);
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns] = {}, part_sum[kColumns] = {};
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) {
            part[b] += q[i][b] * ((max[b] - x[i][b]) + shift[b]);
            part_sum[b] += q[i][b];
          }
        }
        for (int64_t b = 0; b < kColumns; ++b) {
          loss[b] += double(part[b]);
          target_sum[b] += double(part_sum[b]);
        }
      });
    });
    const double smooth_weight = ce.smooth_weight();
    for (int64_t b = 0; b < kColumns; ++b) {
      target_sum[b] = ce.target ? ce.uniform_sum + one_hot[b] : smooth_weight * target_sum[b];
      loss[b] *= smooth_weight;
      if (!shifted) loss[b] += target_sum[b] * log_sum[b];
      if (ce.target) loss[b] += one_hot[b] * (double(max[b] - target_logit[b]) + double(shift[b]));
    }
  }

  void find_sparse_loss() {
    for (int64_t b = 0; b < kColumns; ++b) {
      target_sum[b] = one_hot[b];
      loss[b] = one_hot[b] * (log_sum[b] + double(max[b] - target_logit[b]));
    }
    for (int64_t b = 0; ce.gamma > 0 && b < n; ++b) {
      const FocalFactors focal(ce.gamma, log_sum[b] + double(max[b] - target_logit[b]));
      loss[b] *= focal.loss;
      target_sum[b] *= focal.gradient;
      target_q[b] *= focal.gradient;
    }
  }

  void clear_ignored(Tile& tile, int64_t k) const {
    for (int64_t b = 0; any_ignored && b < n; ++b) {
      if (!ce.ignored(first + b)) continue;
      for (int64_t i = 0; i < k; ++i) tile[i][b] = 0;
    }
  }

  void write_gradient() {
    // A call of smooth_weight() within the loop would prevent its vectorisation.
    const double common_weight = ce.smooth_weight();
    alignas(kVectorBytes) A factor[kColumns], smooth_weight[kColumns], at_target[kColumns];
    for (int64_t b = 0; ce.z_loss > 0 && b < kColumns; ++b) {
      target_sum[b] += 2 * ce.z_loss * (double(max[b]) + log_sum[b]);
    }
    for (int64_t b = 0; b < kColumns; ++b) {
      const double scale = row_scale[b] * ce.scale;
      factor[b] = A(target_sum[b] * scale / sum[b]);
      smooth_weight[b] = A(common_weight * scale);
      const double p = double(exp_shifted(target_logit[b] - max[b])) / sum[b];
      at_target[b] = A((p * target_sum[b] - target_q[b]) * scale);
    }
    for_tiles([&](int64_t c, int64_t k) {
      if (ce.dense()) load_soft_target(c, k);
      if (ce.classes > kTileClasses) {
        for (int64_t i = 0; i < k; ++i) exponentials(x[i], max, e[i], kColumns);
      }
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) e[i][b] *= factor[b];
      }
      for (int64_t i = 0; ce.dense() && i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) e[i][b] -= q[i][b] * smooth_weight[b];
      }
      for_targets(c, k, [&](int64_t i, int64_t b) { e[i][b] = at_target[b]; });
      clear_ignored(e, k);
      store_tile(e, ce.grad_logits, c, k);
    });
  }

  void write_probability_gradient() {
    const double grad_weight = ce.smooth_weight() * ce.prob_weight();
    alignas(kVectorBytes) A factor[kColumns], low[kColumns];
    for (int64_t b = 0; b < kColumns; ++b) {
      factor[b] = A(grad_weight * row_scale[b]);
      low[b] = A(log_sum[b]);
    }
    for_tiles([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        const A weight = ce.weight ? ce.weight[c + i] : A(1);
        for (int64_t b = 0; b < kColumns; ++b) {
          q[i][b] = factor[b] * weight * ((max[b] - x[i][b]) + low[b]);
        }
      }
      clear_ignored(q, k);
      store_tile(q, ce.grad_probabilities, c, k);
    });
  }
};

}  // namespace pyfused
