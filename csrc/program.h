// A user's formula as a program: instructions, each a loop over a chunk of 1,024 elements. Loops
// are vectorised, except pow of doubles and sin and cos of large numbers, which call the C library.
// A register takes 4 KiB, or 8 KiB of doubles: chunks of a program with few registers stay in L1.
// Chunks of 512, 256 and 128 elements took 1.03 to 1.07, 1.04 to 1.15 and 1.10 to 1.32 times as
// long, in the median of ten formulas, because instructions are looked up and called more often.
//
// formula_compiler/program.py generates programs. A slot is the number of an operand (0 to 3), the
// value (4), a gradient (5 to 8), a register (9 to 72), or a constant. Constants are the scale of
// the gradients, the formula's parameters, literals, and values that the prologue computes from
// these once for each call, in the type of the operands. pointwise_loss.cpp loads and rounds, and
// applies weights, grad_output and sums.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "pointwise_loss.h"
#include "vec.h"

namespace pyfused {

constexpr int kProgramRegisters = 64, kProgramConstants = 256;  // at most
constexpr int kValueSlot = kOperands, kFirstRegister = kValueSlot + 1 + kOperands;
constexpr int kFirstConstant = kFirstRegister + kProgramRegisters;

// name, number of operands, and the result from a, b, c and d. Comparisons are 1 or 0. NaN passes
// through minimum and maximum, as in torch. pow_less is b**c, given a = b**(c + 1).
#define PYFUSED_INSTRUCTIONS(X)                     \
  X(copy, 1, a)                                     \
  X(neg, 1, -a)                                     \
  X(abs, 1, std::abs(a))                            \
  X(floor, 1, std::floor(a))                        \
  X(sign, 1, a > 0 ? A(1) : a < 0 ? A(-1) : A(0))   \
  X(reciprocal, 1, 1 / a)                           \
  X(sqrt, 1, std::sqrt(a))                          \
  X(rsqrt, 1, 1 / std::sqrt(a))                     \
  X(exp, 1, exp_of(a))                              \
  X(expm1, 1, expm1_of(a))                          \
  X(log, 1, log_of(a))                              \
  X(log1p, 1, log1p_of(a))                          \
  X(sin, 1, sine_of<0>(a))                          \
  X(cos, 1, sine_of<1>(a))                          \
  X(tanh, 1, tanh_of(a))                            \
  X(erf, 1, erf_of(a))                              \
  X(ndtr, 1, (Normal<A, true>(a).below))            \
  X(density, 1, (Normal<A, true>(a).density))       \
  X(decay, 1, a == a ? pyfused::decay(a) : a)       \
  X(sigmoid_from, 2, pyfused::sigmoid_from(a, b))   \
  X(sigmoid_or_zero, 2, torch_sigmoid(a, b))        \
  X(softplus_from, 2, pyfused::softplus_from(a, b)) \
  X(add, 2, a + b)                                  \
  X(sub, 2, a - b)                                  \
  X(mul, 2, a* b)                                   \
  X(div, 2, a / b)                                  \
  X(pow, 2, pow_of(a, b))                           \
  X(pow_less, 3, a / b)                             \
  X(minimum, 2, b < a || b != b ? b : a)            \
  X(maximum, 2, b > a || b != b ? b : a)            \
  X(lt, 2, A(a < b))                                \
  X(le, 2, A(a <= b))                               \
  X(eq, 2, A(a == b))                               \
  X(muladd, 3, c + a * b)                           \
  X(mulsub, 3, -c + a * b)                          \
  X(submul, 3, c - a * b)                           \
  X(where, 3, a != 0 ? b : c)                       \
  X(where_lt, 4, a < b ? c : d)                     \
  X(where_le, 4, a <= b ? c : d)                    \
  X(where_eq, 4, a == b ? c : d)

// torch's sigmoid, which is 0 where exp(-x) overflows; decay = exp(-|x|).
template <class A> PYFUSED_INLINE A torch_sigmoid(A decay, A x) {
  constexpr A kLeast = A(sizeof(A) == 4 ? 0x1p-128 : 0x1p-1024);
  return (x < 0) & (decay < kLeast) ? A(0) : sigmoid_from(decay, x);
}

struct Instruction {
  int opcode;
  unsigned constants;  // bit k: operand k is a constant
  int out;  // a slot
  std::array<int, 4> in;  // unused operands repeat the first
};

template <class A> using Inputs = std::array<const A*, 4>;
template <class A> using InstructionLoop = void (*)(A* out, const Inputs<A>& in, int64_t n);

// The loops of an instruction, indexed by `constants`.
template <class A> using InstructionRow = std::array<InstructionLoop<A>, 16>;

namespace instructions {
#define PYFUSED_INSTRUCTION(name, count, result)                                                   \
  struct name##_ {                                                                                 \
    static constexpr int operands = count;                                                         \
    template <class A> static PYFUSED_INLINE A of(A a, [[maybe_unused]] A b, [[maybe_unused]] A c, \
                                                  [[maybe_unused]] A d) {                          \
      return result;                                                                               \
    }                                                                                              \
  };
PYFUSED_INSTRUCTIONS(PYFUSED_INSTRUCTION)
#undef PYFUSED_INSTRUCTION
}  // namespace instructions

// Whether quotients of such numbers are accurate; false for NaN.
template <class A> PYFUSED_INLINE int is_moderate(A x) { return (x > 0x1p-60f) & (x < 0x1p60f); }

