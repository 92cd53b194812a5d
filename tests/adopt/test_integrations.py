"""transformers, Lightning and skorch give the same losses with and without pyfused.

tests/README.md has the command. The tests download nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import language_models
import pytest
import torch
from conftest import KernelCalls
from language_models import are_computed, assert_same_steps, batch, step
from torch._dynamo.utils import counters

import pyfused
import pyfused.nn
from pyfused.dispatch import reasons

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # raised by these libraries
]
STEPS = 12


@pytest.fixture(autouse=True)
def examples_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)


def example(name: str) -> Any:
    return importlib.import_module(name)


def trained_by_transformers(name: str, fused: bool) -> list[float]:
    with pyfused.patch() if fused else contextlib.nullcontext():
        return example("with_transformers").train(name, STEPS)


# Returns the losses of a trainer with or without pyfused.
TRAINERS: dict[str, Callable[[bool], list[float]]] = {
    "GPT-2": partial(trained_by_transformers, "GPT-2"),
    "BERT": partial(trained_by_transformers, "BERT"),
    "Lightning": lambda fused: example("with_lightning").train(fused, STEPS),
    "skorch": lambda fused: example("with_skorch").train(pyfused.nn if fused else torch.nn, 2),
}


def assert_equal_and_falling(losses: list[float], expected: list[float]) -> None:
    assert len(losses) >= STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, kernel_calls: KernelCalls) -> None:
    expected = TRAINERS[name](False)
    assert not kernel_calls
    assert_equal_and_falling(TRAINERS[name](True), expected)
    assert kernel_calls["cross_entropy"] >= STEPS
    assert name != "Lightning" or kernel_calls["relu"] >= STEPS


def test_gradient_accumulation_with_a_fused_head() -> None:
    """Trainer passes the number of targets of all micro-batches."""
    train = example("with_transformers").train
    expected = train("Llama", STEPS, accumulate=4)
    losses = train("Llama", STEPS, accumulate=4, convert=True)
    assert_equal_and_falling(losses, expected)
    assert losses == pytest.approx(train("Llama", STEPS), rel=1e-3)


# ---- language models with a fused head -----------------------------------------------------------

llama = partial(language_models.tiny, "LlamaForCausalLM")


def test_language_models_that_return_logits() -> None:
    model, (tokens, labels) = pyfused.convert(llama()), batch().values()
    assert not are_computed(model(tokens).logits)  # without a loss
    output = model(tokens, None, None, None, None, labels)
    assert not are_computed(output.logits)
    assert output.logits.argmax(-1).shape == labels.shape
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert step(model)[2]
    hook.remove()
    assert not step(model)[2]
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 14)
    assert step(model.eval())[2]


def offloaded(model: Any, folder: Path) -> Any:
    import accelerate

    places = {"model": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, offload_dir=folder, main_device="cpu")


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_language_models(when: str, tmp_path: Path) -> None:
    """accelerate replaces the head's forward, and moves its weight to meta."""
    expected, model = offloaded(llama(), tmp_path / "expected"), llama()
    if when == "before":
        offloaded(model, tmp_path / "model")
        left = pyfused.plan_conversion(model).left
        assert left[0].reason.startswith("the forward of its head was replaced")
        pyfused.convert(model)
    else:
        reasons._reported.clear()
        assert not are_computed(pyfused.convert(model)(**batch()).logits)
        offloaded(model, tmp_path / "model")
        with pytest.warns(RuntimeWarning, match="forward of its head was replaced"):
            model(**batch())
    output = model(**batch())
    torch.testing.assert_close(output.loss, expected(**batch()).loss)
    assert are_computed(output.logits)


def test_a_compiled_language_model() -> None:
    """A compiled model computes its logits, with as many graphs as before its conversion."""
    found = []
    for convert in (False, True):
        model = pyfused.convert(llama()) if convert else llama()
        torch.compiler.reset()
        counters.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "pyfused")
            found.append(step(torch.compile(model, backend="aot_eager"), use_cache=False))
        found[-1] += len(counters["graph_break"]), counters["stats"]["unique_graphs"]
    assert_same_steps(*found[::-1], computed=True)
    assert found[1][3:] == found[0][3:]


def test_a_converted_language_model_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = pyfused.convert(llama())
    model.save_pretrained(tmp_path)
    again = type(llama()).from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert inspect.signature(model.forward) == inspect.signature(again.forward)


