"""transformers, Lightning and skorch give the same losses with and without pyfused.

The replacements that the page on language models gives for TRL's and Liger's functions have equal
results.
`make test-integrations` runs these tests, which download nothing.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import language_models
import pytest
import torch
from conftest import KernelCalls
from processes import python
from torch import Tensor

import pyfused
import pyfused.nn
from pyfused import functional as fused
from pyfused.dispatch import reasons

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # raised by these libraries
]
as_users_run_it = pytest.mark.thresholds
STEPS = 12


@pytest.fixture(autouse=True)
def examples_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def assert_equal_and_falling(losses: list[float], expected: list[float]) -> None:
    assert len(losses) >= STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


@as_users_run_it
@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_transformers_trainer(name: str, kernel_calls: KernelCalls) -> None:
    train = example("with_transformers").train
    expected = train(name, STEPS)
    assert not kernel_calls
    with pyfused.patch():
        losses = train(name, STEPS)
    assert_equal_and_falling(losses, expected)
    assert kernel_calls["cross_entropy"] >= STEPS


def test_lightning_trainer(kernel_calls: KernelCalls) -> None:
    train = example("with_lightning").train
    expected = train(False, STEPS)
    assert not kernel_calls
    assert_equal_and_falling(train(True, STEPS), expected)
    assert kernel_calls["cross_entropy"] >= STEPS
    assert kernel_calls["relu"] >= STEPS


def test_skorch_net(kernel_calls: KernelCalls) -> None:
    train = example("with_skorch").train
    expected = train(torch.nn, 2)
    assert not kernel_calls
    assert_equal_and_falling(train(pyfused.nn, 2), expected)
    assert kernel_calls["cross_entropy"] >= STEPS


# ---- language models with a fused head -----------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mixtral": SIZES | {"num_local_experts": 4, "output_router_logits": True},
    "Gemma2": SIZES | {"final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "GPT2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def language_model(kind: str, **more: Any) -> Any:
    import transformers

    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)
    torch.manual_seed(0)
    return model(model.config_class(**LANGUAGE_MODELS[kind] | more)).train()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 300, (8, 40), generator=generator)  # above the size limit
    labels = tokens.clone()
    labels[:, ::4] = -100
    return {"input_ids": tokens, "labels": labels}


@as_users_run_it
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("items", [None, 7, torch.tensor(9)], ids=["mean", "7", "tensor"])
def test_language_models(kind: str, items: Any, kernel_calls: KernelCalls) -> None:
    dropout = ("resid_pdrop", "embd_pdrop", "attn_pdrop") if kind == "GPT2" else ()
    model = language_model(kind, **dict.fromkeys(dropout, 0.0))
    options = {} if items is None else {"num_items_in_batch": items}
    found = []
    for convert in (lambda _: None, pyfused.convert, pyfused.revert):
        convert(model)
        for _ in range(2):  # torch computes the first loss
            kernel_calls.clear()
            output = model(**batch(), **options)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        found.append((output.loss, gradients, output.logits, kernel_calls["cross_entropy"]))
    for loss, gradients, *_ in found[1:]:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-6)
    assert [logits is None for _, _, logits, _ in found] == [False, True, False]
    assert found[1][3] > 0


@as_users_run_it
def test_language_models_that_return_logits() -> None:
    model = language_model("Llama")
    assert "." in pyfused.plan_conversion(model).swapped
    pyfused.convert(model)
    assert pyfused.plan_conversion(model).left[0].reason == "is already converted"
    assert model(input_ids=batch()["input_ids"]).logits is not None
    assert model(batch()["input_ids"], logits_to_keep=2).logits.shape[1] == 2
    assert model(batch()["input_ids"], None, None, None, None, batch()["labels"]).logits is None
    assert len(model(**batch(), return_dict=False)) >= 2
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert model(**batch()).logits is not None
    hook.remove()
    assert model(**batch()).logits is None
    model.eval()
    assert model(**batch()).logits is not None
    assert model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False).shape == (8, 42)


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def offloaded(model: Any, how: str, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    if how == "dispatch_model":
        places = {"model": "cpu", "lm_head": "disk"}
        accelerate.dispatch_model(model, places, offload_dir=folder, main_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@as_users_run_it
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_language_models(how: str, when: str, tmp_path: Path) -> None:
    """accelerate replaces the head's forward, and moves its weight to meta."""
    expected, model = language_model("Llama"), language_model("Llama")
    offloaded(expected, how, tmp_path / "expected")
    if when == "before":
        offloaded(model, how, tmp_path / "model")
        left = pyfused.plan_conversion(model).left
        assert left[0].reason == "its forward was replaced"  # also of an unconverted head
        pyfused.convert(model)
    else:
        pyfused.convert(model)
        assert model(**batch()).logits is None
        offloaded(model, how, tmp_path / "model")
        with pytest.warns(RuntimeWarning, match="forward of its head was replaced"):
            model(**batch())
    output = model(**batch())
    torch.testing.assert_close(output.loss, expected(**batch()).loss)
    assert output.logits is not None


