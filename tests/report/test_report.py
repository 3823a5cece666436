"""The report: what the page says is what the run holds; it needs nothing else, with a model, without, and with bare scores."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import clado
from clado import CladoError, Sensitivity, solve, write_figures, write_report
from clado.artifacts import Provenance
from clado.cli import main
from clado.quant import Candidates, Layer
from clado.report import Contents, agreement, gather, matrix_figures, random_plans, style, uniform_plans
from clado.report.page import _proof, readable_bytes, render
from tests.models import tiny_vit

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIGURES = {"bits", "interactions", "agreement", "frontier", "eigenvalues", "sampling"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a tiny ViT with a plan, a frontier, measured plans and the page."""
    run = tmp_path_factory.mktemp("report") / "run"
    model, shape = tiny_vit()
    sens = clado.profile(model, [torch.randn(12, *shape)], (2, 4, 8), output_dir=run, verbose=False)
    solve(sens, avg_bits=3.5).save(run)
    write_report(run, model=model, heldout=[torch.randn(6, *shape)], verbose=False)
    return run


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores from elsewhere: no model, no standard errors, a layer with a name that HTML would take for a tag."""
    run = tmp_path_factory.mktemp("imported")
    Sensitivity.from_matrix(np.diag([4.0, 1.0, 0.5, 2.0, 0.5, 0.1]), [("<b>stem</b>", 96), ("head", 32)]).save(run)
    write_report(run, verbose=False)
    return run


def drawn(page: str) -> dict[str, dict]:
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S).group(1))


def test_page_tells_what_the_run_holds(measured: Path) -> None:
    page, sens, plan = (measured / "report.html").read_text(), Sensitivity.load(measured), clado.Plan.load(measured)
    specs = drawn(page)
    assert set(specs) == FIGURES
    assert {name for name in re.findall(r'data-figure="(\w+)"', page)} == FIGURES
    assert f"{plan.size_bytes:,}" in page
    assert all(value in page for value in sens.fingerprint.values())
    cells = specs["interactions"]["data"]["values"]
    assert len(cells) == len(sens.layers) * (len(sens.layers) + 1) // 2
    total = sum(cell["w"][cell["m"] * 3 + cell["n"]] for cell in cells)
    assert total == pytest.approx(sens.predict(plan.bits), rel=1e-2)  # entries are kept to three digits
    blocks = specs["bits"]["data"]["values"]
    area = sum((block["to"] - block["from"]) * block["bits"] for block in blocks)
    assert area == pytest.approx(plan.avg_bits * sum(layer.numel for layer in plan.layers))
    assert "faint" in page.lower()


def test_page_needs_nothing_else(measured: Path) -> None:
    page = (measured / "report.html").read_text()
    tags = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[^\"')>\s]+", tags)
    assert "$schema" not in json.dumps(drawn(page))
    assert len(page) < 3_000_000


def test_measured_plans_are_the_true_loss_and_are_kept(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = tiny_vit()
    torch.manual_seed(3)
    data = [torch.randn(6, *shape)]
    shutil.rmtree(measured / "again", ignore_errors=True)
    again = shutil.copytree(measured, measured.parent / "again", dirs_exist_ok=True)
    (again / "measured.json").unlink()
    contents = gather(again, model=model, heldout=data, verbose=False)
    record = next(record for record in contents.measured if record["kind"] == "chosen")
    with torch.inference_mode():
        clean = model(data[0]).double().log_softmax(1)
        noisy = clado.apply(model, contents.plan)(data[0]).double().log_softmax(1)
    oracle = (clean.exp() * (clean - noisy)).sum(1)
    # Float32 forwards in another order: 1e-5 of a loss of this size.
    assert record["increase"] == pytest.approx(oracle.mean().item(), rel=1e-4, abs=1e-7)
    assert record["stderr"] == pytest.approx((oracle.std() / 6**0.5).item(), rel=1e-3, abs=1e-7)
    monkeypatch.setattr("clado.report.contents.measure", lambda *a, **k: pytest.fail("measured twice"))
    assert gather(again, model=model, heldout=data, verbose=False).measured == contents.measured


def test_a_run_directory_says_how_to_build_the_model(tmp_path: Path) -> None:
    """Plans are run on what the profiled data has left, and the next report takes as many images as the last."""
    run = tmp_path / "run"

    def clado_(*words: str) -> None:
        result = CliRunner().invoke(main, list(words))
        assert result.exit_code == 0, result.output

    model = [
        "--model",
        "digits",
        "--data",
        "digits:heldout",
        "--nsamples",
        "6",
        "--bits",
        "2,8",
        "--estimator",
        "diagonal",
    ]
    clado_("profile", *model, "--output-dir", str(run))
    clado_("report", str(run), "--nsamples", "5")
    first = json.loads((run / "measured.json").read_text())
    assert first["key"]["at_most"] == 5
    assert {plan["samples"] for plan in first["plans"]} == {5}
    clado_("report", str(run))
    assert json.loads((run / "measured.json").read_text()) == first
    page = (run / "report.html").read_text()
    assert "5 images of digits:heldout" in page
    assert "<h1>digits</h1>" in page


def test_bare_scores_have_a_report_too(imported: Path) -> None:
    page = (imported / "report.html").read_text()
    assert set(drawn(page)) == {"interactions", "frontier", "eigenvalues"}
    assert "<b>stem</b>" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "&lt;b&gt;stem" in page
    assert "No plan was run" in page
    assert "No standard errors are known" in page
    solve(Sensitivity.load(imported), avg_bits=4).save(imported)
    result = CliRunner().invoke(main, ["report", str(imported), "--nsamples", "0"])
    assert result.exit_code == 0, result.output
    assert set(drawn((imported / "report.html").read_text())) == {"bits", "interactions", "frontier", "eigenvalues"}


def test_single_figures(measured: Path, tmp_path: Path) -> None:
    model, shape = tiny_vit()
    heldout = [torch.randn(6, *shape)]
    paths = write_figures(measured, "svg", tmp_path / "svg", model=model, heldout=heldout, verbose=False)
    assert {path.stem for path in paths} == FIGURES
    for path in paths:
        text = path.read_text()
        assert text.startswith("<svg")
        assert "var(--" not in text  # a file of its own carries its colours
    assert (
        style.save_figure({"mark": "point", "data": {"values": [{}]}}, tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    )
    with pytest.raises(CladoError, match=r"format must be one of html, png, svg, pdf, got 'gif'"):
        write_figures(measured, "gif")


def test_bad_input_is_one_line(measured: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    other = shutil.copytree(measured, tmp_path / "other")
    plan = clado.Plan.load(other)
    replace(plan, fingerprint={**plan.fingerprint, "data": "0"}).save(other)
    with pytest.raises(CladoError, match=r"plan.json must belong to the matrix beside it"):
        write_report(other)
    (other / "plan.json").write_text("{}")
    with pytest.raises(CladoError, match="plan"):
        write_report(other)
    with pytest.raises(CladoError, match="model must be given with heldout"):
        write_report(measured, heldout=[torch.zeros(2, 1, 8, 8)])


def test_a_run_that_cannot_be_written_has_a_report_elsewhere(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a read-only mount: every file that would be made in the run is refused."""
    run = tmp_path / "run"
    run.mkdir()
    names = {"sensitivity.safetensors", "plan.json", *(path.name for path in measured.glob("rounded-*"))}
    for name in names:
        shutil.copy(measured / name, run / name)
    touch = Path.touch

    def refusing(self: Path, *arguments: object, **more: object) -> None:
        if self.is_relative_to(run):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        touch(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "touch", refusing)
    model, shape = tiny_vit()
    given = {"model": model, "heldout": [torch.randn(6, *shape)], "verbose": False}
    page = write_report(run, tmp_path / "report.html", **given).read_text()
    assert page.count(f"could not be kept in {run} (Read-only file system)") == 1
    assert set(drawn(page)) == FIGURES
    assert len(write_figures(run, "svg", tmp_path / "figures", **given)) == len(FIGURES)
    with pytest.raises(CladoError, match=r"report.html must be writable, got Read-only file system$"):
        write_report(run, **given)
    assert {path.name for path in run.iterdir()} == names


