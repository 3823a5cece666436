"""make gpu-check fails clearly where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_a_failure() -> None:
    script = Path(__file__).parent.parent / "bench" / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gpu-check: torch" in done.stderr
    assert "sees no GPU" in done.stderr
    assert "Traceback" not in done.stderr
