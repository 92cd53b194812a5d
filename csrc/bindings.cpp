// The Python module. Its functions take addresses, strides and sizes, and write results to memory
// that the caller allocated. setup.py compiles it once, for the oldest instruction set, and links
// it with the kernels of each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "activation.h"
#include "cross_entropy.h"
#include "dlpack.h"
#include "embedding_loss.h"
#include "kl_div_with_logits.h"
#include "memory.h"
#include "parallel.h"
#include "pointwise_loss.h"
#include "program.h"
#include "row_state.h"
#include "softmax.h"
#include "target_statistics.h"

namespace pyfused {

// ---- structs that tuples of Python are read into ------------------------------------------------

// `fields` lists the fields in the order of the tuple, which cpu.py makes with the same names.
// Tensors are addresses, 0 if there is none.

struct ViewTuple {
  int64_t address, outer, inner, classes;  // the last three are strides
};
inline auto fields(ViewTuple& v) { return std::tie(v.address, v.outer, v.inner, v.classes); }

struct StridedTuple {
  int64_t address, stride;
};
inline auto fields(StridedTuple& s) { return std::tie(s.address, s.stride); }

struct CrossEntropyInputs {
  ViewTuple logits;
  int64_t target;
  ViewTuple probabilities;
  int64_t weight, token_weight, grad_output;
};
inline auto fields(CrossEntropyInputs& i) {
  return std::tie(i.logits, i.target, i.probabilities, i.weight, i.token_weight, i.grad_output);
}

inline auto fields(CrossEntropyOptions& o) {
  return std::tie(o.ignore_index, o.reduction, o.label_smoothing, o.gamma, o.z_loss, o.scale,
                  o.normalized, o.denominator);
}

struct CrossEntropyOutputs {
  int64_t loss;
  ViewTuple grad_logits, grad_probabilities;
  int64_t prediction;
  std::array<int64_t, 5> metrics;
};
inline auto fields(CrossEntropyOutputs& o) {
  return std::tie(o.loss, o.grad_logits, o.grad_probabilities, o.prediction, o.metrics);
}

struct KlDivInputs {
  StridedTuple student, teacher;
  int64_t token_weight, grad_output;
};
inline auto fields(KlDivInputs& i) {
  return std::tie(i.student, i.teacher, i.token_weight, i.grad_output);
}

struct KlDivOptions {
  double beta, scale;
  Reduction reduction;
  std::optional<double> denominator;
};
inline auto fields(KlDivOptions& o) {
  return std::tie(o.beta, o.scale, o.reduction, o.denominator);
}

struct KlDivOutputs {
  int64_t loss;
  StridedTuple grad;
};
inline auto fields(KlDivOutputs& o) { return std::tie(o.loss, o.grad); }

struct PointwiseOutputs {
  int64_t unreduced, reduced;
  std::array<int64_t, kOperands> gradients;
};
inline auto fields(PointwiseOutputs& o) { return std::tie(o.unreduced, o.reduced, o.gradients); }

}  // namespace pyfused

// With pybind11's std::tuple, which accepts any sequence, small calls take 1.05 times as long.
template <class Struct>
struct pybind11::detail::type_caster<Struct,
                                     std::void_t<decltype(fields(std::declval<Struct&>()))>> {
  PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));

  bool load(handle source, bool convert) {
    if (!PyTuple_Check(source.ptr())) return false;
    const auto read_all = [&](auto&... field) {
      Py_ssize_t i = 0;
      return PyTuple_GET_SIZE(source.ptr()) == sizeof...(field) &&
             (read(PyTuple_GET_ITEM(source.ptr(), i++), convert, field) && ...);
    };
    return std::apply(read_all, fields(value));
  }

 private:
  template <class Field> static bool read(handle source, bool convert, Field& field) {
    using Read = std::conditional_t<std::is_enum_v<Field>, int, Field>;
    make_caster<Read> caster;
    if (!caster.load(source, convert)) return false;
    field = Field(cast_op<Read>(std::move(caster)));
    return true;
  }
};