// The output may be one of the inputs.
template <class F, class A, unsigned constants>
PYFUSED_FLATTEN void instruction_loop(A* out, const Inputs<A>& in, int64_t n) {
  const A *const a = in[0], *const b = in[1], *const c = in[2], *const d = in[3];
  const auto at = [](int k, int64_t i) { return constants >> k & 1 ? 0 : i; };
  constexpr bool sine = std::is_same_v<F, instructions::sin_>;
  if constexpr (sine || std::is_same_v<F, instructions::cos_>) {
    int far = 0;
    PYFUSED_SIMD(reduction(| : far))
    for (int64_t i = 0; i < n; ++i) far |= std::abs(a[at(0, i)]) > kMostSine<A>;
    if (far) {
      for (int64_t i = 0; i < n; ++i) out[i] = sine ? std::sin(a[at(0, i)]) : std::cos(a[at(0, i)]);
      return;
    }
  }
  if constexpr (std::is_same_v<F, instructions::pow_less_>) {
    int extremes = 0;
    PYFUSED_SIMD(reduction(| : extremes))
    for (int64_t i = 0; i < n; ++i) {
      extremes |= !(is_moderate(a[at(0, i)]) & is_moderate(b[at(1, i)]));
    }
    constexpr unsigned of_pow = 12 | (constants >> 1 & 3);
    if (extremes) return instruction_loop<instructions::pow_, A, of_pow>(out, {b, c, b, b}, n);
  }
  const A a0 = *a, b0 = *b, c0 = *c, d0 = *d;
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    out[i] = F::template of<A>(constants & 1 ? a0 : a[i], constants & 2 ? b0 : b[i],
                               constants & 4 ? c0 : c[i], constants & 8 ? d0 : d[i]);
  }
}

// Operands that do not exist are treated as constants, of which one element is read.
template <class F, class A, unsigned... constants>
constexpr InstructionRow<A> instruction_row(std::integer_sequence<unsigned, constants...>) {
  constexpr unsigned none = 15u & ~((1u << F::operands) - 1);
  return {&instruction_loop<F, A, constants | none>...};
}

template <class A> const InstructionRow<A>* instruction_rows() {
#define PYFUSED_ROW(name, count, result) \
  instruction_row<instructions::name##_, A>(std::make_integer_sequence<unsigned, 16>{}),
  static constexpr InstructionRow<A> rows[] = {PYFUSED_INSTRUCTIONS(PYFUSED_ROW)};
#undef PYFUSED_ROW
  return rows;
}
extern template const InstructionRow<float>* instruction_rows();  // in pointwise_loss.cpp
extern template const InstructionRow<double>* instruction_rows();

#define PYFUSED_NAME(name, count, result) #name,
constexpr const char* kInstructions[] = {PYFUSED_INSTRUCTIONS(PYFUSED_NAME)};
#undef PYFUSED_NAME

#define PYFUSED_COUNT(name, count, result) count,
constexpr size_t kInstructionOperands[] = {PYFUSED_INSTRUCTIONS(PYFUSED_COUNT)};
#undef PYFUSED_COUNT

struct Program {
  std::vector<Instruction> prologue, body;
  std::vector<double> constants;  // the scale and the parameters are filled in by a call
  size_t parameters;
};

// A program with the numbers of a call, evaluated like a LossFormula.
class ProgramFormula {
 public:
  ProgramFormula(const Program& program, const std::vector<double>& parameters, double denominator)
      : body_(program.body) {
    auto& [doubles, floats] = constants_;
    doubles = program.constants;
    if (parameters.size() != program.parameters) {
      throw std::invalid_argument("parameters: expected " + std::to_string(program.parameters) +
                                  ", got " + std::to_string(parameters.size()));
    }
    doubles[0] = 1 / denominator;
    std::copy(parameters.begin(), parameters.end(), doubles.begin() + 1);
    floats.assign(doubles.begin(), doubles.end());
    compute(program.prologue, doubles);
    compute(program.prologue, floats);
    for (const Instruction& each : body_) {
      registers_ = std::max(registers_, each.out - kFirstRegister + 1);
    }
  }

  static constexpr bool kSums = false;
  static constexpr int64_t kChunk = 1024;  // elements of a register

  template <class A> struct Registers {
    alignas(kVectorBytes) A values[kProgramRegisters][kChunk];
  };

  template <class A>
  void evaluate(const Parameters&, const LossChunk<A>& chunk, Registers<A>& registers) const {
    const std::vector<A>& constants = std::get<std::vector<A>>(constants_);
    std::array<const A*, kFirstConstant + kProgramConstants> slots;
    for (int k = 0; k < kOperands; ++k) {
      slots[k] = chunk.operands[k];
      slots[kValueSlot + 1 + k] = chunk.gradients[k];
    }
    slots[kValueSlot] = chunk.value;
    for (int i = 0; i < registers_; ++i) slots[kFirstRegister + i] = registers.values[i];
    for (size_t i = 0; i < constants.size(); ++i) slots[kFirstConstant + i] = &constants[i];
    for (const auto& [opcode, constant, to, from] : body_) {
      const Inputs<A> in{slots[from[0]], slots[from[1]], slots[from[2]], slots[from[3]]};
      instruction_rows<A>()[opcode][constant](const_cast<A*>(slots[to]), in, chunk.n);
    }
  }

 private:
  template <class A>
  static void compute(const std::vector<Instruction>& prologue, std::vector<A>& constants) {
    for (const Instruction& each : prologue) {
      Inputs<A> in;
      for (int k = 0; k < 4; ++k) in[k] = &constants[each.in[k] - kFirstConstant];
      instruction_rows<A>()[each.opcode][0](&constants[each.out - kFirstConstant], in, 1);
    }
  }

  const std::vector<Instruction>& body_;
  std::tuple<std::vector<double>, std::vector<float>> constants_;
  int registers_ = 0;
};

}  // namespace pyfused
