// Runs kernels on several threads, and from several threads at once, under ThreadSanitizer. Results
// must be bitwise identical to those of one thread.
//
// ThreadSanitizer does not see the barriers in libgomp, and would report every parallel loop as a
// race. This program therefore does not use it: parallel.cpp finds the functions below instead.
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "activation.h"
#include "cross_entropy.h"
#include "embedding_loss.h"
#include "pointwise_loss.h"
#include "softmax.h"

// ---- OpenMP -------------------------------------------------------------------------------------

namespace {
thread_local int team_size = 1, team_member = 0;
}

extern "C" int omp_get_max_threads() { return 5; }
extern "C" void omp_set_num_threads(int) {}
extern "C" int omp_get_thread_num() { return team_member; }
extern "C" int omp_in_parallel() { return team_size > 1; }

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned, unsigned) {
  const int threads = omp_get_max_threads();
  const auto work = [=](int member) {
    team_size = threads;
    team_member = member;
    body(data);
    team_size = 1;
    team_member = 0;
  };
  std::vector<std::thread> others;
  for (int member = 1; member < threads; ++member) others.emplace_back(work, member);
  work(0);
  for (std::thread& other : others) other.join();
}

// ---- the kernels --------------------------------------------------------------------------------

namespace {

using namespace pyfused;

template <class T> std::vector<T> numbers(size_t n, unsigned seed) {
  std::vector<T> values(n);
  for (T& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = narrow<T>(Accumulate<T>(seed >> 8) / (1 << 22) - 2);
  }
  return values;
}

template <class T> void append(std::string& bytes, const std::vector<T>& values) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

struct Shape {
  int64_t outer, inner, classes;
  bool classes_contiguous;
  template <class T> View<T> view(T* data) const {
    return classes_contiguous ? View<T>{data, inner * classes, classes, 1}
                              : View<T>{data, inner * classes, 1, inner};
  }
};

// Rows; columns, contiguous or transposed; more targets than one block counts.
constexpr Shape kShapes[] = {
    {1, 150, 300, true}, {1, 50, 2100, true}, {3, 130, 11, false}, {1, 17000, 3, true}};

template <class T> void run_cross_entropy(std::string& bytes, const Shape& shape, int threads) {
  using A = Accumulate<T>;
  const int64_t positions = shape.outer * shape.inner, n = positions * shape.classes;
  const std::vector<T> logits = numbers<T>(n, 1), probabilities = numbers<T>(n, 2);
  const std::vector<A> weight = numbers<A>(shape.classes, 3),
                       grad_output = numbers<A>(positions, 4);
  std::vector<int64_t> target(positions);
  for (int64_t i = 0; i < positions; ++i) target[i] = i % 7 ? i * 31 % shape.classes : -100;
  for (const Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
    for (const bool dense : {false, true}) {
      std::vector<T> grad_logits(n), grad_probabilities(dense ? n : 0);
      std::vector<A> loss(reduction == Reduction::none ? positions : 1);
      T* const none = nullptr;
      cross_entropy(CrossEntropy<T>{{shape.outer, shape.inner, shape.classes},
                                    {-100, reduction, reduction == Reduction::mean ? 0.1 : 0.0},
                                    shape.view(logits.data()),
                                    dense ? nullptr : target.data(),
                                    shape.view(dense ? probabilities.data() : none),
                                    weight.data(),
                                    grad_output.data(),
                                    loss.data(),
                                    shape.view(grad_logits.data()),
                                    shape.view(dense ? grad_probabilities.data() : none),
                                    threads});
      append(bytes, loss);
      append(bytes, grad_logits);
      append(bytes, grad_probabilities);
    }
  }
  target[positions / 2] = target[positions - 1] = shape.classes;
  const int64_t out_of_range =
      cross_entropy(CrossEntropy<T>{{shape.outer, shape.inner, shape.classes},
                                    {-100, Reduction::sum},
                                    shape.view(logits.data()),
                                    target.data(),
                                    {},
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    {},
                                    {},
                                    threads});
  append(bytes, std::vector<int64_t>{out_of_range});
}

template <class T> void run_class_losses(std::string& bytes, const Shape& shape, int threads) {
  using A = Accumulate<T>;
  const int64_t positions = shape.outer * shape.inner, n = positions * shape.classes;
  const std::vector<T> input = numbers<T>(n, 8);
  const std::vector<A> weight = numbers<A>(shape.classes, 9),
                       grad_output = numbers<A>(positions, 10);
  std::vector<int64_t> target(positions);
  for (int64_t i = 0; i < positions; ++i) target[i] = i * 31 % shape.classes;
  for (const Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
    std::vector<T> nll_gradient(n);
    std::vector<A> nll(reduction == Reduction::none ? positions : 1);
    nll_loss(CrossEntropy<T>{{shape.outer, shape.inner, shape.classes},
                             {-100, reduction},
                             shape.view(input.data()),
                             target.data(),
                             {},
                             weight.data(),
                             grad_output.data(),
                             nll.data(),
                             shape.view(nll_gradient.data()),
                             {},
                             threads});
    append(bytes, nll);
    append(bytes, nll_gradient);
  }
}

template <class T> void run_embeddings(std::string& bytes, const Shape& shape, int threads) {
  using A = Accumulate<T>;
  const int64_t rows = shape.outer * shape.inner, features = shape.classes, n = rows * features;
  const std::vector<T> x = numbers<T>(n, 13), y = numbers<T>(n, 14), z = numbers<T>(n, 15);
  const std::vector<A> grad_output = numbers<A>(rows, 16);
  std::vector<A> target(rows);
  for (int64_t i = 0; i < rows; ++i) target[i] = A(i % 3 - 1);
  for (const bool each : {false, true}) {
    std::vector<A> losses(each ? rows : 1);
    std::vector<T> grad_x(n), grad_y(n), grad_z(n);
    EmbeddingLoss<T> e{{0.5, 1e-6, each, each, each},
                       rows,
                       features,
                       {{{x.data(), features}, {y.data(), features}, {z.data(), features}}},
                       target.data(),
                       1,
                       1.0,
                       grad_output.data(),
                       each ? losses.data() : nullptr,
                       each ? nullptr : losses.data(),
                       {grad_x.data(), grad_y.data(), grad_z.data()},
                       threads};
    const auto keep = [&] {
      append(bytes, losses);
      append(bytes, grad_x);
      append(bytes, grad_y);
      append(bytes, grad_z);
    };
    triplet_margin_loss(e);
    keep();
    e.gradients[2] = nullptr;
    cosine_embedding_loss(e);
    keep();
  }
}

template <class T> void run_softmax(std::string& bytes, const Shape& shape, int threads) {
  const int64_t n = shape.outer * shape.inner * shape.classes;
  const std::vector<T> input = numbers<T>(n, 11), grad_output = numbers<T>(n, 12);
  for (const bool logarithm : {false, true}) {
    std::vector<T> output(n), gradient(n);
    const Positions sizes{shape.outer, shape.inner, shape.classes};
    softmax(Softmax<T>{
        sizes, logarithm, shape.view(input.data()), {}, shape.view(output.data()), threads});
    const T* const y = output.data();
    softmax(Softmax<T>{sizes, logarithm, shape.view(y), shape.view(grad_output.data()),
                       shape.view(gradient.data()), threads});
    append(bytes, output);
    append(bytes, gradient);
  }
}

template <class T> void run_pointwise(std::string& bytes, int threads) {
  using A = Accumulate<T>;
  constexpr int64_t n = 70003;  // not a multiple of the block size
  const std::vector<T> x = numbers<T>(n, 5), t = numbers<T>(n, 6), weight = numbers<T>(n, 7);
  for (const LossFormula& formula : loss_formulas()) {
    for (const bool each : {false, true}) {
      std::vector<T> losses(each ? n : 0), grad_input(n), grad_target(n);
      std::vector<A> reduced(1);
      pointwise_loss(formula, PointwiseLoss<T>{
                                  n,
                                  {{{x.data(), 1, {}}, {t.data(), 1, {}}, {weight.data(), 1, {}}}},
                                  {1.0, 0.5},
                                  {each ? weight.data() : nullptr, each, {}},
                                  each ? 1.0 : n,
                                  {weight.data(), each, {}},
                                  each ? losses.data() : nullptr,
                                  each ? nullptr : reduced.data(),
                                  {grad_input.data(), grad_target.data(), nullptr},
                                  threads,
                                  {}});
      append(bytes, losses);
      append(bytes, reduced);
      append(bytes, grad_input);
      append(bytes, grad_target);
    }
  }
  std::vector<T> output(n), grad(n);
  const Order order{137, {n / 137}};
  for (const ActivationFormula& formula : activation_formulas()) {
    for (const Sizes& row_steps : {Sizes(), Sizes{1}}) {  // contiguous and transposed
      const Operand<T> input{x.data(), row_steps.empty() ? 1 : n / 137, row_steps};
      activation(formula, input, output.data(), {1.0}, n, threads, order);
      activation_backward(formula, {t.data(), 1, {}}, input, grad.data(), {1.0}, n, threads, order);
      append(bytes, output);
      append(bytes, grad);
    }
  }
  scale(grad.data(), A(0.3), n, threads);
  append(bytes, grad);
}

std::string results(int threads) {
  std::string bytes;
  const auto run = [&](auto element) {
    using T = decltype(element);
    for (const Shape& shape : kShapes) {
      run_cross_entropy<T>(bytes, shape, threads);
      run_class_losses<T>(bytes, shape, threads);
      run_embeddings<T>(bytes, shape, threads);
      run_softmax<T>(bytes, shape, threads);
    }
    run_pointwise<T>(bytes, threads);
  };
  run(float{});
  run(double{});
  run(bfloat16{});
  run(float16{});
  return bytes;
}

}  // namespace

int main() {
  const std::string expected = results(1);
  bool same = true;
  for (const int threads : {2, 5}) same &= results(threads) == expected;

  std::vector<std::string> at_once(3);
  std::vector<std::thread> callers;
  for (std::string& bytes : at_once) callers.emplace_back([&] { bytes = results(2); });
  for (std::thread& caller : callers) caller.join();
  for (const std::string& bytes : at_once) same &= bytes == expected;

  std::printf("%zu bytes of results, %s\n", expected.size(), same ? "the same" : "NOT the same");
  return same ? 0 : 1;
}
