"""Language models of transformers: their head and loss as ``linear_cross_entropy``.

A model gets a subclass of its class, of the same name. Its ``forward`` calls the model's own where
the logits are asked for.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache, wraps
from types import new_class
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import pad

from pyfused.functional import linear_cross_entropy

# The models that have nothing between head and loss, or only a softcap.
KNOWN = (
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


def has_head(module: Any) -> bool:
    """Whether it is a model of transformers with a head of logits."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    return module.get_output_embeddings() is not None


def reason_to_leave(model: Any) -> str | None:
    """Why a model that has a head keeps its ``forward``."""
    if is_fused(model):
        return "is pyfused's already"
    if "forward" in vars(model):
        return "its forward was replaced"
    if type(model).__name__ not in KNOWN or not type(model).__module__.startswith("transformers."):
        return f"what it does between head and loss is not known, as it is of {', '.join(KNOWN)}"
    if type(model.get_output_embeddings()) is not Linear:
        return "its head is no plain torch.nn.Linear"
    return None


def is_fused(model: Any) -> bool:
    return hasattr(type(model), "_unfused")


def fuse(model: Any) -> None:
    model.__class__ = _fused(type(model))  # type: ignore[arg-type]  # a class can be hashed


def unfuse(model: Any) -> None:
    model.__class__ = type(model)._unfused


@cache
def _fused(kind: Any) -> Any:
    """The subclass of a model's class, which a copy, a replica and a loaded model have as well."""
    parameters = inspect.signature(kind.forward)

    @wraps(kind.forward)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(parameters.bind(model, *args, **kwargs).arguments)
        del given["self"]
        options = given.pop("kwargs", {})
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        if labels is None or not model.training or not _is_plain(model, keep, options):
            return kind.forward(model, *args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        outputs = model.base_model(**given, **options)
        return CausalLMOutputWithPast(
            loss=_loss(model, outputs.last_hidden_state, labels, **options),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def reduce(model: Any, protocol: Any) -> Any:  # the subclass cannot be imported
        return _new, (kind,), *kind.__reduce_ex__(model, protocol)[2:]

    members = {"forward": forward, "__reduce_ex__": reduce, "_unfused": kind}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(members | named))


def _new(kind: Any) -> Any:
    """A fused model without attributes, which pickle and copy fill."""
    return kind.__new__(_fused(kind))


def _is_plain(model: Any, keep: Any, options: dict[str, Any]) -> bool:
    """Whether nobody has put something of their own where the logits would be."""
    head = model.get_output_embeddings()
    return (
        type(head) is Linear
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
        and isinstance(keep, int)
        and keep == 0
        and getattr(model.loss_function, "__name__", None) == "ForCausalLMLoss"
        and options.get("return_dict", model.config.return_dict) is not False
    )


def _loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Computes what ``ForCausalLMLoss`` does: each token predicts the next, in float32."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    head = model.get_output_embeddings()
    return linear_cross_entropy(
        hidden.flatten(0, -2),
        head.weight,
        shift_labels.flatten().to(hidden.device),
        linear_bias=head.bias,
        ignore_index=ignore_index,
        softcap=getattr(model.config, "final_logit_softcapping", None),
        denominator=num_items_in_batch,
        loss_dtype=torch.float32,
    )
