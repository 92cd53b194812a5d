// Activations, and the scaling of a gradient. The formulas are in activation_formulas.h.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "vec.h"

namespace pyfused {

using Parameters = std::array<double, 3>;  // a formula's numbers

// The output may be the input itself.
template <class T>
using ActivationForward = void(const T* input, T* output, const Parameters& parameters, int64_t n,
                               int threads);

// `saved` is the output or the input, as the formula needs. With step 0, one grad_output is
// broadcast.
template <class T>
using ActivationBackward = void(const T* grad_output, int64_t step, const T* saved, T* grad_input,
                                const Parameters& parameters, int64_t n, int threads);

template <template <class> class Function>
using OfEachDType =
    std::tuple<Function<float>*, Function<double>*, Function<bfloat16>*, Function<float16>*>;

struct ActivationFormula {
  const char* name;
  OfEachDType<ActivationForward> forward;
  OfEachDType<ActivationBackward> backward;
};

std::vector<ActivationFormula> activation_formulas();

// x *= factor: applies a grad_output to a gradient that was computed before it was known.
template <class T> void scale(T* x, Accumulate<T> factor, int64_t n, int threads);

}  // namespace pyfused
