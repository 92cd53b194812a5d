// Losses of embeddings: rows of features of several tensors, reduced to a few sums for each row.
//
//   triplet   loss = max(0, margin + |u| - |v|)
//             u = x - y + eps, v = x - z + eps, w = y - z + eps
//             with swap, min(|v|, |w|) replaces |v|; |u| = sum_i |u_i|, or with `euclidean`
//             |u| = sqrt(sum_i u_i^2)
//             dloss/dx = u' - v', dloss/dy = -u', dloss/dz = v',    u'_i = u_i / |u| or sign u_i
//             where swap selects |w|: dloss/dx = u', dloss/dy = -u' - w', dloss/dz = w'
//   cosine    loss = 1 - cos for target 1, max(0, cos - margin) for -1, and 0 for others
//             cos = x.y / sqrt(X Y),    X = x.x + 1e-12, Y = y.y + 1e-12
//             dcos/dx = y / sqrt(X Y) - cos x / X,    dcos/dy = x / sqrt(X Y) - cos y / Y
//
// torch: F.triplet_margin_loss(x, y, z, margin=..., p=..., eps=..., swap=...)
//        F.cosine_embedding_loss(x, y, target, margin=...)
//
// Shapes: each is (N, D) with contiguous features. Memory traffic: each input is read once and each
// gradient is written once; the second read hits the cache.
#pragma once

#include <array>

#include "cross_entropy.h"

namespace pyfused {

struct EmbeddingOptions {
  double margin, eps;
  bool euclidean, swap;
  bool inclusive;  // whether the derivative of max(0, x) at 0 is 1 rather than 0
};

template <class T> struct EmbeddingLoss : EmbeddingOptions {
  using A = Accumulate<T>;
  struct Rows {
    const T* data;
    int64_t stride;
  };

  int64_t rows, features;
  std::array<Rows, 3> inputs;  // x, y and z
  const A* target;
  int64_t target_stride;
  double denominator;  // divides the sum of the losses, and the gradients
  const A* grad_output;  // one for each row; null for ones
  A* losses;  // one for each row; null if not computed
  A* sum;  // their sum; null if not computed
  std::array<T*, 3> gradients;  // (N, D), dense; null if not computed
  int threads;
};

template <class T> void triplet_margin_loss(const EmbeddingLoss<T>& e);
template <class T> void cosine_embedding_loss(const EmbeddingLoss<T>& e);

}  // namespace pyfused
