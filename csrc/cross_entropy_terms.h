// What cross-entropy computes, and the arguments it computes it from.
//
//   lse     = log sum_c exp(x_c) = max + log sum_c exp(x_c - max)
//   q_c     = level weight_c (slope y_c + offset) + one_hot [c = target]     the soft target
//   loss    = sum_c q_c (lse - x_c)
//   dloss/dx_c = p_c sum_k q_k - q_c,    p_c = exp(x_c - lse)
//   dloss/dy_c = level slope weight_c (lse - x_c)
//
//   class index:    level = smoothing / C,  slope = 0,  offset = 1,  one_hot = (1 - smoothing) weight_t
//   probabilities:  level = 1 - smoothing,  slope = 1,  offset = smoothing / C / level,  one_hot = 0
//   (smoothing 1:   level = 1 / C,          slope = 0,  offset = 1)
//
// The logits may be those of some classes alone, a block of columns of a larger matrix. Then the loss is
// the sum over these classes, with their own lse or with that of all classes, where it is given.
//
// With z_loss the loss has z_loss lse^2 more, and dloss/dx_c has 2 z_loss lse p_c more.
//
// With a scale x stands for scale times the logits, whose gradient is scale dloss/dx.
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
#include <optional>

#include "positions.h"
#include "vec.h"

namespace pyfused {

enum class Reduction { none = 0, mean = 1, sum = 2 };

// The classes of the logits as a shard of the vocabulary: the first of them, and the number of all.
struct VocabShard { int64_t first, all; };

// Python passes the fields by name; pyfused/types.py has the same.
struct CrossEntropyOptions {
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::mean;
  double label_smoothing = 0;
  double gamma = 0;
  double z_loss = 0;
  double scale = 1;           // of the logits
  int64_t token_weight = 0;   // address of one A a position, which multiplies its loss; 0 for ones
  std::optional<double> denominator;  // of the mean; none: the weight of the targets that count

  template <class Visit> void for_each(const Visit& visit) {
    visit("ignore_index", ignore_index);
    visit("reduction", reduction);
    visit("label_smoothing", label_smoothing);
    visit("gamma", gamma);
    visit("z_loss", z_loss);
    visit("scale", scale);
    visit("token_weight", token_weight);
    visit("denominator", denominator);
  }
};

template <class T> struct CrossEntropy : Positions, CrossEntropyOptions {
  using A = Accumulate<T>;
  View<const T> logits;
  const int64_t* target;        // one class index a position, or null:
  View<const T> probabilities;  // one distribution a position
  const A* weight;              // one for each of all classes, or null for ones
  const A* grad_output;  // the loss's gradient: one a position for none, else one; null for ones
  A* loss;            // one a position for none, else one; null where not wanted
  View<T> grad_logits;         // data is null where not wanted
  View<T> grad_probabilities;  // likewise
  int threads;

  const A* token_weights = reinterpret_cast<const A*>(this->token_weight);
  VocabShard shard{0, this->classes};
  const double* lse = nullptr;  // of all classes, one a position; null for that of these

  double* own_lse = nullptr;      // of these classes, one a position; null where not wanted
  double* entropy = nullptr;      // of their probabilities, likewise
  int64_t* prediction = nullptr;  // the first of them with the largest logit, with entropy

  bool dense() const { return target == nullptr || label_smoothing > 0; }
  double uniform() const { return label_smoothing / double(shard.all); }
  bool follows_probabilities() const { return !target && label_smoothing < 1; }
  double level() const { return follows_probabilities() ? 1 - label_smoothing : uniform(); }
  A slope() const { return A(follows_probabilities()); }
  A offset() const { return follows_probabilities() ? A(uniform() / level()) : A(1); }
  bool ignored(int64_t position) const { return target && target[position] == ignore_index; }
  int64_t label(int64_t position) const { return target[position] - shard.first; }
  bool has_target(int64_t position) const { return target && uint64_t(label(position)) < uint64_t(classes); }
  const A* class_weight() const { return weight ? weight + shard.first : nullptr; }
  double one_hot(int64_t position) const {
    return weight ? (1 - label_smoothing) * double(weight[target[position]]) : 1 - label_smoothing;
  }
  double target_q(int64_t position) const {  // q at the target
    const double one = weight ? double(weight[target[position]]) : 1;
    return label_smoothing > 0 ? uniform() * one + one_hot(position) : one_hot(position);  // 0 * inf is NaN
  }
};

// With what is summed up over the batch first. The few numbers of a row are doubles, so that only its
// vectors are rounded to A.
template <class T> struct Scaled : CrossEntropy<T> {
  double uniform_sum;  // uniform * sum_c weight_c, over the classes that lse is of
  double denominator;
  double common;  // the scale of all positions; a division for each costs as much as an exponential
  bool streams;   // gradients too large to stay in cache are written past it

  Scaled(const CrossEntropy<T>& ce, double uniform_sum, double denominator, bool streams)
      : CrossEntropy<T>(ce), uniform_sum(uniform_sum), denominator(denominator),
        common((ce.grad_output ? double(*ce.grad_output) : 1) / denominator), streams(streams) {}

  bool scales_each() const {
    return this->token_weights || (this->grad_output && this->reduction == Reduction::none);
  }
  double row_scale(int64_t position) const {
    const bool each = this->grad_output && this->reduction == Reduction::none;
    const double scale = each ? double(this->grad_output[position]) / denominator : common;
    return this->token_weights ? scale * double(this->token_weights[position]) : scale;
  }
  // Of a target elsewhere: it counts for the gradient of lse, and not for a loss of these classes.
  bool counts(int64_t position) const { return this->lse || this->has_target(position); }
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

// What q_c is without its level and its one-hot part.
template <class A> PYFUSED_INLINE A soft_target(A weight, A probability, A slope, A offset) {
  return weight * (slope * probability + offset);
}

}  // namespace pyfused