def test_relative_error_of_known_noise() -> None:
    """Entries drawn around known values: the error that the figure shows is the one that was put in."""
    random = np.random.default_rng(0)
    layers = [(f"l{k}", 10) for k in range(40)]
    size, outside = 80, ~np.kron(np.eye(40), np.ones((2, 2))).astype(bool)
    truth, noise = (np.triu(random.standard_normal((size, size)), 1) * outside for _ in range(2))
    matrix = truth + truth.T + 0.3 * (noise + noise.T) + np.diag(random.uniform(1, 2, size))
    stderr = np.full((size, size), 0.3)
    sens = Sensitivity.from_matrix(matrix, layers, (2, 4), stderr)
    errors = matrix_figures.relative_errors(sens)
    # 780 pairs of variance 1: their mean square is within 15 % of 1 (three standard errors), its root within 8 %.
    assert errors["pairs at 2 bits"] == pytest.approx(0.3, rel=0.08)
    # The largest eigenvalue of symmetric noise with deviation s is 2·s·√V for large V.
    assert matrix_figures.noise_edge(sens) == pytest.approx(2 * 0.3 * size**0.5, rel=0.15)


def test_dropped_candidates_are_left_out(tmp_path: Path) -> None:
    """NaN in a row of the matrix: no figure is spoiled, the plan's prediction is that of the entries it takes."""
    matrix = np.diag([4.0, 1.0, 0.5, 2.0, 0.5, 0.1])
    whole = Sensitivity.from_matrix(matrix, [("stem", 96), ("head", 32)], stderr=np.full((6, 6), 0.01))
    loss, pairs = whole.delta_loss.copy(), whole.interaction.copy()
    loss[0], pairs[0], pairs[:, 0] = np.nan, np.nan, np.nan
    sens = replace(
        whole,
        delta_loss=loss,
        interaction=pairs,
        num_samples=8,
        provenance=Provenance("logit", dropped=(("stem", "W2A16"),)),
    )
    assert sens.predict({"stem": 4, "head": 2}) == whole.predict({"stem": 4, "head": 2}) == 1.5
    assert np.isnan(sens.predict({"stem": 2, "head": 2}))
    sens.save(tmp_path)
    solve(sens, avg_bits=5).save(tmp_path)
    page = write_report(tmp_path, verbose=False).read_text()
    specs = drawn(page)
    assert set(specs) == {"bits", "interactions", "frontier", "eigenvalues", "sampling"}
    assert len(specs["eigenvalues"]["data"]["values"]) == 5
    assert "dropped" in page
    assert "NaN" not in json.dumps(specs)


