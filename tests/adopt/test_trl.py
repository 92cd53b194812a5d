"""TRL's trainers with pyfused.patch_trl: results and weights equal those of TRL alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import language_models
import pytest
import torch
from conftest import KernelCalls
from grid import grid
from torch import Tensor

import pyfused
from pyfused.dispatch import reasons

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # raised by these libraries
]
NAME, SELECTS = "_ChunkedLogProbFunction", "_use_triton"
DIVERGENCE = "ChunkedDivergenceFunction"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TOKENS, FEATURES, CLASSES, CHUNK = 40, 24, 600, 256
OPTIONS = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap": (1.0, 4.0, 1.0),
    "everything": (1.3, 4.0, 0.25),
}


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(reasons, "_reported", {})
    module = pytest.importorskip("trl.trainer.utils")
    other = pytest.importorskip("trl.trainer.distillation_trainer")
    places = [(module, NAME), (module, SELECTS), (other, DIVERGENCE), (other, SELECTS)]
    originals = [(*place, getattr(*place)) for place in places]
    yield module
    for place in originals:
        setattr(*place)


def draw(dtype: torch.dtype, bias: bool = True) -> list[Any]:
    """Draws hidden states, a layer and targets, some of which have the largest logit."""
    hidden, weight = torch.randn(TOKENS, FEATURES), torch.randn(CLASSES, FEATURES) / 3
    tensors = [x.to(dtype) for x in (hidden, weight, torch.randn(CLASSES))]
    target = torch.randint(CLASSES, (TOKENS,))
    target[::3] = (hidden @ weight.t() + bias * tensors[2].float()).argmax(1)[::3]
    return [*[x.requires_grad_() for x in tensors[: 2 + bias]], *[None] * (not bias), target]


def apply(function: Any, tensors: list[Any], options: tuple[Any, ...] = OPTIONS["plain"]) -> Any:
    temperature, softcap, scale = options
    return function.apply(*tensors, temperature, CHUNK, softcap, scale, OUTPUTS)


def evaluate(function: Any, tensors: list[Any], options: tuple[Any, ...]) -> list[Any]:
    """Returns all results of a function, and the gradients of two of them."""
    results = apply(function, tensors, options)
    total = (results[0] * torch.linspace(-1, 1, TOKENS)).sum() + results[1].sum()
    leaves = [x for x in tensors[:3] if x is not None]
    return [*results, *torch.autograd.grad(total, leaves)]


@grid(
    options=OPTIONS,
    dtype=[torch.float32, torch.bfloat16],
    bias=[False, True],
    autocast=[False, True],
)
def test_values_and_gradients(
    options: str, dtype: Any, bias: bool, autocast: bool, utils: Any, kernel_calls: KernelCalls
) -> None:
    """Results equal TRL's; test_accuracy.py compares linear_log_probs with exact results."""
    tensors, original = draw(dtype, bias), getattr(utils, NAME)
    pyfused.patch_trl()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = evaluate(original, tensors, OPTIONS[options])
        assert not kernel_calls
        found = evaluate(getattr(utils, NAME), tensors, OPTIONS[options])
    assert kernel_calls["row_state"] >= 1
    is_half = autocast or dtype is torch.bfloat16
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.requires_grad == theirs.requires_grad
        if theirs.is_floating_point():
            error = (ours.double() - theirs.double()).norm()
            assert error < (0.05 if is_half else 1e-5) * theirs.double().norm()
        elif not is_half:  # logits are rounded to half precision
            assert torch.equal(ours, theirs)
            assert ours.any()


