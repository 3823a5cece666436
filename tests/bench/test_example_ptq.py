"""The example of docs/kernels.md: a plain loop and one call give the same quantized weights."""

import torch
from torch import nn

import clado_ext
from bench.example_ptq import BITS, compare, layers, main, plain


def test_the_loop_and_the_call_agree() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(20, 10))
    for weight in layers(model).values():
        for ours, theirs in zip(clado_ext.quantize_weight(weight, BITS).values, plain(weight, 95), strict=True):
            # One step of the search may differ where two are as good to float32; the error does not.
            error, wanted = (ours - weight).square().sum(), (theirs - weight).square().sum()
            torch.testing.assert_close(error, wanted, rtol=1e-4, atol=1e-9)
    rows = compare(model, steps=5)
    assert [name for name, *_ in rows] == ["0", "2"]
    assert all(abs(error - 1) < 1e-4 for *_, error in rows)


def test_it_runs(capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("bench.example_ptq.compare", lambda model: [("0", 1.0, 0.1, 1.0)])
    main()
    assert "quantize_weight" in capsys.readouterr().out