namespace {

using namespace pyfused;

template <class T> T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

// Tuples of Python. Structured bindings name their elements, in the order of these comments.
using RowSizes = std::array<int64_t, 2>;      // rows, classes or features
using ClassSizes = std::array<int64_t, 3>;    // outer, inner, classes

// Binds the first argument; the types of the others remain visible to pybind11.
template <class First, class... Arguments>
auto bind_first(void (*function)(const First&, Arguments...), const First& first) {
  return [=](Arguments... arguments) { function(first, arguments...); };
}

// ---- one kernel for each element type -----------------------------------------------------------

enum class DType { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

template <class Body> auto with_dtype(int dtype, const Body& body) {
  switch (DType(dtype)) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
    case DType::bfloat16: return body(bfloat16{});
    case DType::float16: return body(float16{});
  }
  throw std::invalid_argument("dtype: expected 0 to 3");
}

// ---- losses over classes ------------------------------------------------------------------------

template <class T> View<T> view(const ViewTuple& v) {
  return {pointer<T>(v.address), v.outer, v.inner, v.classes};
}

int64_t run_cross_entropy(int dtype, const ClassSizes& sizes, const CrossEntropyInputs& inputs,
                          const CrossEntropyOptions& options, const CrossEntropyOutputs& outputs,
                          int threads) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const auto& [outer, inner, classes] = sizes;
    const auto grad_logits = view<T>(outputs.grad_logits);
    const auto grad_probabilities = view<T>(outputs.grad_probabilities);
    const auto& [log_p, lse, prediction, correct, entropy] = outputs.metrics;
    const int64_t positions = outer * inner, elements = positions * classes;
    const size_t bytes = size_t(elements) * sizeof(T);
    prefer_huge_pages(grad_logits.data, bytes);
    prefer_huge_pages(grad_probabilities.data, bytes);
    const bool reads_few = options.normalized && !grad_logits.data;
    const CrossEntropy<T> ce{{outer, inner, classes},
                             options,
                             view<const T>(inputs.logits),
                             pointer<const int64_t>(inputs.target),
                             view<const T>(inputs.probabilities),
                             pointer<const A>(inputs.weight),
                             pointer<const A>(inputs.grad_output),
                             pointer<A>(outputs.loss),
                             grad_logits,
                             grad_probabilities,
                             threads_for(reads_few ? positions : elements, threads),
                             pointer<const A>(inputs.token_weight),
                             pointer<double>(outputs.prediction),
                             {pointer<A>(log_p), pointer<A>(lse), pointer<int64_t>(prediction),
                              pointer<bool>(correct), pointer<A>(entropy)}};
    return options.normalized ? nll_loss(ce) : cross_entropy(ce);
  });
}

int64_t run_invalid_class_index(int64_t target, int64_t n, int64_t classes, int64_t ignore_index) {
  return check_class_indices(pointer<const int64_t>(target), n, classes, ignore_index).invalid;
}

// ---- the state of rows --------------------------------------------------------------------------

using BlockSizes = std::array<int64_t, 4>;  // rows, classes, first class, stride of rows
using RowNumbers = std::pair<double, std::optional<double>>;  // scale, softcap
using FieldsTuple = std::array<int64_t, 3>;  // address, stride, count
using GradientFieldsTuple = std::array<int64_t, 5>;  // address, stride, row stride, count, itemsize

template <class D> RowFields<D> row_fields(const FieldsTuple& fields) {
  const auto& [address, stride, count] = fields;
  return {pointer<D>(address), stride, int(count)};
}

template <class T>
LogitRows<T> logit_rows(const BlockSizes& sizes, int64_t logits, int64_t target,
                        int64_t ignore_index, const RowNumbers& numbers, int64_t weight,
                        int threads) {
  const auto& [rows, classes, first_class, stride] = sizes;
  const auto& [scale, softcap] = numbers;
  const int workers = threads_for(rows * classes, threads);
  return {rows,         classes,
          first_class,  pointer<const T>(logits),
          stride,       pointer<const int64_t>(target),
          ignore_index, scale,
          softcap,      pointer<const Accumulate<T>>(weight),
          workers};
}

void run_row_state(int dtype, const BlockSizes& sizes, int64_t logits, int64_t target,
                   int64_t ignore_index, const RowNumbers& numbers, int64_t weight,
                   const FieldsTuple& state, const FieldsTuple& results, int64_t preceding,
                   int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    row_state(logit_rows<T>(sizes, logits, target, ignore_index, numbers, weight, threads),
              row_fields<double>(state), row_fields<Accumulate<T>>(results), preceding);
  });
}

