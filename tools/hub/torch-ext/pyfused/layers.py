"""Layers whose ``forward`` can replace another module's, and then reads that module's attributes.

The kernel hub requires layers without a constructor and without attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F

__all__ = ["GELU", "ForCausalLMLoss", "GELUTanh", "GeGLUMLP", "SiLU", "SwiGLUMLP"]


class SiLU(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input)


class GELU(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)


class GELUTanh(nn.Module):
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class SwiGLUMLP(nn.Module):
    """The MLP of Llama, Qwen and Mistral: ``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.swiglu(self.gate_proj(x), self.up_proj(x)))


class GeGLUMLP(nn.Module):
    """The MLP of Gemma: ``down_proj(gelu(gate_proj(x), approximate="tanh") * up_proj(x))``."""

    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.geglu(self.gate_proj(x), self.up_proj(x), "tanh"))


class ForCausalLMLoss(nn.Module):
    """transformers' loss of a causal language model: token t + 1 is the target of logits t."""

    can_torch_compile = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        # The loss of half-precision logits is computed and returned in float32, without a copy.
        return F.cross_entropy(
            logits.reshape(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            denominator=num_items_in_batch,
            loss_dtype=torch.promote_types(logits.dtype, torch.float32),
        )