def test_small_parts() -> None:
    assert style.decades([0.0, 0.02, 4.0]) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    assert style.decades([1e-6, 1.0]) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert style.decades([]) == []
    assert readable_bytes(1536) == "1.5 KiB"
    sens = Sensitivity.from_matrix(np.eye(6), [("a", 8), ("b", 8)])
    assert [plan.avg_bits for plan in uniform_plans(sens)] == [2, 4, 8]
    assert random_plans(sens, 5)[3].bits == random_plans(sens, 5)[3].bits
    records = [{"predicted": x, "increase": 2 * x} for x in (0.1, 0.2, 0.4)]
    assert agreement(records) == pytest.approx({"rank_correlation": 1, "ratio": 2, "ratio_low": 2, "ratio_high": 2})
    assert agreement(records[:2]) == {}
    assert set(style.PALETTES["light"]) == set(style.PALETTES["dark"])


def test_map_of_a_large_net_shows_the_heaviest_layers() -> None:
    sens = Sensitivity.from_matrix(np.diag(np.arange(1.0, 401)), [(f"l{k}", 1) for k in range(200)], (2, 4))
    spec = matrix_figures.interaction_figure(sens)
    names = {cell["a"] for cell in spec["data"]["values"]}
    assert names == {f"l{k}" for k in range(40, 200)}


LABELS = [f"W{bits}A{inputs}" for bits in range(2, 9) for inputs in (4, 8, 16)]