void run_row_gradients(int dtype, const BlockSizes& sizes, int64_t logits, int64_t target,
                       int64_t ignore_index, const RowNumbers& numbers, int64_t weight,
                       const FieldsTuple& state, const GradientFieldsTuple& grad_results,
                       const StridedTuple& grad, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto rows = logit_rows<T>(sizes, logits, target, ignore_index, numbers, weight, threads);
    const auto& [grad_address, grad_stride] = grad;
    if (grad_address != logits) {
      prefer_huge_pages(pointer<void>(grad_address), size_t(rows.rows * rows.classes) * sizeof(T));
    }
    const auto& [address, stride, row_stride, count, itemsize] = grad_results;
    row_gradients(rows,
                  {row_fields<const double>(state),
                   {pointer<const void>(address), stride, row_stride, int(count), int(itemsize)},
                   pointer<T>(grad_address),
                   grad_stride});
  });
}

// ---- divergences --------------------------------------------------------------------------------

void run_kl_div_with_logits(int dtype, const RowSizes& sizes, const KlDivInputs& inputs,
                            const KlDivOptions& options, const KlDivOutputs& outputs, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const auto& [rows, classes] = sizes;
    const auto& [student, teacher, token_weight, grad_output] = inputs;
    const StridedTuple& grad = outputs.grad;
    const size_t bytes = size_t(rows * classes) * sizeof(T);
    if (grad.address != student.address) prefer_huge_pages(pointer<void>(grad.address), bytes);
    kl_div_with_logits(KlDiv<T>{rows, classes, pointer<const T>(student.address), student.stride,
                                pointer<const T>(teacher.address), teacher.stride, options.beta,
                                options.scale, pointer<const A>(token_weight), options.reduction,
                                options.denominator, pointer<const A>(grad_output),
                                pointer<A>(outputs.loss), pointer<T>(grad.address), grad.stride,
                                threads_for(rows * classes, threads)});
  });
}

// ---- losses of embeddings -----------------------------------------------------------------------

// inputs: x, y, and z or the target; options: see EmbeddingOptions; gradients: of the inputs.
template <bool kCosine>
void run_embedding_loss(int dtype, const RowSizes& sizes, const std::array<StridedTuple, 3>& inputs,
                        const std::tuple<double, double, bool, bool, bool>& options,
                        double denominator, int64_t grad_output, int64_t losses, int64_t sum,
                        const std::array<int64_t, 3>& gradients, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const auto& [margin, eps, euclidean, swap, inclusive] = options;
    const auto& [rows, features] = sizes;
    const auto& [target, target_stride] = inputs[2];
    EmbeddingLoss<T> e{{margin, eps, euclidean, swap, inclusive},
                       rows,
                       features,
                       {},
                       pointer<const A>(target),
                       target_stride,
                       denominator,
                       pointer<const A>(grad_output),
                       pointer<A>(losses),
                       pointer<A>(sum),
                       {},
                       threads_for(rows * features, threads)};
    for (int i = 0; i < 3; ++i) {
      const auto& [address, stride] = inputs[i];
      e.inputs[i] = {pointer<const T>(address), stride};
      e.gradients[i] = pointer<T>(gradients[i]);
      prefer_huge_pages(e.gradients[i], size_t(rows * features) * sizeof(T));
    }
    kCosine ? cosine_embedding_loss(e) : triplet_margin_loss(e);
  });
}

// ---- softmax ------------------------------------------------------------------------------------

// The forward pass, or the backward pass where there is a grad_output.
void run_softmax(bool logarithm, int dtype, const ClassSizes& sizes, const ViewTuple& input,
                 const ViewTuple& grad_output, const ViewTuple& output, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& [outer, inner, classes] = sizes;
    const int64_t elements = outer * inner * classes;
    const auto written = view<T>(output);
    prefer_huge_pages(written.data, size_t(elements) * sizeof(T));
    softmax(Softmax<T>{{outer, inner, classes},
                       logarithm,
                       view<const T>(input),
                       view<const T>(grad_output),
                       written,
                       threads_for(elements, threads)});
  });
}

// ---- pointwise losses and activations -----------------------------------------------------------

