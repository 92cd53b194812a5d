"""Generates C++ from the declarations of elementwise operators: `make formulas`.

    csrc/loss_formulas.inc         formulas that pointwise_loss.cpp includes
    csrc/activation_formulas.inc   formulas that activation.cpp includes
    csrc/formulas_checksum.inc     a number that tells these formulas from others

These files are committed, so builds need no torch. `test_completeness.py` checks that they are up
to date.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pyfused.formula_compiler.kernel import Kernel, Method
from pyfused.formula_compiler.program import Expressions
from pyfused.ops import elementwise
from pyfused.ops.activation import Activation
from pyfused.ops.pointwise_loss import PointwiseLoss

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# ---- C++ -----------------------------------------------------------------------------------------

# The C++ expression of each operation. Arguments are parenthesised if the template has no comma.
CPP = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "reciprocal": "1 / {}",
    "abs": "std::abs({},)",
    "sign": "{0} > 0 ? A(1) : {0} < 0 ? A(-1) : A(0)",
    "sqrt": "std::sqrt({},)",
    "rsqrt": "1 / std::sqrt({},)",
    "exp": "exp_of({},)",
    "decay": "exp_shifted(-std::abs({},))",
    "expm1": "expm1_of({},)",
    "log": "log_of({},)",
    "log1p": "log1p_of({},)",
    "tanh": "tanh_of({},)",
    "erf": "erf_of({},)",
    "ndtr": "Normal<A>({},).below",
    "density": "Normal<A>({},).density",
    "sigmoid": "sigmoid({},)",
    "softplus": "softplus({},)",
    "pow": "pow_of({}, {},)",
    "minimum": "{1} < {0} ? {1} : {0}",  # returns NaN if the first operand is NaN
    "maximum": "{1} > {0} ? {1} : {0}",
    "where": "{} ? {} : {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "eq": "{} == {}",
    "logical_not": "!{}",
}
PASSES_NAN = {"minimum": "!({1} >= {0}) ? {1} : {0}", "maximum": "!({1} <= {0}) ? {1} : {0}"}
LOGIC = {"mul": "{} & {}", "maximum": "{} | {}", "minimum": "{} & {}"}  # operations on masks
TWICE = ("sign", "minimum", "maximum")  # operations whose expressions use an argument twice
INPUTS = ("operand", "scale", "literal", "parameter")
FAMILIES = ("loss", "losses", PointwiseLoss), ("activation", "activations", Activation)


def literal(value: float, kind: str = "A") -> str:
    if math.isfinite(value):
        digits = f"{value:.17g}" if kind == "A" or value % 1 else f"{value:.1f}"
        return f"A({digits})" if kind == "A" else digits
    name = "quiet_NaN" if value != value else "infinity"
    return f"{'-' * (value < 0)}std::numeric_limits<{kind}>::{name}()"


def expression(template: str, arguments: Sequence[str]) -> str:
    """Fills in a template; the result is not parenthesised."""
    if "," in template:
        return template.format(*arguments).replace(",)", ")")
    return template.format(*(a if is_atom(a) else f"({a})" for a in arguments))


def is_atom(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if not depth and character in " -!":
            return False
    return True


class Struct:
    """The C++ struct of a kernel.

    Attributes:
        members: The names of the parameters and of values computed from them: C++ code to name.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.name, self.kernel = struct_name(kernel.name), kernel
        self.members = {f"p[{k}]": name for k, name in enumerate(kernel.parameters)}
        self.initial = [f"{name}(A(p[{k}]))" for k, name in enumerate(kernel.parameters)]

    def body(self, method: Method, output: int) -> str:
        """Returns the body of the function that computes an output."""
        e, statements, names = method.expressions, list[str](), dict[int, str]()
        uses, todo = Counter([output]), {output}
        while todo:
            op, arguments = e.nodes[index := todo.pop()]
            if not self.is_leaf(e, index):
                todo.update(argument for argument in arguments if argument not in uses)
                uses.update([*arguments] * (1 + (op in TWICE)))

        def text(index: int) -> str:
            op, arguments = e.nodes[index]
            if op == "operand":
                return method.operands[arguments[0]]
            if op == "scale":
                return "grad_scale"
            if op == "literal":
                return literal(arguments[0])
            if self.is_leaf(e, index):
                return self.member(e, index)
            if index not in names:
                # Compute both values of a conditional first, to keep branches out of the loop.
                values = arguments[1:] if op == "where" else ()
                operands = [named(a) if a in values else text(a) for a in arguments]
                value = expression(self.template(e, index), operands)
                if uses[index] == 1:
                    return value
                name(index, value)
            return names[index]

        def name(index: int, value: str) -> None:
            names[index] = f"v{len(names)}"
            kind = "bool" if self.is_mask(e, index) else "A"
            statements.append(f"const {kind} {names[index]} = {value};")

        def named(index: int) -> str:
            value = text(index)
            if index in names or self.is_leaf(e, index):
                return value
            name(index, value)
            return names[index]

        result = text(output)
        return "\n    ".join([*statements, f"return {result};"])

    @staticmethod
    def is_mask(e: Expressions, index: int) -> bool:
        """Returns whether an expression has type bool in C++."""
        op, arguments = e.nodes[index]
        if op in LOGIC:
            return all(Struct.is_mask(e, a) for a in arguments)
        return op in ("lt", "le", "eq", "logical_not")

    @staticmethod
    def is_negative(e: Expressions, index: int) -> bool:
        """Returns whether an expression is abs(x) times a negative literal."""
        op, arguments = e.nodes[index]
        return (
            op == "mul" and e.nodes[arguments[0]][0] == "abs" and (e.value(arguments[1]) or 0) < 0
        )

    @staticmethod
    def template(e: Expressions, index: int) -> str:
        op, arguments = e.nodes[index]
        if op in LOGIC and Struct.is_mask(e, index):
            return LOGIC[op]
        if op == "softplus" and Struct.is_negative(e, arguments[0]):
            return "log1p_unit(exp_shifted({},))"
        if op == "sigmoid" and any(op == "softplus" for op, _ in e.nodes):
            return "sigmoid_beside_softplus({},)"
        if op in PASSES_NAN and not e.scalars[arguments[1]]:
            return PASSES_NAN[op]
        return CPP[op]

    @staticmethod
    def is_leaf(e: Expressions, index: int) -> bool:
        """Returns whether an expression is an input, or a number computed from parameters alone."""
        op, arguments = e.nodes[index]
        if op in INPUTS:
            return True
        computed = e.scalars[index] and not Struct.is_mask(e, index)
        return computed and all(Struct.is_known(e, a) for a in arguments)

    @staticmethod
    def is_known(e: Expressions, index: int) -> bool:
        """Returns whether an expression depends on parameters and literals alone."""
        op, arguments = e.nodes[index]
        if op in INPUTS:
            return op not in ("operand", "scale")
        return all(Struct.is_known(e, a) for a in arguments)

    def member(self, e: Expressions, index: int) -> str:
        """Returns the name of the member for an expression; its value is computed in double."""
        value = self.in_double(e, index)
        if value not in self.members:
            self.members[value] = f"c{len(self.members) - len(self.kernel.parameters)}"
            self.initial.append(f"{self.members[value]}(A({value}))")
        return self.members[value]

    def in_double(self, e: Expressions, index: int) -> str:
        op, arguments = e.nodes[index]
        if op == "literal":
            return literal(arguments[0], "double")
        if op == "parameter":
            return f"p[{arguments[0]}]"
        return expression(self.template(e, index), [self.in_double(e, a) for a in arguments])

    def text(self) -> str:
        functions, methods = [], self.kernel.methods
        loss = len(methods) == 1
        for method in methods:
            arguments = [f"A {operand}" for operand in method.operands]
            if not loss:
                called = "forward" if len(arguments) == 1 else "backward"
                functions.append((called, arguments, method, method.outputs[0]))
                continue
            arguments += ["A"] * (3 - len(arguments))
            titles = ["value", "grad_input", "grad_target", "grad_other"]
            for k, (title, output) in enumerate(zip(titles, method.outputs, strict=False)):
                if not k or method.expressions.value(output) != 0:
                    declared = arguments + ["A grad_scale"] * (k > 0)
                    functions.append((title, declared, method, output))
        printed = [
            f"  A {title}({', '.join(used(arguments, self.body(method, output)))}) const {{\n"
            f"    {self.body(method, output)}\n  }}"
            for title, arguments, method, output in functions
        ]
        constructor = "  using Formula<A>::Formula;"
        if self.members:
            constructor = (
                f"  A {', '.join(self.members.values())};\n"
                f"  explicit {self.name}(const Parameters& p)\n"
                f"      : {', '.join(['Formula<A>(p)', *self.initial])} {{}}"
            )
        return "\n".join(
            [f"template <class A> struct {self.name} : Formula<A> {{", constructor, *printed, "};"]
        )