@as_users_run_it
def test_logits_read_by_their_index_in_an_output() -> None:
    """Without logits, the next entry has another index, in torch and in tuple(output)."""
    model = pyfused.convert(language_model("Llama"))
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        output = call(**batch())
        assert (output.logits, output[0], output[:1]) == (None, output.loss, (output.loss,))
        for read in (lambda o: o[1], lambda o: o[:2], lambda o: (*o.to_tuple(),)):
            with pytest.raises(RuntimeError, match="other than the logits"):
                read(output)
        assert output[-1] is output.past_key_values
        assert list(output) == ["loss", "past_key_values"]
        again = type(output)(dict(output.items()))  # as accelerate does
        with pytest.raises(RuntimeError, match="other than the logits"):
            again[1]
    assert pickle.loads(pickle.dumps(output)).loss == output.loss


def test_a_converted_language_model_is_saved_under_its_own_name(tmp_path: Path) -> None:
    model = pyfused.convert(language_model("Llama"))
    model.save_pretrained(tmp_path)
    again = type(language_model("Llama")).from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert inspect.signature(model.forward) == inspect.signature(again.forward)


@as_users_run_it
def test_unsupported_models_are_reported_with_a_reason() -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    plan = pyfused.plan_conversion(transformers.ViTForImageClassification(config))
    assert str(plan).startswith("Nothing to convert: found no loss or activation")
    model = language_model("Llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    reason = pyfused.plan_conversion(model).left[0].reason
    assert reason.endswith("container.Sequential, not a plain torch.nn.Linear")


def test_a_model_of_transformers_whose_logits_are_read() -> None:
    kind = type(language_model("Llama"))

    class Peaked(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = output.loss + output.logits.float().logsumexp(-1).mean()
            return output

    plain = Peaked(language_model("Llama").config)
    model = pyfused.convert(copy.deepcopy(plain))
    with pytest.warns(RuntimeWarning, match="its logits are read by logsumexp"):
        output = model(**batch())
    for found in (output, model(**batch())):
        torch.testing.assert_close(found.loss, plain(**batch()).loss)
        torch.testing.assert_close(found.logits, plain(**batch()).logits)


@as_users_run_it
def test_calls_with_shifted_labels_and_kept_logits() -> None:
    plain, model = language_model("Llama"), pyfused.convert(language_model("Llama"))
    tokens, labels = batch().values()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    options: dict[str, Any]
    for options in (
        {"labels": labels, "shift_labels": shifted},
        {
            "labels": labels[:, -9:],
            "shift_labels": shifted[:, -9:].contiguous(),
            "logits_to_keep": 9,
        },
        {"labels": labels[:, :7], "logits_to_keep": torch.arange(7)},
    ):
        output, expected = model(tokens, **options), plain(tokens, **options)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(
            torch.autograd.grad(output.loss, list(model.parameters())),
            torch.autograd.grad(expected.loss, list(plain.parameters())),
            rtol=1e-4,
            atol=1e-6,
        )


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def with_images(kind: str, **more: Any) -> Any:
    """Returns a vision-language model of two tiny parts."""
    import transformers

    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    known = model.config_class()
    vision = language_models.sizes_of(known.vision_config) | {"image_size": 8, "patch_size": 4}
    parts = {"text_config": language_models.sizes_of(known.text_config), "vision_config": vision}
    torch.manual_seed(0)
    return model(model.config_class(**parts, **more))


def llava() -> tuple[Any, dict[str, Any]]:
    model = with_images("Llava", image_token_id=299, image_token_index=299)
    tokens = batch()["input_ids"].clamp(max=298)
    tokens[:, 1:5] = 299  # four patches
    images = torch.rand(8, 3, 8, 8)
    return model, {"input_ids": tokens, "labels": batch()["labels"], "pixel_values": images}


def whisper() -> tuple[Any, dict[str, Any]]:
    import transformers

    sizes = language_models.sizes_of(transformers.WhisperConfig())
    sizes |= {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
    config = transformers.WhisperConfig(**sizes | {"decoder_start_token_id": 1})
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.rand(8, 8, 40), "labels": batch()["labels"]}


def bert_pretraining() -> tuple[Any, dict[str, Any]]:
    import transformers

    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZES, **NO_DROPOUT))
    return model, batch() | {"next_sentence_label": torch.arange(8) % 2}