// The sizes of a call's tensors, the strides of its outputs and of each operand; empty if operands
// are contiguous or broadcast one element.
using StridesOfCall = std::vector<Sizes>;

// Reads the operands of a call, each an address and a step, or the strides of the call.
template <class T> class Operands {
 public:
  explicit Operands(const StridesOfCall& call) {
    if (call.empty()) return;
    Layout layout(call[0], {call.begin() + 1, call.end()});
    order = std::move(layout.order);
    steps_ = std::move(layout.steps);
  }
  Operand<T> next(const StridedTuple& view) {
    const auto& [address, step] = view;
    const size_t index = next_++;
    if (!address || steps_.empty()) return {pointer<const T>(address), step, {}};
    return operand(pointer<const T>(address), steps_.at(index));
  }
  Order order;

 private:
  std::vector<Sizes> steps_;
  size_t next_ = 0;
};

template <class Formula>
void run_pointwise_loss(const Formula& formula, int dtype, int64_t n,
                        const std::array<StridedTuple, kOperands>& operands,
                        const Parameters& parameters, const StridedTuple& weight,
                        double denominator, const StridedTuple& grad_output,
                        const PointwiseOutputs& outputs, int threads,
                        const StridesOfCall& strides) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& [unreduced, reduced, gradients] = outputs;
    Operands<T> read(strides);
    PointwiseLoss<T> p;
    p.n = n;
    for (int k = 0; k < kOperands; ++k) p.operands[k] = read.next(operands[k]);
    p.parameters = parameters;
    p.weight = read.next(weight);
    p.denominator = denominator;
    p.grad_output = read.next(grad_output);
    p.unreduced = pointer<T>(unreduced);
    p.reduced = pointer<Accumulate<T>>(reduced);
    p.threads = threads_for(n, threads);
    p.order = read.order;
    prefer_huge_pages(p.unreduced, size_t(n) * sizeof(T));
    for (int k = 0; k < kOperands; ++k) {
      p.gradients[k] = pointer<T>(gradients[k]);
      prefer_huge_pages(p.gradients[k], size_t(n) * sizeof(T));
    }
    pointwise_loss(formula, p);
  });
}

using InstructionTuple = std::tuple<std::string, int, std::vector<int>>;  // name, out, in

void check_slot(const std::string& instruction, const char* argument, int slot, int first,
                int end) {
  if (slot >= first && slot < end) return;
  throw std::invalid_argument(instruction + ": " + argument + ": expected a slot from " +
                              std::to_string(first) + " to " + std::to_string(end - 1) + ", got " +
                              std::to_string(slot));
}

// Instructions that read slots from first_read to end, and write slots from first_written to
// end_written.
std::vector<Instruction> read_instructions(const std::vector<InstructionTuple>& lines,
                                           int first_read, int end, int first_written,
                                           int end_written) {
  std::vector<Instruction> read;
  for (const auto& [name, out, in] : lines) {
    const auto row = std::find(std::begin(kInstructions), std::end(kInstructions), name);
    if (row == std::end(kInstructions)) throw std::invalid_argument("no instruction " + name);
    const int opcode = int(row - std::begin(kInstructions));
    if (in.size() != kInstructionOperands[opcode]) {
      throw std::invalid_argument(name + ": expected " +
                                  std::to_string(kInstructionOperands[opcode]) + " operands, got " +
                                  std::to_string(in.size()));
    }
    check_slot(name, "result", out, first_written, end_written);
    for (const int slot : in) check_slot(name, "operand", slot, first_read, end);
    Instruction each{opcode, 0, out, {}};
    each.in.fill(in[0]);
    std::copy(in.begin(), in.end(), each.in.begin());
    for (size_t k = 0; k < in.size(); ++k) each.constants |= unsigned(in[k] >= kFirstConstant) << k;
    read.push_back(each);
  }
  return read;
}

Program read_program(const std::vector<InstructionTuple>& prologue,
                     const std::vector<InstructionTuple>& body,
                     const std::vector<double>& constants, size_t parameters) {
  if (constants.size() > kProgramConstants || parameters >= constants.size()) {
    throw std::invalid_argument("constants: expected the scale, one for each of the " +
                                std::to_string(parameters) + " parameters, and " +
                                std::to_string(kProgramConstants) + " at most, got " +
                                std::to_string(constants.size()));
  }
  const int end = kFirstConstant + int(constants.size());
  return {read_instructions(prologue, kFirstConstant, end, kFirstConstant, end),
          read_instructions(body, 0, end, kValueSlot, kFirstConstant), constants, parameters};
}