def ragged(lists: list[list[int | str]]) -> Sensitivity:
    """Random scores with standard errors of layers with these schemes."""
    random = np.random.default_rng(len(lists))
    owner = np.repeat(np.arange(len(lists)), [len(own) for own in lists])
    noise = 0.02 * random.standard_normal((len(owner), len(owner)))
    matrix = np.where(owner[:, None] == owner, 0.0, noise + noise.T) + np.diag(random.uniform(0.5, 2, len(owner)))
    layers = [Layer(f"layer{k}", "linear", (4 + k, 8), 1 + k) for k in range(len(lists))]
    stderr = np.full(matrix.shape, 0.01)
    return replace(Sensitivity.from_matrix(matrix, layers, stderr=stderr, schemes=lists), num_samples=8)


@pytest.mark.parametrize(
    ("lists", "names"),
    [
        ([[2, 4, 8], [4], [3, 4, 6, 8], [5, 8]], [f"{bits} bits" for bits in (2, 3, 4, 5, 6, 8)]),
        ([LABELS[: k + 1] for k in range(16)], LABELS[:16]),
        ([["W4A8", "W4A16", "W8A8"], ["W8A8"]], ["W4A8", "W4A16", "W8A8"]),
    ],
)
def test_layers_of_different_candidates(lists: list[list[int | str]], names: list[str], tmp_path: Path) -> None:
    """Every entry stands where its layers and schemes are, and nothing stands where a layer does not have a scheme."""
    ragged(lists).save(tmp_path)
    sens = Sensitivity.load(tmp_path)
    assert sens.candidates.counts == tuple(map(len, lists))
    plan = random_plans(sens)[12]
    page = render(Contents(tmp_path, sens, plan, front=[], measured=[]))
    specs, width = drawn(page), len(names)
    assert set(specs) == {"bits", "interactions", "eigenvalues", "sampling"}
    head = re.search(r"<th>weights</th>(.*?)<th>bytes</th></tr>", page)
    assert head is not None
    assert re.findall("<th>(.*?)</th>", head[1]) == names
    assert page.count('class="chosen"') == len(lists)
    assert f"{len(lists)} × {min(map(len, lists))} … {max(map(len, lists))}" in page

    cells = {(cell["a"], cell["b"]): cell for cell in specs["interactions"]["data"]["values"]}
    total = sum(cell["w"][cell["m"] * width + cell["n"]] for cell in cells.values())
    assert total == pytest.approx(sens.predict(plan.schemes), rel=1e-2)  # entries are kept to three digits
    for (earlier, later), cell in cells.items():
        for m, first in enumerate(sens.candidates.distinct):
            for n, second in enumerate(sens.candidates.distinct):
                shown = cell["w"][m * width + n]
                there = sens.candidates.has(earlier, first) and (earlier == later or sens.candidates.has(later, second))
                assert (shown is not None) == there
                if there:
                    v = sens.index(earlier, first)
                    true = sens.delta_loss[v] if earlier == later else sens.interaction[v, sens.index(later, second)]
                    assert shown == pytest.approx(true, rel=5e-3)
    blocks = specs["bits"]["data"]["values"]
    assert all(block["alone"] for block in blocks)
    assert [block.get("scheme") for block in blocks] == [
        None if "bits" in names[0] else plan.schemes[block["layer"]] for block in blocks
    ]


def test_plans_of_layers_of_different_candidates() -> None:
    """Uniform lists draw the plans that they always drew; others draw within each layer's own list."""
    sens = ragged([[2, 4, 8]] * 9)
    random = np.random.default_rng(3)
    for plan, share in zip(random_plans(sens, 7, seed=3), np.linspace(0.05, 0.7, 7), strict=True):
        assert list(plan.bits.values()) == np.array(sens.bits)[random.binomial(2, share, size=9)].tolist()
    sens = ragged([["W4A8", "W4A16", "W8A8"], ["W4A16", "W8A8"], ["W2A16", "W4A16", "W8A8", "W8A16"]])
    assert [set(plan.schemes.values()) for plan in uniform_plans(sens)] == [{"W4A16"}, {"W8A8"}]
    drawn_ = random_plans(sens, 16)
    assert {len({plan.schemes[layer.name] for plan in drawn_}) for layer in sens.layers} >= {2, 3}
    assert all(plan.objective == sens.predict(plan.schemes) for plan in drawn_)
    assert uniform_plans(ragged([[2, 4], [8]])) == []