def used(arguments: list[str], body: str) -> list[str]:
    """Returns the declarations of a function's arguments, unnamed if its body does not use them."""
    words = set("".join(c if c.isalnum() or c == "_" else " " for c in body).split())
    return [a if a.split()[-1] in words else "A" for a in arguments]


def struct_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_")) + "Formula"


def printed() -> dict[Path, str]:
    """Returns the content of each generated file.

    A file has the formulas of a family, so that changing one recompiles one source.
    """
    structs = {name: Struct(kernel).text() for name, kernel in elementwise.kernels().items()}
    title = "generated by `make formulas` from pyfused/ops/elementwise.py."
    files, tables = dict[Path, str](), list[str]()
    for kind, plural, family in FAMILIES:
        names = [n for op in elementwise.OPERATORS if isinstance(op, family) for n in op.kernels]
        rows = [f'  X("{name}", {struct_name(name)})' for name in names]
        tables.append(" \\\n".join([f"#define PYFUSED_{plural.upper()}(X)", *rows]))
        header = f"// The formulas of the pointwise {plural}, {title}"
        text = "\n\n".join([header, *[structs[name] for name in names], tables[-1]])
        files[CSRC / f"{kind}_formulas.inc"] = text + "\n"
    # tests/conftest.py compares this number with the one in the compiled modules.
    checksum = zlib.crc32(("\n\n".join([*structs.values(), *tables]) + "\n").encode())
    header = f"// The checksum of the formulas, {title}"
    files[CSRC / "formulas_checksum.inc"] = (
        f"{header}\n\nconstexpr uint32_t kFormulasChecksum = {checksum}u;\n"
    )
    return files


if __name__ == "__main__":
    for path, text in printed().items():
        if not path.exists() or path.read_text("utf-8") != text:  # else sources would recompile
            path.write_text(text, "utf-8")