def subclass(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(type("Buffer", (Tensor,), {}))


def bfloat16(tensor: Tensor) -> Tensor:
    return tensor.detach().bfloat16().requires_grad_()


PARTITIONED = "the weight is partitioned by ZeRO-3"
TWO_DTYPES = "the hidden states and the layer differ in dtype"
NOT_POSITIVE = "the temperature, the scale or the softcap is not positive"
# Reasons, changes of the tensors, and the temperature, softcap and scale.
FALLBACKS: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "ZeRO-3": (PARTITIONED, lambda x: setattr(x[1], "ds_id", 0), OPTIONS["plain"]),
    "two dtypes": (TWO_DTYPES, lambda x: x.__setitem__(1, bfloat16(x[1])), OPTIONS["plain"]),
    "subclass": ("input is a Buffer", lambda x: x.__setitem__(0, subclass(x[0])), OPTIONS["plain"]),
    "zero scale": (NOT_POSITIVE, lambda _: None, (1.0, 3.0, 0.0)),
}


@pytest.mark.parametrize(("reason", "change", "options"), FALLBACKS.values(), ids=FALLBACKS)
def test_unsupported_calls_use_the_original(
    reason: str, change: Any, options: Any, utils: ModuleType, kernel_calls: KernelCalls
) -> None:
    """Each reason is reported by one warning."""
    tensors, original = draw(torch.float32), getattr(utils, NAME)
    change(tensors)
    pyfused.patch_trl()
    with pytest.warns(RuntimeWarning, match=f"patch_trl: TRL's own function ran, because {reason}"):
        found = apply(getattr(utils, NAME), tensors, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = apply(getattr(utils, NAME), tensors, options)
    for results in (found, again):
        torch.testing.assert_close(results, apply(original, tensors, options), rtol=0, atol=0)
    assert not kernel_calls


@pytest.mark.thresholds
def test_a_small_call_uses_the_original(utils: ModuleType, kernel_calls: KernelCalls) -> None:
    tensors, original = draw(torch.float32), getattr(utils, NAME)
    tensors[0], tensors[3] = tensors[0][:3], tensors[3][:3]
    pyfused.patch_trl()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = apply(getattr(utils, NAME), tensors)
    torch.testing.assert_close(found, apply(original, tensors), rtol=0, atol=0)
    assert not kernel_calls


@pytest.mark.parametrize("valid", [0, 7])
def test_only_rows_that_count_reach_the_head(
    valid: int, utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch without a valid label has a loss of 0 and gradients of 0."""
    policy, tokens = model(), torch.randint(3, 60, (2, 12))
    utils.add_fused_lm_head(policy, outputs=OUTPUTS)
    labels = torch.full_like(tokens, -100)
    labels.view(-1)[12 - valid : 12] = tokens.view(-1)[12 - valid : 12]
    rows: list[int] = []

    def count(hidden: Tensor, *arguments: Any) -> Any:
        rows.append(len(hidden))
        return function.apply(hidden, *arguments)

    results = []
    for patch in (None, pyfused.patch_trl):
        if patch is not None:
            monkeypatch.undo()
            patch()
        function = getattr(utils, NAME)
        monkeypatch.setattr(utils, NAME, type("Counting", (), {"apply": staticmethod(count)}))
        policy.zero_grad()
        output = policy(input_ids=tokens, labels=labels, fused_lm_head=True)
        output.loss.backward()
        gradients = [each.grad for each in policy.parameters()]
        results.append((output.loss, output.log_probs, output.entropy, output.is_top1, gradients))
    monkeypatch.undo()
    pyfused.unpatch_trl()
    assert rows == [22, valid]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert (results[1][0] == 0) == (valid == 0)
    assert results[1][4][0] is not None


@grid(
    beta=[0.0, 0.3, 1.0],
    options=["plain", "everything"],
    dtype=[torch.float32, torch.bfloat16],
    bias=[False, True],
    rows=[0, TOKENS],
)
def test_divergence_and_entropy(
    beta: float,
    options: str,
    dtype: torch.dtype,
    bias: bool,
    rows: int,
    utils: ModuleType,
    kernel_calls: KernelCalls,
) -> None:
    """Results and gradients equal TRL's; the teacher gets no gradient."""
    from trl.trainer import distillation_trainer as trainer

    temperature, softcap, scale = OPTIONS[options]
    (*student, _), (*teacher, _) = draw(dtype, bias), draw(dtype, bias)
    tensors = [student[0][:rows], *student[1:], teacher[0][:rows], *teacher[1:]]
    results = []
    for patch in (lambda: None, pyfused.patch_trl):
        patch()
        function = getattr(trainer, DIVERGENCE)
        cap = None if softcap is None else softcap + 1
        arguments = beta, temperature, scale, softcap, scale, cap
        divergence, entropy = function.apply(*tensors, *arguments)
        assert not entropy.requires_grad
        leaves = [x for x in (*student, *teacher) if x is not None]
        total = (divergence * torch.linspace(-1, 1, rows)).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([divergence, entropy, *gradients])
        assert bool(kernel_calls) == (patch is pyfused.patch_trl and rows > 0)
    limit = 0.06 if dtype is torch.bfloat16 else 1e-5
    for found, expected in zip(*results[::-1], strict=True):
        if expected is None or expected.numel() == 0:
            assert (found is None) == (expected is None)
            continue
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert (found.double() - expected.double()).norm() <= limit * expected.double().norm()


def test_a_divergence_of_two_scales_is_left_to_trl(
    utils: ModuleType, kernel_calls: KernelCalls
) -> None:
    from trl.trainer import distillation_trainer as trainer

    (*student, _), (*teacher, _) = draw(torch.float32), draw(torch.float32)
    arguments = *student, *teacher, 0.5, 1.0, 1.0, None, 0.5, None
    expected = getattr(trainer, DIVERGENCE).apply(*arguments)
    pyfused.patch_trl()
    with pytest.warns(RuntimeWarning, match="the scales of the student and the teacher differ"):
        found = getattr(trainer, DIVERGENCE).apply(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not kernel_calls


# ---- patching ------------------------------------------------------------------------------------


def functions() -> list[Any]:
    """Returns what TRL's modules have under the names that patch_trl replaces."""
    from trl.trainer import distillation_trainer, utils

    return [
        *(getattr(utils, name) for name in (NAME, SELECTS)),
        *(getattr(distillation_trainer, name) for name in (DIVERGENCE, SELECTS)),
    ]


@pytest.mark.usefixtures("utils")
def test_unpatch_restores_the_original() -> None:
    originals = functions()
    pyfused.patch_trl()
    pyfused.patch_trl()
    assert all(x is not y for x, y in zip(functions(), originals, strict=True))
    pyfused.unpatch_trl()
    assert all(x is y for x, y in zip(functions(), originals, strict=True))
    with pytest.raises(RuntimeError, match=r"unpatch_trl\(\) called without patch_trl"):
        pyfused.unpatch_trl()


def test_other_devices_are_left_to_trl(utils: ModuleType) -> None:
    """The number of rows changes in each batch, which some devices compile programs for."""
    original = getattr(utils, SELECTS)
    pyfused.patch_trl()
    selects = getattr(utils, SELECTS)
    assert selects(torch.device("cpu"))
    for device in map(torch.device, ("meta", "cuda")):
        assert selects(device) == original(device)


class Other(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        """TRL's function has more arguments."""


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        ("utils", NAME, None),
        ("utils", NAME, Other),
        ("utils", SELECTS, None),
        ("utils", SELECTS, lambda device, dtype: False),
        ("utils", SELECTS, lambda device: True),
        ("distillation_trainer", DIVERGENCE, Other),
        ("distillation_trainer", SELECTS, lambda device: True),
    ],
)
@pytest.mark.usefixtures("utils")
def test_an_unknown_function_is_not_replaced(
    module: str, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"trl.trainer.{module}.{name}", other)
    originals = functions()
    with pytest.warns(RuntimeWarning, match=rf"TRL is left unchanged.*{module}\.{name}") as warned:
        pyfused.patch_trl()
    assert len(warned) == 1
    assert all(x is y for x, y in zip(functions(), originals, strict=True))


# ---- trainers ------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(60)]


SIZES = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "num_hidden_layers": 1}
model = partial(language_models.tiny, "LlamaForCausalLM", vocab_size=len(WORDS) + 3, **SIZES)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    own = Tokenizer(models.WordLevel(words, unk_token="w0"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, bos, eos = special
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


def texts(words: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(60, (8, words), generator=generator).tolist()
    return ["".join(f" {WORDS[i]}" for i in row) for row in draws]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


SAMPLED = {"num_generations": 4, "max_completion_length": 6}
PROMPTS = {"prompt": 12, "completion": 4}
PAIRS = {"prompt": 3, "chosen": 5, "rejected": 4}
# The trainer, the words of each column, options of the trainer's configuration, and arguments.
KINDS: dict[str, tuple[str, dict[str, int], dict[str, Any], Any]] = {
    "SFT": ("SFT", {"text": 9}, {}, dict),
    "SFT, prompts": ("SFT", PROMPTS, {}, dict),
    "SFT, packed": ("SFT", PROMPTS, {"packing": True, "max_length": 24}, dict),
    "SFT, padding-free": ("SFT", PROMPTS, {"padding_free": True, "max_length": None}, dict),
    "SFT, bfloat16": ("SFT", PROMPTS, {"bf16": True}, dict),
    "SFT, LoRA": ("SFT", PROMPTS, {}, lambda: {"peft_config": lora()}),
    "GRPO": (
        "GRPO",
        {"prompt": 3},
        SAMPLED | {"temperature": 0.9},
        lambda: {"reward_funcs": reward},
    ),
    "RLOO": ("RLOO", {"prompt": 3}, SAMPLED | {"beta": 0.0}, lambda: {"reward_funcs": reward}),
    "DPO": ("DPO", PAIRS, {}, lambda: {"ref_model": model()}),
    "WPO": ("DPO", PAIRS, {"use_weighting": True}, lambda: {"ref_model": model()}),
    "distillation": (
        "Distillation",
        {"prompt": 3},
        {"max_completion_length": 6, "beta": 0.5},
        lambda: {"teacher_model": model(hidden_size=32)},
    ),
    "KTO": ("KTO", PROMPTS | {"label": 0}, {}, lambda: {"ref_model": model()}),
}


def lora() -> Any:
    import peft

    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)


def trained(kind: str, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the losses of five steps of a trainer, and the weights after them."""
    import transformers
    import trl
    from datasets import Dataset

    trainer_name, data, options, arguments = KINDS[kind]
    arguments_of_step = getattr(trl, f"{trainer_name}Config")(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", gradient_checkpointing=False,
        disable_tqdm=True, logging_steps=1, **{"bf16": False} | options,
    )  # fmt: skip
    columns = {name: texts(n) if n else [True, False] * 4 for name, n in data.items()}
    transformers.set_seed(0)
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=model(),
        args=arguments_of_step,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        **arguments(),
    )
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return losses, {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_reach_the_same_weights(
    kind: str, tmp_path: Path, utils: ModuleType, kernel_calls: KernelCalls
) -> None:
    initial = {name: x.detach() for name, x in model().named_parameters()}
    losses, expected = trained(kind, tmp_path)
    assert not kernel_calls["row_state"]
    pyfused.patch_trl()
    found_losses, found = trained(kind, tmp_path)
    assert kernel_calls["row_state"] >= 5
    assert kernel_calls["kl_div_with_logits" if kind == "distillation" else "row_gradients"] >= 5
    name, other = list(expected)[-1], list(initial)[-1]
    assert "lora" in "".join(expected) or not torch.equal(expected[name], initial[other])
    half = 0.02 if "bfloat16" in kind else 0
    torch.testing.assert_close(found_losses, losses, rtol=half or 1e-4, atol=half or 1e-5)
    torch.testing.assert_close(found, expected, rtol=half or 1e-3, atol=half or 1e-4)
