"""Settings every test shares."""

import logging
import os

import pytest
import torch
from hypothesis import settings

from tests import exported_once

settings.register_profile("clado", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("clado")
# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
# pytest listens to every logger that does not propagate; while anyone listens to this one, torch writes out every graph
# that it traces, and a failure's report is buried under it.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True, scope="session")
def _exported_once() -> None:
    exported_once.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked large run only when asked for: ``-m large``."""
    if "large" in config.getoption("-m"):
        return
    kept = [item for item in items if item.get_closest_marker("large") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
