"""More than one process."""

from __future__ import annotations

import torch.distributed as dist


def refuse_more_processes() -> None:
    """Raise a ValueError in a process group of more than one: each rank would penalise its own samples' gP alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes; expected one, since the target gradient is not summed over ranks, and "
            "the ranks' weights would drift apart: start the program without torchrun or accelerate launch"
        )
