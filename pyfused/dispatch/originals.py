"""torch.nn.functional as it was when pyfused was imported, unaffected by :func:`pyfused.patch`."""

from __future__ import annotations

from types import SimpleNamespace

import torch

F = SimpleNamespace(**vars(torch.nn.functional))
