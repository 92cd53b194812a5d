"""Computes a loss with the kernel in this folder, and compares it with torch's.

python example.py
"""

from pathlib import Path

import torch

from kernels import get_local_kernel

pyfused = get_local_kernel(Path(__file__).parent)
device = "cuda" if torch.cuda.is_available() else "cpu"
logits = torch.randn(64, 1000, device=device, requires_grad=True)
target = torch.randint(1000, (64,), device=device)
loss = pyfused.functional.cross_entropy(logits, target)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
print(f"{loss.item():.4f} on {device}:", pyfused.explain("cross_entropy", logits, target))