def bert_to_bert() -> tuple[Any, dict[str, Any]]:
    import transformers

    config = transformers.BertConfig(**SIZES, **NO_DROPOUT)
    decoder = transformers.BertConfig(
        **SIZES, **NO_DROPOUT, is_decoder=True, add_cross_attention=True
    )
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, decoder)
    both.pad_token_id, both.decoder_start_token_id = 0, 1
    return transformers.EncoderDecoderModel(both), batch()


@as_users_run_it
@pytest.mark.parametrize(
    "of",
    [llava, whisper, bert_pretraining, bert_to_bert],
    ids=lambda f: f.__name__,
)
def test_models_with_several_parts(of: Callable[[], Any]) -> None:
    model, inputs = of()
    found = []
    for convert in (lambda _: None, pyfused.convert):
        convert(model.train())
        for _ in range(2):  # torch computes the first loss
            torch.manual_seed(0)
            output = model(**inputs)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        names, leaves = zip(*trained, strict=True)
        gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
        found.append((output.loss, dict(zip(names, gradients, strict=True))))
    logits = getattr(output, "logits", None) or getattr(output, "prediction_logits", None)
    assert logits is None
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-6)


@as_users_run_it
def test_training_without_labels_warns_once() -> None:
    model, tokens = pyfused.convert(language_model("Llama")), batch()["input_ids"]
    encoder_decoder, inputs = bert_to_bert()
    pyfused.convert(encoder_decoder.train())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(tokens, output_hidden_states=True)
        model(tokens, logits_to_keep=1)
        with torch.no_grad():
            model(tokens)
        model.generate(tokens, max_new_tokens=2, do_sample=False)
        model.eval()(tokens)
        model.train().model(tokens)
        encoder_decoder(**inputs)  # its decoder gets no labels
    with pytest.warns(RuntimeWarning, match="without labels. Pass labels=. Trainer removes them"):
        model(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens)


def trainer(model: Any, kind: Any = None, **options: Any) -> Any:
    import transformers

    texts = example("with_transformers").Texts()
    arguments = transformers.TrainingArguments(
        "unused", max_steps=3, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, per_device_eval_batch_size=8, **options,
    )  # fmt: skip
    return (kind or transformers.Trainer)(model, arguments, train_dataset=texts, eval_dataset=texts)


