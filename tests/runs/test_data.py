"""Images by the spellings of --data, small and local."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clado
from clado.profiling import SampleStream
from clado.runs import ModelSpec, build_data

COUNT, SPEC = 6, ModelSpec("none", img_size=16)


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(COUNT)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images, in one split."""
    for k, picture in enumerate(pictures()):
        place = tmp_path / "validation" / f"class{k // 3}"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{k}.png")
    return tmp_path


def samples(data: str, skip: int = 0) -> tuple[torch.Tensor, list[int]]:
    batches = list(build_data(data, nn.Identity(), SPEC, 4, 0, skip))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]).tolist()


def test_every_spelling_of_a_folder_gives_the_same_images_in_the_same_order(folder: Path) -> None:
    plain, labels = samples(str(folder / "validation"))
    assert plain.shape == (COUNT, 3, 16, 16)
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    for spelled in (f"timm:folder?root={folder}", f"timm:torch/image_folder?root={folder}&split=validation"):
        images, classes = samples(spelled)
        assert torch.equal(images, plain)
        assert classes == labels
    assert torch.equal(samples(str(folder / "validation"), skip=2)[0], plain[2:])


class Rows:
    """As much of a Hugging Face dataset as is used."""

    column_names = ("picture", "class")

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {"picture": pictures()[k].convert("RGBA"), "class": k // 3}


def test_hugging_face_by_name_and_by_folder(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    asked: list[Any] = []

    def by_name(name: str, split: str, **options: str) -> Rows:
        if name == "owner/gone":
            raise FileNotFoundError("no such dataset\nlong story")
        asked.append((name, split, options))
        return Rows()

    package = SimpleNamespace(load_dataset=by_name, load_from_disk=lambda name: {"test": Rows()})
    monkeypatch.setitem(sys.modules, "datasets", package)  # type: ignore[arg-type]
    plain = samples(str(folder / "validation"))
    for name in ("owner/digits", str(tmp_path)):
        images, labels = samples(f"hf:{name}?split=test&image=picture&label=class&revision=main")
        assert torch.equal(images, plain[0])
        assert labels == plain[1]
    assert asked == [("owner/digits", "test", {"revision": "main"})]
    with pytest.raises(clado.CladoError, match=r"have the columns image and label .* got picture, class"):
        samples("hf:owner/digits")
    with pytest.raises(clado.CladoError, match=r"able to open owner/gone, got FileNotFoundError: no such dataset$"):
        samples("hf:owner/gone")
    broken = type("Broken", (Rows,), {"__getitem__": lambda self, k: {"picture": None, "class": 0}})
    monkeypatch.setattr(package, "load_dataset", lambda name, split: broken())
    with pytest.raises(clado.CladoError, match=r"image must be whole and readable, got row \d \(AttributeError: "):
        samples("hf:owner/digits?image=picture&label=class")
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(clado.CladoError, match="datasets must be installed"):
        samples("hf:owner/digits")


def test_hugging_face_itself(tmp_path: Path, folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": pictures(), "label": [k // 3 for k in range(COUNT)]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    assert torch.equal(samples(f"hf:{tmp_path / 'saved'}")[0], samples(str(folder / "validation"))[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "folder must be an image folder with one subfolder per class, got nowhere"),
        ("timm:torch/nothing?root=x", "timm must be able to open torch/nothing, got "),
        ("timm:folder?root={empty}", "timm must be able to open folder, got |hold images"),
        ("{empty}", "folder must hold images in subfolders"),
        ("no.such.module:f", "that can be imported, got no.such.module:f"),
    ],
)
def test_data_that_is_not_there_is_one_line(data: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(clado.CladoError, match=message) as caught:
        samples(data.format(empty=tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_not_replaced_by_another(folder: Path) -> None:
    (folder / "validation" / "class0" / "0.png").write_bytes(b"not a picture")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    loader = build_data(str(folder / "validation"), net, SPEC, 4, 0)
    with pytest.raises(
        clado.CladoError, match=r"image must be whole and readable, got .*0\.png \(UnidentifiedImageError: "
    ):
        clado.profile(net, loader, num_samples=COUNT, quantize_ends=True, verbose=False)


FOLDER, TIMM, TORCH = "{0}/validation", "timm:folder?root={0}", "timm:torch/image_folder?root={0}"


@pytest.mark.parametrize(
    ("spelled", "kind", "workers"),
    [
        *((spelled, "png", workers) for spelled in (FOLDER, TIMM, TORCH) for workers in (0, 2)),
        *((spelled, kind, 0) for spelled in (FOLDER, TIMM, TORCH) for kind in ("jpg", "webp")),
        (FOLDER, "gif", 0),
        (TIMM, "gif", 0),  # torchvision reads none
    ],
)
def test_a_truncated_file_is_named_in_one_line(folder: Path, spelled: str, kind: str, workers: int) -> None:
    file = folder / "validation" / "class1" / f"9.{kind}"
    pictures()[0].resize((64, 64)).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    loader = build_data(spelled.format(folder), nn.Identity(), SPEC, 2, 0, workers=workers)
    with pytest.raises(
        clado.CladoError, match=rf"data: image must be whole and readable, got .*9\.{kind} \("
    ) as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    """The same picture of 16 and of 8 bits; the ends are black and white."""
    values = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)  # every value of 8 bits
    wide, narrow = Image.fromarray(values), Image.fromarray((values // 257).astype(np.uint8))
    found = []
    for name, picture in (("wide", wide), ("narrow", narrow)):
        (tmp_path / name / "a").mkdir(parents=True)
        picture.save(tmp_path / name / "a" / "0.png")
        found.append(samples(str(tmp_path / name))[0])
    assert torch.equal(*found)
    assert found[0].std() > 0.1


@pytest.mark.parametrize("kind", ["gif", "webp", "bmp", "tif"])
def test_other_kinds_of_files_are_read(kind: str, tmp_path: Path) -> None:
    picture = pictures()[0].convert("P" if kind == "gif" else "RGB")
    for k, ending in enumerate(("png", kind)):
        (tmp_path / str(k) / "a").mkdir(parents=True)
        picture.save(tmp_path / str(k) / "a" / f"0.{ending}", **({"lossless": True} if ending == "webp" else {}))
    (tmp_path / "1" / "a" / "notes.txt").write_text("no picture")
    images, labels = samples(str(tmp_path / "1"))
    assert torch.equal(images, samples(str(tmp_path / "0"))[0])
    assert labels == [0]
    assert torch.equal(samples(f"timm:folder?root={tmp_path / '1'}")[0], images)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("{0}", "x.heic"),
        ("{0}", "x.svg"),
        ("timm:folder?root={0}", "x.JXL"),
        ("timm:torch/image_folder?root={0}", "x.gif"),
    ],
)
def test_pictures_that_are_not_read_are_named(spelled: str, name: str, folder: Path) -> None:
    (folder / "validation" / "class0" / name).write_bytes(b"whatever")
    with pytest.raises(clado.CladoError, match=rf"read \(png, .* and no others, got 1 others, such as .*{name}$"):
        samples(spelled.format(folder / "validation"))


def test_values_of_unknown_depth_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a" / "0.tif")
    with pytest.raises(clado.CladoError, match=r"have 8 or 16 bits a channel, got mode F of .*0\.tif"):
        samples(str(tmp_path))


def test_images_beside_the_subfolders_take_the_labels_away(folder: Path) -> None:
    pictures()[0].save(folder / "validation" / "6.png")
    batches = list(build_data(str(folder / "validation"), nn.Identity(), SPEC, 4, 0))
    assert [[len(part) for part in batch] for batch in batches] == [[4], [3]]


def test_a_loader_that_ends_early_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    batches = (torch.randn(n, 4) for n in (3, 1, 2))  # a generator: read once, batches of any size
    sens = clado.profile(net, batches, num_samples=64, batch_size=2, quantize_ends=True, verbose=False)
    assert sens.num_samples == 6
    assert "the data ended after 6 of 64 samples" in sens.info["warnings"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_knows_how_many_images_a_folder_has(folder: Path, workers: int) -> None:
    """What cannot be asked for its length would be read by every rank, and counted as endless."""
    loader = build_data(str(folder / "validation"), nn.Identity(), SPEC, 2, 0, workers=workers)
    stream = SampleStream(loader, 10**6, 0)
    assert stream.expected == len(loader.dataset) > 0  # type: ignore[attr-defined]