// A gradient that the program writes or reads has memory.
void check_gradients(const Program& program, const std::array<int64_t, kOperands>& gradients) {
  for (const Instruction& each : program.body) {
    for (int k = 0; k < kOperands; ++k) {
      const int slot = kValueSlot + 1 + k;
      const bool used = each.out == slot || std::count(each.in.begin(), each.in.end(), slot);
      if (used && !gradients[k]) {
        throw std::invalid_argument("gradients: expected the address of gradient " +
                                    std::to_string(k) + ", which the program computes, got 0");
      }
    }
  }
}

void run_program(const Program& program, int dtype, int64_t n,
                 const std::array<StridedTuple, kOperands>& operands,
                 const std::vector<double>& parameters, const StridedTuple& weight,
                 double denominator, const StridedTuple& grad_output,
                 const PointwiseOutputs& outputs, int threads, const StridesOfCall& strides) {
  if (n > 0) check_gradients(program, outputs.gradients);  // empty tensors have no address
  run_pointwise_loss(ProgramFormula(program, parameters, denominator), dtype, n, operands, {},
                     weight, denominator, grad_output, outputs, threads, strides);
}

void run_activation(const ActivationFormula& formula, int dtype, int64_t n, int64_t input,
                    int64_t output, const Parameters& parameters, int threads,
                    const StridesOfCall& strides) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    prefer_huge_pages(pointer<void>(output), size_t(n) * sizeof(T));
    Operands<T> read(strides);
    activation(formula, read.next({input, 1}), pointer<T>(output), parameters, n,
               threads_for(n, threads), read.order);
  });
}

void run_activation_backward(const ActivationFormula& formula, int dtype, int64_t n,
                             const StridedTuple& grad_output, int64_t saved, int64_t grad_input,
                             const Parameters& parameters, int threads,
                             const StridesOfCall& strides) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    prefer_huge_pages(pointer<void>(grad_input), size_t(n) * sizeof(T));
    Operands<T> read(strides);
    const Operand<T> grad = read.next(grad_output);
    activation_backward(formula, grad, read.next({saved, 1}), pointer<T>(grad_input), parameters, n,
                        threads_for(n, threads), read.order);
  });
}

bool run_scale(int dtype, int64_t n, int64_t data, int64_t factor, int threads) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Accumulate<T> number = *pointer<const Accumulate<T>>(factor);
    return scale(pointer<T>(data), number, n, threads_for(n, threads));
  });
}

// ---- outputs in recycled memory -----------------------------------------------------------------

#ifdef PYFUSED_RECYCLES
constexpr DLDataType kDLTypes[] = {{2, 32, 1}, {2, 64, 1}, {4, 16, 1}, {2, 16, 1}};  // by DType

// A DLPack capsule, or None if there is no memory.
pybind11::object recycled(int dtype, size_t bytes, std::vector<int64_t> shape,
                          std::vector<int64_t> strides) {
  DLManagedTensor* const made =
      RecycledTensor::make(bytes, kDLTypes[dtype], std::move(shape), std::move(strides));
  if (!made) return pybind11::none();
  return pybind11::capsule(made, "dltensor", [](PyObject* capsule) {
    // A consumer of the tensor has renamed the capsule.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    unused->deleter(unused);
  });
}

std::array<uint64_t, 4> recycler_stats() {
  const Recycler::Stats stats = Recycler::get().stats();
  return {stats.in_use, stats.free, stats.hits, stats.misses};
}
#endif

// ---- CPU features -------------------------------------------------------------------------------