@as_users_run_it
@pytest.mark.parametrize("accumulate", [1, 2])
def test_label_smoothing_as_documented(accumulate: int) -> None:
    """The documented loss equals the loss of Trainer's label_smoothing_factor."""
    import transformers

    class Smoothing(transformers.Trainer):  # as in docs/language-models.md
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model.model(**inputs)
            loss = fused.linear_cross_entropy(
                outputs.last_hidden_state[:, :-1],
                model.lm_head.weight,
                labels[:, 1:],
                label_smoothing=0.1,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    found = []
    for kind, smoothing in ((Smoothing, 0.0), (None, 0.1)):
        model, options = (
            language_model("Llama", vocab_size=512),
            {"label_smoothing_factor": smoothing},
        )
        train = trainer(model, kind, gradient_accumulation_steps=accumulate, **options)
        train.train()
        found.append([entry["loss"] for entry in train.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@as_users_run_it
def test_evaluation_and_metrics_with_trainer() -> None:
    import transformers

    class Accuracy(transformers.Trainer):  # as in docs/language-models.md
        def log(self, logs: dict[str, float], *args: Any) -> None:
            metrics = self.model.pyfused_metrics
            if "loss" in logs and metrics is not None:
                valid = metrics.prediction != -100
                logs["accuracy"] = float(metrics.correct.sum() / valid.sum())
            super().log(logs, *args)

    def plain() -> Any:
        return language_model("Llama", vocab_size=512)

    expected = trainer(plain()).evaluate()["eval_loss"]
    model = pyfused.convert(plain(), evaluation=True, metrics=True)
    train = trainer(model, Accuracy)
    assert train.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert model.pyfused_metrics.correct.shape == (8 * 32,)
    train.train()
    steps = [entry for entry in train.state.log_history if "loss" in entry]
    assert [0 <= entry["accuracy"] <= 1 for entry in steps] == [True] * 3


@as_users_run_it
def test_callback_of_trainer(caplog: pytest.LogCaptureFixture) -> None:
    from pyfused.integrations.transformers import PyfusedCallback

    plain = trainer(language_model("Llama", vocab_size=512))
    train = trainer(language_model("Llama", vocab_size=512))
    train.add_callback(PyfusedCallback(train, metrics=True))
    with caplog.at_level(logging.INFO, "pyfused"):
        for each in (plain, train):
            each.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, train)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert train.model.pyfused_metrics is not None
    logged = train.state.log_history[-1]
    assert (logged["pyfused/kernel_calls"], logged["step"]) == (4, 3)  # two are comparisons
    assert any("linear_cross_entropy" in record.getMessage() for record in caplog.records)
    train.train()  # its report is a new one
    assert train.state.log_history[-1]["pyfused/kernel_calls"] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_callback_of_lightning(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning
    from lightning.pytorch.loggers.logger import DummyLogger

    from pyfused.adopt import report
    from pyfused.integrations.lightning import PyfusedCallback

    logged: list[Any] = []
    logger: Any = DummyLogger()
    monkeypatch.setattr(type(logger), "log_metrics", lambda _, *args, **__: logged.append(args[0]))
    module, expected = example("with_lightning"), example("with_lightning").train(False, STEPS)
    kind: Any = lightning.Trainer
    options = {"callbacks": PyfusedCallback(), "logger": logger}
    monkeypatch.setattr(lightning, "Trainer", lambda **more: kind(**(more | options)))
    if fails:
        monkeypatch.setattr(module.Classifier, "training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.train(False, STEPS)
    else:
        assert_equal_and_falling(module.train(False, STEPS), expected)
        assert logged[-1]["pyfused/kernel_calls"] >= 2 * STEPS
        assert logged[-1]["pyfused/left_to_torch"] == 0
    assert report._reports == ()


def test_lightning_layers_made_before_training_are_converted() -> None:
    import lightning

    from pyfused.integrations.lightning import PyfusedCallback

    class Late(example("with_lightning").Classifier):  # type: ignore[misc]
        def setup(self, stage: str) -> None:  # noqa: ARG002
            self.model = torch.nn.Sequential(torch.nn.Linear(16, 10), torch.nn.ReLU())

        def configure_model(self) -> None:
            self.criterion = torch.nn.CrossEntropyLoss()

        def validation_step(self, batch: Any) -> None:
            self.training_step(batch)

    module, x = Late(), torch.randn(8, 16)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :10].argmax(1)))
    options = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[PyfusedCallback()], **options
    )
    for run in (trainer.validate, trainer.fit):
        module.model = module.criterion = None
        run(module, data)
        assert type(module.model[1]) is pyfused.nn.ReLU
        assert type(module.criterion) is pyfused.nn.CrossEntropyLoss
        assert "configure_model" not in vars(module)


