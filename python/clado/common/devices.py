"""Devices that a run may take."""

from __future__ import annotations

import torch

USABLE = "be cpu or a GPU that torch sees"  # what a device must


def usable(device: str | torch.device) -> bool:
    """Whether clado computes on a device and this machine has it."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    count = torch.cuda.device_count() if place.type == "cuda" else int(place.type == "cpu")
    return (place.index or 0) < count
