// What cross-entropy computes, and the arguments it computes it from.
//
//   lse     = log sum_c exp(x_c) = max + log sum_c exp(x_c - max)
//   q_c     = level weight_c (slope y_c + offset) + spike [c = target]     what the row aims at
//   loss    = sum_c q_c (lse - x_c)
//   dloss/dx_c = p_c sum_k q_k - q_c,    p_c = exp(x_c - lse)
//   dloss/dy_c = level slope weight_c (lse - x_c)
//
//   class index:    level = smoothing / C,  slope = 0,  offset = 1,  spike = (1 - smoothing) weight_t
//   probabilities:  level = 1 - smoothing,  slope = 1,  offset = smoothing / C / level,  spike = 0
//   (smoothing 1:   level = 1 / C,          slope = 0,  offset = 1)
//
// Focal loss, of class indices without smoothing: with nll = lse - x_t and p = exp(-nll), the loss is
// weight_t (1 - p)^gamma nll, and the gradients are those above times
//   (1 - p)^gamma + gamma (1 - p)^(gamma - 1) p nll
//
// The level is applied to sums, in double: rounded to a float it would bias all of them alike.
//
// torch: F.cross_entropy(x, target, weight, ignore_index=..., label_smoothing=..., reduction=...)
//
// Shapes: x is (N, C, d1, ..., dk). Bytes: the logits are read once from memory and the gradient written
// once; what is read again is in cache.
#pragma once

#include <cmath>
#include <cstdint>

#include "positions.h"
#include "vec.h"

namespace pyfused {

enum class Reduction { none = 0, mean = 1, sum = 2 };

template <class T> struct CrossEntropy : Positions {
  using A = Accumulate<T>;
  View<const T> logits;
  const int64_t* target;        // one class index a position, or null:
  View<const T> probabilities;  // one distribution a position
  const A* weight;              // one a class, or null for ones
  int64_t ignore_index;
  double smoothing;
  double gamma;
  Reduction reduction;
  const A* upstream;  // the loss's gradient: one a position for none, else one; null for ones
  A* loss;            // one a position for none, else one; null where not wanted
  View<T> grad_logits;         // data is null where not wanted
  View<T> grad_probabilities;  // likewise
  int threads;

  bool dense() const { return target == nullptr || smoothing > 0; }
  double uniform() const { return smoothing / double(classes); }
  bool follows_probabilities() const { return !target && smoothing < 1; }
  double level() const { return follows_probabilities() ? 1 - smoothing : uniform(); }
  A slope() const { return A(follows_probabilities()); }
  A offset() const { return follows_probabilities() ? A(uniform() / level()) : A(1); }
  bool ignored(int64_t position) const { return target && target[position] == ignore_index; }
  double spike(int64_t position) const {
    return weight ? (1 - smoothing) * double(weight[target[position]]) : 1 - smoothing;
  }
  double hit_aim(int64_t position) const {  // q at the target
    const double one = weight ? double(weight[target[position]]) : 1;
    return smoothing > 0 ? uniform() * one + spike(position) : spike(position);  // 0 * inf is NaN
  }
};

// With what is summed up over the batch first. The few numbers of a row are doubles, so that only its
// vectors are rounded to A.
template <class T> struct Scaled : CrossEntropy<T> {
  double uniform_mass;  // uniform * sum_c weight_c
  double denominator;
  double common;  // the scale of all positions; a division for each costs as much as an exponential
  bool streams;   // gradients too large to stay in cache are written past it

  Scaled(const CrossEntropy<T>& ce, double uniform_mass, double denominator, bool streams)
      : CrossEntropy<T>(ce), uniform_mass(uniform_mass), denominator(denominator),
        common((ce.upstream ? double(*ce.upstream) : 1) / denominator), streams(streams) {}

  double scale(int64_t position) const {
    const bool each = this->upstream && this->reduction == Reduction::none;
    return each ? double(this->upstream[position]) / denominator : common;
  }
};

// What focal loss multiplies the loss and its gradients by.
struct Focus {
  double loss = 1, gradient = 1;

  Focus() = default;
  Focus(double gamma, double nll) {
    nll = nll < 0 ? 0 : nll;  // by a rounding
    const double missing = -std::expm1(-nll), p = 1 - missing;
    loss = std::pow(missing, gamma);
    gradient = loss * (1 + gamma * p * (missing > 0 ? nll / missing : 1));
  }
};

// What q_c is but for its level and its spike.
template <class A> PYFUSED_INLINE A aim(A weight, A probability, A slope, A offset) {
  return weight * (slope * probability + offset);
}

}  // namespace pyfused
