"""Train the embedded net: ``python -m clado.digits.train [--epochs 300] [--out file]``, minutes on two cores.

Seeds are fixed and every epoch draws fresh shifts and noise. On one machine with one version of torch the same file comes out
bit for bit; elsewhere floating-point sums may differ and the net with them, within the ranges of tests/test_digits.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..files import atomic_file
from ..progress import progress_bar
from . import WEIGHTS, build_model, clean_digits, load_data, spoil

BATCH = 57  # twelve batches an epoch


def train(epochs: int, verbose: bool = True) -> nn.Module:
    """The net after ``epochs`` passes over the training split."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of sums must not depend on the machine's cores
    generator = np.random.default_rng(1000)
    model = build_model().train()
    images, labels = clean_digits("train")
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    with progress_bar("train", epochs, "epochs", verbose) as show:
        for epoch in range(epochs):
            order = torch.from_numpy(generator.permutation(len(images)))
            hard = spoil(images, generator)
            for batch in order.split(BATCH):
                loss = cross_entropy(model(hard[batch]), labels[batch])
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
