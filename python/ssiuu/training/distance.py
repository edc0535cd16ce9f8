"""How far training has moved a model."""

from __future__ import annotations

import torch
from torch import nn
from torch.linalg import vector_norm


class Distance:
    """L2 distance of the trained weights from where they are now; the others do not move.

    Keeps a copy of them in host memory, and brings one parameter at a time back to the model's device.
    """

    def __init__(self, model: nn.Module):
        trained = [param for param in model.parameters() if param.requires_grad]
        self.original = [(param, param.detach().to("cpu", copy=True)) for param in trained]

    @torch.no_grad()
    def __call__(self) -> float:
        """The distance, summed in float64."""
        moved = (param.float() - original.to(param.device).float() for param, original in self.original)
        return torch.stack([vector_norm(part, dtype=torch.float64) for part in moved]).norm().item()
