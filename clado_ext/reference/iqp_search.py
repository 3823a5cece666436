"""Twin of clado_ext.iqp_search: every choice is tried."""

import itertools

import torch
from torch import Tensor


def iqp_search(matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The best feasible choice and its value; (-1 throughout, infinity) where there is none."""
    layers = [range(int(low), int(high)) for low, high in itertools.pairwise(starts)]
    best, best_value = torch.full((len(layers),), -1), torch.tensor(torch.inf, dtype=torch.float64)
    for picked in itertools.product(*layers):
        choice = torch.tensor(picked)
        if bool((rows[:, choice].sum(dim=1) > limits).any()):
            continue
        value = matrix[choice][:, choice].sum() / 2
        if value < best_value:
            best, best_value = choice, value
    return best, best_value
