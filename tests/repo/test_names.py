"""pyfused.functional and pyfused.nn have all public names of torch's modules."""

from __future__ import annotations

import sys
import typing
from types import ModuleType

import pytest
import torch
from processes import python

import pyfused

pytestmark = pytest.mark.cpu
BOTH = [
    pytest.param(pyfused.functional, torch.nn.functional, id="functional"),
    pytest.param(pyfused.nn, torch.nn, id="nn"),
]
both = pytest.mark.parametrize(("ours", "theirs"), BOTH)


@both
def test_other_names_come_from_torch(ours: ModuleType, theirs: ModuleType) -> None:
    names = {name for name in dir(theirs) if not name.startswith("_")}
    for name in names - {*ours.__all__, "functional"}:
        assert getattr(ours, name) is getattr(theirs, name), name
    for name in ours.__all__:
        assert getattr(ours, name).__module__ == ours.__name__
    assert dir(ours) == sorted(names | {*ours.__all__})


def test_names_can_be_imported() -> None:
    from pyfused.functional import conv2d, relu
    from pyfused.nn import Linear, ReLU

    assert (conv2d, Linear) == (torch.nn.functional.conv2d, torch.nn.Linear)
    assert {relu.__module__, ReLU.__module__} == {"pyfused.functional", "pyfused.nn"}


def test_submodules_of_torch_are_attributes() -> None:
    assert pyfused.nn.init is torch.nn.init
    assert pyfused.nn.utils.rnn.pad_sequence is torch.nn.utils.rnn.pad_sequence


def test_type_hints_can_be_evaluated() -> None:
    functions = [getattr(pyfused.functional, name) for name in pyfused.functional.__all__]
    modules = [getattr(pyfused.nn, name) for name in pyfused.nn.__all__]
    others = [getattr(pyfused, name) for name in ("convert", "explain", "patch", "report")]
    for function in (*functions, *others, *(f for m in modules for f in (m.__init__, m.forward))):
        typing.get_type_hints(function)  # raises for a name that exists for type checkers only


@both
@pytest.mark.parametrize("name", ["conv5d", "_NormBase"])
def test_an_unknown_name(ours: ModuleType, theirs: ModuleType, name: str) -> None:
    assert not hasattr(theirs, name)
    with pytest.raises(AttributeError, match=f"module '{ours.__name__}' has no attribute '{name}'"):
        getattr(ours, name)


def test_names_of_the_package() -> None:
    assert all(hasattr(pyfused, name) for name in pyfused.__all__)
    code = "import pyfused; print(pyfused.functional.cross_entropy.__name__)"
    assert python(code).stdout == "cross_entropy\n"
    assert sys.modules["pyfused.functional"] is pyfused.functional
