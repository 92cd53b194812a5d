"""From which number of elements on the kernels are faster than ATen's operators.

`make sizes` writes it. What is not measured anew stays, from another machine perhaps; the last
entries were measured on one thread and on all, forward and with backward on
AMD EPYC, 2 cores, 2 threads, x86-64-v4, GCC 12.2.0, torch 2.13.0+cpu, Python 3.11.7, Linux,
2026-11-23.
"""

from __future__ import annotations

import math

import torch

ANY = math.inf

# Rows of (classes up to, elements below which ATen is faster); the last is for all further
# classes. Small calls cost more than their work: an autograd.Function alone as much as all of
# ATen's. (N, C, d1, ..., dk) has rows of its own: ATen, too, has vectors along positions there.
# So has a loss of each element, `_none`, as it is one more output.
ATEN_BELOW: dict[str, dict[torch.dtype, tuple[tuple[float, int], ...]]] = {
    "cross_entropy": {
        torch.float32: ((15, 1 << 12), (24, 1 << 16), (ANY, 1 << 17)),
        torch.float64: ((15, 1 << 12), (32, 1 << 13), (256, 1 << 14), (ANY, 1 << 15)),
        torch.bfloat16: ((15, 1 << 12), (24, 1 << 13), (32, 1 << 16), (ANY, 1 << 17)),
        torch.float16: ((24, 1 << 12), (64, 1 << 16), (ANY, 1 << 17)),
    },
    "cross_entropy_kdim": {
        torch.float32: ((2, 1 << 16), (21, 1 << 17), (64, 1 << 18), (ANY, 1 << 17)),
        torch.float64: ((2, 1 << 14), (ANY, 1 << 15)),
        torch.bfloat16: ((2, 1 << 15), (21, 1 << 16), (ANY, 1 << 17)),
        torch.float16: ((2, 1 << 14), (64, 1 << 16), (ANY, 1 << 18)),
    },
    "nll_loss": {
        torch.float32: ((10, 1 << 18), (ANY, 1 << 24)),
        torch.float64: ((10, 1 << 24), (ANY, 1 << 20)),
        torch.bfloat16: ((ANY, 1 << 22),),
        torch.float16: ((10, 1 << 18), (ANY, 1 << 22)),
    },
    "multi_margin_loss": {
        torch.float32: ((ANY, 1 << 16),),
        torch.float64: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 0),),
        torch.float16: ((ANY, 0),),
    },
    "softmax": {
        torch.float32: ((8, 1 << 12), (ANY, 1 << 18)),
        torch.float64: (
            (8, 1 << 12),
            (16, 1 << 14),
            (32, 1 << 15),
            (64, 1 << 16),
            (1024, 1 << 18),
            (4096, 1 << 22),
            (ANY, 1 << 19),
        ),
        torch.bfloat16: (
            (16, 1 << 13),
            (32, 1 << 17),
            (64, 1 << 18),
            (128, 1 << 17),
            (ANY, 1 << 18),
        ),
        torch.float16: (
            (16, 1 << 13),
            (32, 1 << 17),
            (512, 1 << 18),
            (4096, 1 << 19),
            (ANY, 1 << 21),
        ),
    },
    "log_softmax": {
        torch.float32: ((8, 1 << 12), (ANY, 1 << 18)),
        torch.float64: (
            (8, 1 << 12),
            (16, 1 << 14),
            (32, 1 << 15),
            (64, 1 << 16),
            (128, 1 << 18),
            (256, 1 << 20),
            (1024, 1 << 18),
            (4096, 1 << 22),
            (ANY, 1 << 18),
        ),
        torch.bfloat16: ((16, 1 << 12), (128, 1 << 17), (4096, 1 << 18), (ANY, 1 << 17)),
        torch.float16: ((16, 1 << 12), (512, 1 << 18), (1024, 1 << 19), (ANY, 1 << 18)),
    },
    "mse_loss": {
        torch.float32: ((ANY, 1 << 17),),
        torch.float64: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 1 << 16),),
        torch.float16: ((ANY, 1 << 20),),
    },
    "mse_loss_none": {
        torch.float32: ((ANY, 1 << 22),),
        torch.bfloat16: ((ANY, 1 << 17),),
        torch.float16: ((ANY, 1 << 20),),
    },
    "l1_loss": {
        torch.float32: ((ANY, 1 << 16),),
        torch.float64: ((ANY, 1 << 14),),
        torch.bfloat16: ((ANY, 1 << 16),),
        torch.float16: ((ANY, 1 << 17),),
    },
    "l1_loss_none": {
        torch.float32: ((ANY, 1 << 20),),
        torch.bfloat16: ((ANY, 1 << 18),),
        torch.float16: ((ANY, 1 << 20),),
    },
    "smooth_l1_loss": {
        torch.float32: ((ANY, 1 << 17),),
        torch.float64: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 1 << 17),),
        torch.float16: ((ANY, 1 << 20),),
    },
    "smooth_l1_loss_none": {
        torch.float32: ((ANY, 1 << 22),),
        torch.bfloat16: ((ANY, 1 << 24),),
        torch.float16: ((ANY, 1 << 20),),
    },
    "huber_loss": {
        torch.float32: ((ANY, 1 << 18),),
        torch.float64: ((ANY, 1 << 17),),
        torch.bfloat16: ((ANY, 1 << 15),),
        torch.float16: ((ANY, 1 << 18),),
    },
    "huber_loss_none": {
        torch.float32: ((ANY, 1 << 23),),
        torch.bfloat16: ((ANY, 1 << 15),),
        torch.float16: ((ANY, 1 << 18),),
    },
    "binary_cross_entropy": {
        torch.float32: ((ANY, 1 << 12),),
        torch.float64: ((ANY, 1 << 12),),
        torch.bfloat16: ((ANY, 1 << 11),),
        torch.float16: ((ANY, 1 << 10),),
    },
    "binary_cross_entropy_with_logits": {
        torch.float32: ((ANY, 1 << 15),),
        torch.float64: ((ANY, 1 << 14),),
        torch.bfloat16: ((ANY, 1 << 14),),
        torch.float16: ((ANY, 1 << 16),),
    },
    "binary_cross_entropy_with_logits_none": {
        torch.float32: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 1 << 16),),
        torch.float16: ((ANY, 1 << 17),),
    },
    "kl_div": {
        torch.float32: ((ANY, 1 << 13),),
        torch.float64: ((ANY, 1 << 14),),
        torch.bfloat16: ((ANY, 1 << 13),),
        torch.float16: ((ANY, 1 << 14),),
    },
    "poisson_nll_loss": {
        torch.float32: ((ANY, 1 << 15),),
        torch.float64: ((ANY, 1 << 14),),
        torch.bfloat16: ((ANY, 1 << 15),),
        torch.float16: ((ANY, 1 << 17),),
    },
    "poisson_nll_loss_none": {
        torch.float32: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 1 << 17),),
        torch.float16: ((ANY, 1 << 18),),
    },
    "gaussian_nll_loss": {
        torch.float32: ((ANY, 1 << 11),),
        torch.float64: ((ANY, 1 << 11),),
        torch.bfloat16: ((ANY, 1 << 12),),
        torch.float16: ((ANY, 1 << 12),),
    },
    "soft_margin_loss": {
        torch.float32: ((ANY, 1 << 14),),
        torch.float64: ((ANY, 1 << 13),),
        torch.bfloat16: ((ANY, 1 << 14),),
        torch.float16: ((ANY, 1 << 16),),
    },
    "soft_margin_loss_none": {
        torch.float32: ((ANY, 1 << 15),),
        torch.bfloat16: ((ANY, 1 << 15),),
    },
    "hinge_embedding_loss": {
        torch.float32: ((ANY, 1 << 11),),
        torch.float64: ((ANY, 1 << 11),),
        torch.bfloat16: ((ANY, 1 << 12),),
        torch.float16: ((ANY, 1 << 12),),
    },
    "margin_ranking_loss": {
        torch.float32: ((ANY, 1 << 16),),
        torch.float64: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 1 << 16),),
        torch.float16: ((ANY, 1 << 16),),
    },
    "quantile_loss": {
        torch.float32: ((ANY, 1 << 16),),
        torch.float64: ((ANY, 1 << 16),),
        torch.bfloat16: ((ANY, 1 << 11),),
        torch.float16: ((ANY, 1 << 12),),
    },
    "log_cosh_loss": {
        torch.float32: ((ANY, 1 << 10),),
        torch.float64: ((ANY, 1 << 10),),
        torch.bfloat16: ((ANY, 1 << 10),),
        torch.float16: ((ANY, 1 << 13),),
    },
    "log_cosh_loss_none": {
        torch.float32: ((ANY, 1 << 13),),
    },
    "hinge_loss": {
        torch.float32: ((ANY, 1 << 16),),
        torch.float64: ((ANY, 1 << 13),),
        torch.bfloat16: ((ANY, 1 << 14),),
        torch.float16: ((ANY, 1 << 14),),
    },
    "hinge_loss_none": {
        torch.float32: ((ANY, 1 << 18),),
        torch.bfloat16: ((ANY, 1 << 15),),
    },
    "sigmoid_focal_loss": {
        torch.float32: ((ANY, 1 << 10),),
        torch.float64: ((ANY, 1 << 10),),
        torch.bfloat16: ((ANY, 1 << 10),),
        torch.float16: ((ANY, 1 << 16),),
    },
    "rmse_loss": {
        torch.float32: ((ANY, 1 << 17),),
        torch.float64: ((ANY, 1 << 17),),
        torch.bfloat16: ((ANY, 1 << 17),),
        torch.float16: ((ANY, 1 << 18),),
    },
    "multilabel_soft_margin_loss": {
        torch.float32: ((ANY, 1 << 12),),
        torch.float64: ((ANY, 1 << 11),),
        torch.bfloat16: ((ANY, 1 << 10),),
        torch.float16: ((ANY, 1 << 13),),
    },
    "relu": {
        torch.float32: ((ANY, 1 << 23),),
        torch.float64: ((ANY, 1 << 22),),
        torch.bfloat16: ((ANY, 1 << 18),),
        torch.float16: ((ANY, 1 << 24),),
    },
    "leaky_relu": {
        torch.float32: ((ANY, 1 << 23),),
        torch.float64: ((ANY, 1 << 22),),
        torch.bfloat16: ((ANY, 1 << 18),),
        torch.float16: ((ANY, 1 << 25),),
    },
    "sigmoid": {
        torch.float32: ((ANY, 1 << 20),),
        torch.float64: ((ANY, 1 << 19),),
        torch.bfloat16: ((ANY, 1 << 22),),
        torch.float16: ((ANY, 1 << 24),),
    },
    "tanh": {
        torch.float32: ((ANY, 1 << 21),),
        torch.float64: ((ANY, 1 << 19),),
        torch.bfloat16: ((ANY, 1 << 22),),
        torch.float16: ((ANY, 1 << 23),),
    },
    "softcap": {
        torch.float32: ((ANY, 1 << 10),),
        torch.float64: ((ANY, 1 << 10),),
        torch.bfloat16: ((ANY, 1 << 16),),
        torch.float16: ((ANY, 1 << 10),),
    },
    "silu": {
        torch.float32: ((ANY, 1 << 20),),
        torch.float64: ((ANY, 1 << 19),),
        torch.bfloat16: ((ANY, 1 << 22),),
        torch.float16: ((ANY, 1 << 24),),
    },
    "gelu": {
        torch.float32: ((ANY, 1 << 22),),
        torch.float64: ((ANY, 1 << 19),),
        torch.bfloat16: ((ANY, 1 << 24),),
        torch.float16: ((ANY, 1 << 24),),
    },
}
