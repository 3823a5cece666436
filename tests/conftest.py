"""Settings every test shares."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("clado", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("clado")
# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
