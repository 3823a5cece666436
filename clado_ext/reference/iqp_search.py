"""Twin of clado_ext.iqp_search: every choice is tried."""

import itertools

import torch
from torch import Tensor


def iqp_search(matrix: Tensor, starts: Tensor, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The best feasible choice and its value; (-1 throughout, infinity) where there is none."""
    layers = [torch.arange(int(low), int(high)) for low, high in itertools.pairwise(starts)]
    choices = torch.cartesian_prod(*layers).view(-1, len(layers))
    choices = choices[(rows[:, choices].sum(dim=2) <= limits[:, None]).all(dim=0)]
    if not len(choices):
        return torch.full((len(layers),), -1), torch.tensor(torch.inf, dtype=torch.float64)
    values = matrix[choices[:, :, None], choices[:, None, :]].sum(dim=(1, 2)) / 2
    best = values.argmin()
    return choices[best], values[best]