@as_users_run_it
def test_callback_of_trainer_when_training_fails_or_makes_a_model() -> None:
    from pyfused.adopt import report
    from pyfused.integrations.transformers import PyfusedCallback

    train = trainer(language_model("Llama", vocab_size=512))
    train.add_callback(PyfusedCallback(train))
    compute_loss, train.compute_loss = train.compute_loss, lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train.train()
    assert report._reports == ()
    train.compute_loss, train.model_init = (
        compute_loss,
        lambda: language_model("Llama", vocab_size=512),
    )
    before = train.model
    train.train()
    assert train.model is not before
    assert pyfused.plan_conversion(train.model).left[0].reason == "is already converted"
    assert train.state.log_history[-1]["pyfused/kernel_calls"] > 0


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BartForConditionalGeneration"])
def test_a_compiled_model_that_creates_its_loss_module_warns(name: str) -> None:
    reasons._reported.clear()
    model = pyfused.convert(language_models.tiny(name))
    assert language_models.step(model)[2] is False
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(RuntimeWarning, match="all of its logits: its forward creates its loss"):
        language_models.step(compiled)


class OwnModel(torch.nn.Module):
    """A user's language model, with its own attribute names."""

    def __init__(self, weight_of_logits: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.out = torch.nn.Embedding(300, 16), torch.nn.Linear(16, 300)
        self.weight_of_logits = weight_of_logits

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits = self.out(self.embedding(tokens).tanh()) / 2.0
        if targets is None:
            return logits, None
        shifted = logits[..., :-1, :].contiguous()
        loss = torch.nn.functional.cross_entropy(
            shifted.view(-1, shifted.size(-1)), targets[..., 1:].reshape(-1)
        )
        if self.weight_of_logits:
            loss = loss + self.weight_of_logits * logits.square().mean()
        return logits, loss


@as_users_run_it
@pytest.mark.parametrize("weight_of_logits", [0.0, 0.1])
def test_a_head_named_by_the_user(weight_of_logits: float, kernel_calls: KernelCalls) -> None:
    model, tokens = OwnModel(weight_of_logits), batch()["input_ids"]
    expected = model(tokens, tokens)[1]
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    with pytest.raises(ValueError, match=r"head: expected the name .* one of \['out'\], got 'x'"):
        pyfused.convert(model, head="x")
    assert pyfused.plan_conversion(model).swapped == ()
    assert pyfused.plan_conversion(model, head="out").swapped == (".",)
    pyfused.convert(model, head="out")
    for again in (model, copy.deepcopy(model), saved_and_loaded(model)):
        kernel_calls.clear()
        logits, loss = again(tokens, tokens)
        assert (logits is None) == (weight_of_logits == 0)
        assert kernel_calls["cross_entropy"] > 0
        torch.testing.assert_close(loss, expected)
        for _, each in ((logits, loss), again(tokens, tokens)):
            found = torch.autograd.grad(each, list(again.parameters()))
            torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)
        assert again(tokens)[0].shape == (8, 40, 300)
        assert again.eval()(tokens, tokens)[0].shape == (8, 40, 300)
        again.train()
    pyfused.revert(model)
    assert type(model) is OwnModel