// Python calls this in the module of the oldest instruction set before it loads another module.
bool runs_here([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  // Not all toolchains link the table of features that __builtin_cpu_supports reads.
  const auto all = [](unsigned bits, unsigned features) { return (bits & features) == features; };
  unsigned eax, ebx, ecx, edx, enabled = 0, extended = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned base = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) extended = ebx;
  // The registers that the operating system saves: 6 for AVX, and 0xe0 for AVX-512.
  if (base & bit_OSXSAVE) asm("xgetbv" : "=a"(enabled), "=d"(edx) : "c"(0));
  const bool v2 = all(base, bit_SSE4_2 | bit_POPCNT);
  const bool v3 = v2 && all(enabled, 6) && all(base, bit_AVX | bit_FMA | bit_F16C) &&
                  all(extended, bit_AVX2 | bit_BMI | bit_BMI2);
  const bool v4 =
      v3 && all(enabled, 0xe0) &&
      all(extended, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
  return isa == "x86-64-v4" ? v4 : isa == "x86-64-v3" ? v3 : isa == "x86-64-v2" && v2;
#elif defined(_M_X64)
  return isa == "x86-64-v2";
#else
  return isa == "generic";
#endif
}

}  // namespace

// Free-threaded Python need not enable the GIL for this module: threads share only constants and
// the pool of recycled blocks, which has a lock.
PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> unlocked;

  m.def("runs_here", &runs_here);
  m.attr("formulas_checksum") = formulas_checksum();
  m.attr("row_classes") = row_classes();
  m.attr("runtime_file") = runtime_file();
  m.def("runtime_threads", &runtime_threads);
  m.def("on_one_thread", [](const py::function& function) {
    py::object result;
    std::exception_ptr error;
    auto call = [&] {
      try {
        result = function();
      } catch (...) {
        error = std::current_exception();
      }
    };
    run_on_one_thread([](void* data) { (*static_cast<decltype(call)*>(data))(); }, &call);
    if (error) std::rethrow_exception(error);
    return result;
  });
  m.def("measure_regions", &measure_regions);
  m.def("measured_regions", [] {
    const Regions regions = measured_regions();
    return std::make_tuple(regions.count, regions.seconds);
  });

#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#elif defined(__GNUC__)
  m.attr("compiler") = "GCC " __VERSION__;
#else
  m.attr("compiler") = "MSVC";
#endif

  m.def("cross_entropy", &run_cross_entropy, unlocked);
  m.def("invalid_class_index", &run_invalid_class_index, unlocked);
  m.def("kl_div_with_logits", &run_kl_div_with_logits, unlocked);
  m.def("triplet_margin_loss", &run_embedding_loss<false>, unlocked);
  m.def("cosine_embedding_loss", &run_embedding_loss<true>, unlocked);
  m.def("row_gradients", &run_row_gradients, unlocked);
  m.def("row_state", &run_row_state, unlocked);
  m.def("softmax", &run_softmax, unlocked);
  for (const LossFormula& formula : loss_formulas()) {
    m.def(formula.name, bind_first(&run_pointwise_loss<LossFormula>, formula), unlocked);
  }
  m.attr("program_registers") = kProgramRegisters;
  m.attr("program_constants") = kProgramConstants;
  py::class_<Program>(m, "Program", py::module_local())
      .def(py::init(&read_program))
      .def("__call__", &run_program, unlocked);
  for (const ActivationFormula& formula : activation_formulas()) {
    m.def(formula.name, bind_first(&run_activation, formula), unlocked);
    m.def((std::string(formula.name) + "_backward").c_str(),
          bind_first(&run_activation_backward, formula), unlocked);
  }
  m.def("scale", &run_scale, unlocked);

#ifdef PYFUSED_RECYCLES
  m.def("recycled", &recycled);
  m.def("recycler_stats", &recycler_stats);
  m.def("recycler_limit", [](size_t bytes) { Recycler::get().set_limit(bytes); });
  m.def("recycler_release", [] { return Recycler::get().release(0); });
#endif
}

// The names that Python looks for, one in each module.
// NOLINTBEGIN(bugprone-reserved-identifier)
extern "C" {
PYBIND11_EXPORT PyObject* PyInit__cpu_x86_64_v2() { return PyInit__cpu(); }
PYBIND11_EXPORT PyObject* PyInit__cpu_x86_64_v3() { return PyInit__cpu(); }
PYBIND11_EXPORT PyObject* PyInit__cpu_x86_64_v4() { return PyInit__cpu(); }
PYBIND11_EXPORT PyObject* PyInit__cpu_generic() { return PyInit__cpu(); }
}
// NOLINTEND(bugprone-reserved-identifier)
