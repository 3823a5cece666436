"""Train the embedded net: ``python -m clado.runs.digits.train [--epochs 300] [--out file]``, minutes on two cores.

Seeds are fixed and every epoch draws fresh shifts and noise. On one machine with one version of torch the same file comes out
bit for bit; elsewhere floating-point sums may differ and the net with them, within the ranges of tests/test_digits.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...common import atomic_file, progress_bar
from . import WEIGHTS, build_model, clean_digits, load_data, spoil

BATCH = 57  # twelve batches an epoch


def train(epochs: int, verbose: bool = True) -> nn.Module:
    """The net after ``epochs`` passes over the training split."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of sums must not depend on the machine's cores
    generator = np.random.default_rng(1000)
    images, labels = clean_digits("train")

    def draw() -> tuple[Tensor, Tensor]:
        return torch.from_numpy(generator.permutation(len(images))), spoil(images, generator)

    return fit(build_model(), labels, draw, epochs, BATCH, 1e-3, "train", verbose)


def fit(
    model: nn.Module,
    labels: Tensor,
    draw: Callable[[], tuple[Tensor, Tensor]],
    epochs: int,
    batch_size: int,
    rate: float,
    title: str,
    verbose: bool = True,
) -> nn.Module:
    """Train by AdamW over one cycle of the learning rate; the model, in eval mode.

    Args:
        labels: of all samples.
        draw: an epoch's order of the samples, and their images.
        rate: the largest learning rate.
    """
    model.train()
    steps = epochs * -(-len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    with progress_bar(title, epochs, "epochs", verbose) as show:
        for epoch in range(epochs):
            order, images = draw()
            for batch in order.split(batch_size):
                loss = cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            show(epoch + 1)
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, split: str) -> tuple[float, float]:
    """(loss in nats, accuracy) on a split."""
    images, labels = load_data(split)
    logits: Tensor = model(images)
    return cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    model = train(options.epochs)
    with atomic_file(options.out) as temporary:
        save_file(model.state_dict(), temporary)
    for split in ("train", "sensitivity", "heldout"):
        loss, accuracy = score(model, split)
        print(f"{split:12} loss {loss:.3f}  accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