def test_every_causal_language_model_of_the_list() -> None:
    """The page's list of supported models is correct, and gradients are equal."""
    page = (Path(__file__).parents[1] / "docs" / "causal-language-models.md").read_text()
    listed = {
        name: reason.strip()
        for name, reason in re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    }
    assert set(listed) == set(language_models.names())
    assert sum(reason == "converted" for reason in listed.values()) >= 240
    found = {name: language_models.conversion(name) for name in listed}
    assert found == listed


@as_users_run_it
def test_gradient_accumulation_with_a_fused_head() -> None:
    """Trainer passes the number of targets of all micro-batches."""
    train = example("with_transformers").train
    expected = train("Llama", STEPS, accumulate=4)
    losses = train("Llama", STEPS, accumulate=4, convert=True)
    assert_equal_and_falling(losses, expected)
    assert losses == pytest.approx(train("Llama", STEPS), rel=1e-3)


# ---- heads that PEFT has wrapped -----------------------------------------------------------------


def with_adapters(model: Any, **options: Any) -> Any:
    """Returns a model of PEFT, whose weights are random and nonzero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).train()


def step(model: Any) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Returns the loss, the gradients by name, and whether the output has logits."""
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    named = model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return output.loss.detach(), gradients, output.logits is not None


@as_users_run_it
@pytest.mark.parametrize("when", ["the PEFT model", "the model inside", "before get_peft_model"])
def test_a_trained_copy_of_the_head(when: str) -> None:
    pytest.importorskip("peft")
    options, model = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None
    expected = step(with_adapters(language_model("Llama"), **options))
    if when == "before get_peft_model":
        model = with_adapters(pyfused.convert(language_model("Llama")), **options)
    else:
        model = with_adapters(language_model("Llama"), **options)
        pyfused.convert(model if when == "the PEFT model" else model.base_model.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loss, gradients, logits = step(model)
    assert not logits
    torch.testing.assert_close((loss, gradients), expected[:2], rtol=1e-4, atol=1e-6)


@as_users_run_it
@pytest.mark.parametrize("when", ["before", "after", "named"])
def test_torch_computes_the_logits_of_a_head_with_an_adapter(when: str) -> None:
    pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "lm_head"]}
    expected = step(with_adapters(language_model("Llama"), **options))
    reason = "its head has an adapter, peft.tuners.lora.layer.Linear"
    if when == "before":
        model = with_adapters(pyfused.convert(language_model("Llama")), **options)
        with pytest.warns(RuntimeWarning, match=reason):
            step(model)
    else:
        model = with_adapters(language_model("Llama"), **options)
        inner, head = model.base_model.model, {} if when == "after" else {"head": "lm_head"}
        assert pyfused.plan_conversion(inner, **head).left[0].reason == reason
        with pytest.warns(RuntimeWarning, match=reason):
            pyfused.convert(inner, **head)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = step(model)
    assert found[2]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if when == "before":  # without its adapter, the head is fused again
        plain = model.merge_and_unload()
        assert not step(plain.requires_grad_())[2]


# ---- TRL and Liger -------------------------------------------------------------------------------


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Compares values and gradients; sums of about ten float32 numbers may be in another order."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grad_output = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad_output),
        torch.autograd.grad(theirs, leaves, grad_output),
        rtol=1e-5,
        atol=1e-5,
    )