def test_measured_plans_of_layers_of_different_candidates(measured: Path, tmp_path: Path) -> None:
    """Half of the candidates taken away: plans are run on the model, once; an earlier schema's records still count."""
    whole = Sensitivity.load(measured)
    keep = np.flatnonzero(np.arange(whole.num_candidates) % 5 != 0)
    lists = [
        tuple(whole.candidates.flat[v] for v in keep if whole.candidates.layer_of[v] == k)
        for k in range(len(whole.layers))
    ]
    sens = replace(
        whole,
        candidates=Candidates(whole.layers, tuple(lists)),
        delta_loss=whole.delta_loss[keep],
        interaction=whole.interaction[np.ix_(keep, keep)],
        stderr=whole.stderr[np.ix_(keep, keep)],
    )
    assert len(set(sens.candidates.counts)) > 1
    sens.save(tmp_path)
    model, shape = tiny_vit()
    heldout = [torch.randn(4, *shape)]
    first = gather(tmp_path, model=model, heldout=heldout, verbose=False).measured
    assert {record["kind"] for record in first} == {"random", "frontier"}  # no width is left in every layer
    for record in first:
        choice = dict(zip([layer.name for layer in sens.layers], record["schemes"], strict=True))
        assert record["predicted"] == sens.predict(choice)
    limits = [plan["usage"]["avg_bits"]["limit"] for plan in json.loads((tmp_path / "pareto.json").read_text())]
    for limit, pick in ((limits[0], 0), (limits[-1], -1)):  # every budget between the least and the most has a point
        ends = [own[pick].bits * layer.numel for own, layer in zip(sens.candidates.schemes, sens.layers, strict=True)]
        assert limit == pytest.approx(sum(ends) / sens.candidates.numel, abs=1e-3)
    kept = json.loads((tmp_path / "measured.json").read_text())
    for record in kept["plans"]:
        del record["schemes"]
    (tmp_path / "measured.json").write_text(json.dumps({**kept, "schema": 1}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clado.report.contents.measure", lambda *a, **k: pytest.fail("measured twice"))
        assert gather(tmp_path, model=model, heldout=heldout, verbose=False).measured == first


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_real_browser(measured: Path, imported: Path, tmp_path: Path, scheme: str) -> None:
    """No word on the console, every figure drawn, and the page says it is ready."""
    for run in (measured, imported):
        arguments = (
            f"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            f"--disable-component-update --disable-sync --user-data-dir={tmp_path / run.name} --enable-logging=stderr "
            f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0} --virtual-time-budget=30000 --dump-dom"
        )
        page = run / "report.html"
        shown = subprocess.run(
            [BROWSER, *arguments.split(), page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        assert "CONSOLE" not in shown.stderr, shown.stderr
        assert 'data-ready="true"' in shown.stdout
        count = len(drawn(page.read_text()))
        assert len(re.findall(r'<div data-figure="\w+"[^>]*><svg', shown.stdout)) == count


def test_what_is_proven_of_a_smallest_plan_is_said() -> None:
    sens = clado.Sensitivity.from_matrix(np.diag([2.0, 1.0, 0.2] * 2), [("a", 100), ("b", 50)], (2, 4, 8))
    plan = clado.solve(sens, max_loss_increase=0.6, minimize="avg_bits")
    said = "least avg_bits with a predicted loss increase of at most 0.6: "
    assert _proof(plan) == said + "proven"
    open_ = replace(plan, status="feasible", info={**plan.info, "minimized": {**plan.info["minimized"], "bound": 4.5}})
    assert _proof(open_) == said + "no plan below 4.5 is proven"
    assert _proof(clado.solve(sens, avg_bits=4)) == "proven optimal"
