#include "activation.h"

#include <algorithm>

#include "activation_formulas.h"
#include "parallel.h"

namespace pyfused {

constexpr int64_t kActivationBlock = 1 << 14;  // elements a thread takes at a time
constexpr int64_t kActivationChunk = 512;      // elements at a time, in L1

template <class T, class Value>
void map(T* output, int64_t n, int threads, const Value& value) {
  const int64_t blocks = (n + kActivationBlock - 1) / kActivationBlock;
  parallel_for(blocks, threads, [=](int64_t block) {
    const int64_t end = std::min(n, (block + 1) * kActivationBlock);
    for (int64_t first = block * kActivationBlock; first < end; first += kActivationChunk) {
      const int64_t count = std::min(kActivationChunk, end - first);
      alignas(kVectorBytes) Accumulate<T> buffer[kActivationChunk];
      Accumulate<T>* const out = staged(output + first, buffer);
      PYFUSED_SIMD()
      for (int64_t i = 0; i < count; ++i) out[i] = value(first + i);
      store(out, output + first, count);
    }
  });
}

template <class T> void scale(T* x, Accumulate<T> factor, int64_t n, int threads) {
  if (factor == 1) return;
  map(x, n, threads, [=](int64_t i) { return factor * widen(x[i]); });
}

template <template <class> class Formula, class T>
void activation(const T* input, T* output, const Parameters& parameters, int64_t n, int threads) {
  const Formula<Accumulate<T>> f(parameters);
  map(output, n, threads, [=](int64_t i) { return f.forward(widen(input[i])); });
}

template <template <class> class Formula, class T>
void activation_backward(const T* grad_output, int64_t step, const T* saved, T* grad_input,
                         const Parameters& parameters, int64_t n, int threads) {
  const Formula<Accumulate<T>> f(parameters);
  const Accumulate<T> first = widen(*grad_output);
  if (step == 0) {
    map(grad_input, n, threads, [=](int64_t i) { return f.backward(first, widen(saved[i])); });
  } else {
    map(grad_input, n, threads,
        [=](int64_t i) { return f.backward(widen(grad_output[i]), widen(saved[i])); });
  }
}

template <template <class> class Formula> ActivationFormula named(const char* name) {
  return {name,
          {activation<Formula, float>, activation<Formula, double>, activation<Formula, bfloat16>,
           activation<Formula, float16>},
          {activation_backward<Formula, float>, activation_backward<Formula, double>,
           activation_backward<Formula, bfloat16>, activation_backward<Formula, float16>}};
}

std::vector<ActivationFormula> activation_formulas() {
  return {
      named<Relu>("relu"), named<LeakyRelu>("leaky_relu"), named<Sigmoid>("sigmoid"),
      named<Tanh>("tanh"), named<Softcap>("softcap"),      named<Silu>("silu"),
      named<Gelu>("gelu"), named<GeluTanh>("gelu_tanh"),
  };
}

template void scale(float*, Accumulate<float>, int64_t, int);
template void scale(double*, Accumulate<double>, int64_t, int);
template void scale(bfloat16*, Accumulate<bfloat16>, int64_t, int);
template void scale(float16*, Accumulate<float16>, int64_t, int);

}  // namespace pyfused