def test_trl(kernel_calls: KernelCalls) -> None:
    theirs = pytest.importorskip("trl.trainer.utils")
    logits, index = torch.randn(2, 5, 50, requires_grad=True), torch.randint(50, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    ours = fused.log_probs(logits, index, dim=-1, return_entropy=True)
    assert_same(ours.log_probability, theirs.selective_log_softmax(logits, index), [logits])
    ours = fused.log_probs(logits, index, dim=-1, return_entropy=True)
    assert_same(ours.entropy, theirs.entropy_from_logits(logits), [logits])
    target = index.masked_fill(mask == 0, -100)
    ours = fused.log_probs(logits, target, dim=-1, temperature=0.7)
    expected = theirs.selective_log_softmax(logits, index, temperature=0.7, row_mask=mask)
    assert_same(ours.log_probability, expected, [logits])
    assert kernel_calls["row_state"] == 3


def test_liger() -> None:
    """Runs Liger's kernels in Triton's interpreter, if it is enabled at start."""
    pytest.importorskip("liger_kernel")
    environment = {"TRITON_INTERPRET": "1", "PYFUSED_BACKEND": "cpu"}
    for function in ("liger", "liger_layers"):
        done = python(f"import test_integrations; test_integrations.{function}()", **environment)
        assert done.returncode == 0, done.stderr


def liger() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    torch.manual_seed(0)
    input, weight = (torch.randn(n, 16, requires_grad=True) for n in (10, 50))
    target, both = torch.randint(50, (10,)), [input, weight]
    target[3:6] = -100
    for options, ours in (
        ({}, {}),
        (
            {"reduction": "sum", "label_smoothing": 0.1},
            {"reduction": "sum", "label_smoothing": 0.1},
        ),
        ({"lse_square_scale": 0.01}, {"z_loss": 0.01}),
    ):
        expected = LigerFusedLinearCrossEntropyLoss(**options)(weight, input, target)
        assert_same(fused.linear_cross_entropy(input, weight, target, **ours), expected, both)

    teacher = torch.randn(10, 24), torch.randn(50, 24)
    for beta, temperature, labels in ((0.5, 1.0, None), (0.3, 2.0, target), (0.0, 2.0, target)):
        theirs = LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature)
        loss = fused.linear_kl_div(
            *(input, weight, *teacher),
            beta=beta,
            temperature=temperature,
            token_weight=None if labels is None else labels != -100,
        )
        assert_same(loss, theirs(input, weight, *teacher, labels), both)

    hidden = torch.randn(2, 5, 16, requires_grad=True)
    index, mask = torch.randint(50, (2, 5)), torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    advantage, old = torch.randn(2), -4 + torch.randn(2, 5)
    first, each = old + 0.1 * torch.randn(2, 5), advantage[:, None]
    theirs = LigerFusedLinearGRPOLoss(beta=0.04, compiled=False, temperature=0.9)
    expected, _ = theirs(hidden, weight, index, mask, advantage, None, first, old)
    counted = index.masked_fill(mask == 0, -100)
    new = fused.linear_log_probs(hidden, weight, counted, temperature=0.9).log_probability
    ratio, away = (new - old).exp(), first - new
    gain = torch.minimum(ratio * each, ratio.clamp(0.8, 1.2) * each)
    loss = ((0.04 * (away.exp() - away - 1) - gain) * mask).sum() / mask.sum()
    assert_same(loss, expected, [hidden, weight])


def liger_layers() -> None:
    """Liger's rotary embeddings and norms, and pyfused's MLPs, head and loss, in one model."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    def step(model: Any) -> tuple[Any, tuple[Tensor, ...]]:
        tokens = batch()["input_ids"][:2, :10]
        output = model(input_ids=tokens, labels=tokens)
        return output, torch.autograd.grad(output.loss, list(model.parameters()))

    expected, gradients = step(language_model("Llama"))
    others = dict.fromkeys(("swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)
    apply_liger_kernel_to_llama(rope=True, rms_norm=True, **others)
    # Triton's interpreter lacks functions of the kernel for norms.
    LigerRMSNorm.forward = lambda norm, x: torch.nn.functional.rms_norm(
        x, x.shape[-1:], norm.weight, norm.variance_epsilon
    )
    model = pyfused.convert(language_model("Llama"))
    assert type(model.model.norm) is LigerRMSNorm
    output, found = step(model)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