def test_evaluation_and_metrics_with_trainer() -> None:
    import transformers

    class Accuracy(transformers.Trainer):  # as in docs/transformers.md
        def log(self, logs: dict[str, float], *args: Any) -> None:
            metrics = self.model.pyfused_metrics
            if "loss" in logs and metrics is not None:
                valid = metrics.prediction != -100
                logs["accuracy"] = float(metrics.correct.sum() / valid.sum())
            super().log(logs, *args)

    model, texts = llama(vocab_size=512), example("with_transformers").Texts()
    arguments = transformers.TrainingArguments(
        "unused", max_steps=3, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, per_device_eval_batch_size=8,
    )  # fmt: skip
    data = {"train_dataset": texts, "eval_dataset": texts}
    expected = transformers.Trainer(model, arguments, **data).evaluate()["eval_loss"]
    pyfused.convert(model, evaluation=True, metrics=True)
    trainer = Accuracy(model, arguments, **data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert model.pyfused_metrics.correct.shape == (8 * 32,)
    trainer.train()
    found = [entry["accuracy"] for entry in trainer.state.log_history if "loss" in entry]
    assert [0 <= accuracy <= 1 for accuracy in found] == [True] * 3


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "transformers-5.23" / "classes.md"
LISTED = dict(re.findall(r"^\| `(\w+)` \| (.*?) *\|$", RESULTS.read_text("utf-8"), re.MULTILINE))


def test_the_list_of_language_models_is_complete() -> None:
    assert {*LISTED} == {*language_models.names()}
    assert [*LISTED.values()].count("converted") >= 240


@pytest.mark.parametrize("name", LISTED)
def test_every_language_model_of_the_list(name: str) -> None:
    """The result of its conversion is correct, and gradients are equal."""
    assert language_models.conversion(name) == LISTED[name]


# ---- Fabric, which registers hooks on a model's outputs ------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_registers_hooks(precision: Any) -> None:
    """Three steps have the same losses as without convert, and Fabric's checks work."""
    from lightning import Fabric

    found: list[list[float]] = []
    for convert in (False, True):
        model = llama(vocab_size=512)
        model = pyfused.convert(model) if convert else model
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        call, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
        found.append([])
        for _ in range(3):
            output = call(**batch())
            if precision == "bf16-mixed":
                with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
                    output.loss.backward(retain_graph=True)
            fabric.backward(output.loss)
            assert are_computed(output.logits) != convert
            optimizer.step()
            model.zero_grad()
            found[-1].append(output.loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-2 if "bf16" in precision else 1e-5)
    assert found[0][2] < found[0][0]


# ---- heads that PEFT has wrapped -----------------------------------------------------------------


def with_adapters(model: Any, **options: Any) -> Any:
    """Returns a model of PEFT, whose weights are random and nonzero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).train()


@pytest.mark.parametrize("when", ["the PEFT model", "the model inside", "before get_peft_model"])
def test_a_trained_copy_of_the_head(when: str) -> None:
    options: Any = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    expected, inner, plain = step(with_adapters(llama(), **options)), llama(), "before" in when
    model = with_adapters(pyfused.convert(inner) if plain else inner, **options)
    if not plain:
        pyfused.convert(model if when == "the PEFT model" else model.base_model.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_same_steps(step(model), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_computes_the_logits_of_a_head_with_an_adapter(when: str) -> None:
    options = {"target_modules": ["q_proj", "lm_head"]}
    expected = step(with_adapters(llama(), **options))
    reason = "its head has an adapter, peft.tuners.lora.layer.Linear"
    reasons._reported.clear()
    if when == "before":
        model = with_adapters(pyfused.convert(llama()), **options)
        with pytest.warns(RuntimeWarning, match="its logits are read by add"):
            step(model)
    else:
        model = with_adapters(llama(), **options)
        inner = model.base_model.model
        assert pyfused.plan_conversion(inner).left[0].reason == reason
        with pytest.warns(RuntimeWarning, match=reason):
            pyfused.convert(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_same_steps(step(model), expected, computed=True)
    if when == "before":  # without its adapter, the head is fused again
        plain = model.merge_and_unload()
        assert not step(plain.requires_grad_())[2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_head_whose_trained_copy_is_disabled() -> None:
    """PEFT then calls the original head, whose logits are lazy, too."""
    model = with_adapters(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    pyfused.convert(model.eval(), evaluation=True)
    copied = model.base_model.model.lm_head.modules_to_save["default"]
    tokens, losses = torch.arange(24).view(2, 12), []
    for disabled in (model.disable_adapter(), contextlib.nullcontext()):
        copied.weight.data.zero_()
        with torch.no_grad(), disabled:
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
        assert not are_computed(output.logits)
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(math.log(300))
    assert losses[0] != pytest.approx(losses[1])
