"""``python -m bench.study.photographs OUT``: sets of images from Debian's photographs, disjoint by source picture.

Wallpapers are cropped at random; Tux Paint's photo stamps (cut-out animals, fruit, tools, vehicles) are pasted on crops of
wallpapers of the same set: three sets. A fourth, "lesson", holds GCompris' photographs (animals, monuments, tools, instruments),
the middle of each, once: to finish a plan with. Needs `apt-get` and `dpkg-deb` (the names are Debian 12's) but installs nothing:
the packages are unpacked into a temporary folder. The same packages give the same pixels. There are no labels: a loss against
the float net's own output needs none.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clado.common import atomic_file

from .qt_resources import read_resources

SIDE = 224
# split: (share of the pictures, images)
SPLITS = {"sensitivity": (0.40, 640), "choice": (0.15, 320), "heldout": (0.45, 1000)}
PLAIN = 5  # one image in so many is a wallpaper alone
KEPT_SIDE = 1024  # wallpapers are kept at this short side: crops of 224 need no more
FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".avif")
# No rule tells a photograph from a rendered picture: these were picked by eye. The packages of GNOME's and UKUI's wallpapers
# hold rendered and drawn ones only.
WALLPAPERS = {
    "lomiri-wallpapers-16.04": (
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace Wine_by_Jakkub_Mede "
        "aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich "
        "life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi"
    ),
    "lomiri-wallpapers-20.04": "Kleiber_by_Lukas_Baubkus",
    "mate-backgrounds": (
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
    ),
    "plasma-workspace-wallpapers": (
        "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
    ),
}
STAMPS = "tuxpaint-stamps-default"
GCOMPRIS = "gcompris-qt-data"
LESSON = "lesson"  # the set of its photographs
ACTIVITIES = (  # whose pictures are photographs
    "categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals", "explore_world_music",
)  # fmt: skip
DRAWN = {"cartoon", "easter", "symbols", "roadsigns", "alphabets", "numbers"}  # folders without photographs


class Source(NamedTuple):
    """A picture, and the files that show it."""

    name: str
    files: tuple[Path, ...]
    stamp: bool


@dataclass(frozen=True)
class Photographs:
    """Images ``[N, 3, 224, 224]`` (uint8); per image the index ``[N]`` of its subject and of its background in ``names``.

    The subject is what images share that show one thing: standard errors are clustered by it.
    """

    images: Tensor
    picture: Tensor
    background: Tensor
    names: list[str]


def unpack(packages: Iterable[str], folder: Path) -> None:
    """The packages' files, each package in a folder of its name."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit("the photographs come from Debian's packages: apt-get and dpkg-deb are needed")
    for package in packages:
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", archive, folder / package], check=True)
        archive.unlink()


def find_wallpapers(folder: Path) -> list[Source]:
    """The photographs among the wallpapers, each in its largest file."""
    found = []
    for package, names in WALLPAPERS.items():
        files = [path for path in sorted((folder / package).rglob("*")) if path.suffix.lower() in FORMATS]
        for name in names.split():
            shown = [path for path in files if name == path.stem or f"/{name}/contents/images/" in path.as_posix()]
            if not shown:
                raise FileNotFoundError(f"{package} has no picture {name!r}: another release than Debian 12's?")
            found.append(Source(name, (max(shown, key=lambda path: path.stat().st_size),), stamp=False))
    return found


def find_stamps(folder: Path) -> list[Source]:
    """The photographs among the stamps; what differs by a number only (``lion``, ``lion-2``) is one source."""
    sources: dict[str, list[Path]] = {}
    for path in sorted((folder / STAMPS).rglob("*.png")):
        drawn = DRAWN.intersection(path.relative_to(folder).parts)
        if not drawn and not path.stem.endswith("_mirror") and photographic(path):
            sources.setdefault(re.sub(r"[-_]?\d+[a-z]?$", "", path.stem), []).append(path)
    return [Source(name, tuple(files), stamp=True) for name, files in sorted(sources.items())]


def lesson(folder: Path) -> Photographs:
    """GCompris' photographs, the middle square of each, what is cut out on white."""
    found = []
    for activity in ACTIVITIES:
        (path,) = (folder / GCOMPRIS).rglob(f"{activity}.rcc")
        held = [(name, content) for name, content in read_resources(path) if name.endswith(".webp")]
        found += sorted((n, content) for n, content in held if not DRAWN.intersection(n.split("/")))
    images = torch.stack([torch.from_numpy(np.array(middle(content))).permute(2, 0, 1) for _, content in found])
    order = torch.arange(len(images))
    return Photographs(images, order, order.clone(), [Path(name).stem for name, _ in found])


def middle(content: bytes) -> Image.Image:
    """The middle square of a picture, in the size of all."""
    with Image.open(io.BytesIO(content)) as file:
        picture = file.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ImageOps.fit(ground.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)


def photographic(path: Path) -> bool:
    """Large enough, and in many colours: of a drawing's pixels, most share their colour with others."""
    with Image.open(path) as image:
        if max(image.size) < 64:
            return False
        pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] > 250][:, :3].astype(np.int64)
    colours = len(np.unique(opaque @ [1 << 16, 1 << 8, 1]))
    return colours >= max(1500, len(opaque) / 4)


def divide(sources: Sequence[Source], seed: int) -> dict[str, list[int]]:
    """Per split the indices of its sources, wallpapers and stamps each in the splits' shares."""
    random = np.random.default_rng(seed)
    ends = np.cumsum([share for share, _ in SPLITS.values()])
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for stamp in (False, True):
        order = random.permutation([k for k, source in enumerate(sources) if source.stamp == stamp])
        cuts = np.rint(ends[:-1] * len(order)).astype(int)
        for split, part in zip(SPLITS, np.split(order, cuts), strict=True):
            parts[split] += part.tolist()
    return parts


def compose(sources: Sequence[Source], part: Sequence[int], count: int, random: np.random.Generator) -> Photographs:
    """``count`` images of the part's sources; every source is shown as often as the next, give or take one."""
    wallpapers = {k: open_wallpaper(sources[k].files[0]) for k in part if not sources[k].stamp}
    stamps = [k for k in part if sources[k].stamp]
    alone, behind, subjects = (turns(list(keys), random) for keys in (wallpapers, wallpapers, stamps))
    images, picture, background = [], [], []
    for k in range(count):
        plain = k % PLAIN == 0
        ground = next(alone if plain else behind)
        image = crop(wallpapers[ground], random)
        picture.append(ground if plain else next(subjects))
        if not plain:
            paste(image, sources[picture[-1]], random)
        background.append(ground)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    names = [source.name for source in sources]
    return Photographs(torch.stack(images), torch.tensor(picture), torch.tensor(background), names)


def turns(items: Sequence[int], random: np.random.Generator) -> Iterator[int]:
    """All items in random order, then all of them in another, without end."""
    while True:
        yield from random.permutation(items).tolist()


def open_wallpaper(path: Path) -> Image.Image:
    """In RGB, its short side no longer than ``KEPT_SIDE``."""
    with Image.open(path) as image:
        scale = min(1, KEPT_SIDE / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A square of 35 to 100 % of the short side, resized; every other one mirrored."""
    side = min(image.size) * random.uniform(0.35, 1)
    left, top = random.uniform(0, image.width - side), random.uniform(0, image.height - side)
    box = (left, top, left + side, top + side)
    return mirrored(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box), random)


def paste(image: Image.Image, source: Source, random: np.random.Generator) -> None:
    """Put the stamp on the image: 65 to 100 % of its side, but no small stamp is blown up more than 2.5 times."""
    with Image.open(source.files[random.integers(len(source.files))]) as file:
        stamp = file.convert("RGBA")
    scale = min(2.5, random.uniform(0.65, 1) * SIDE / max(stamp.size))
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = mirrored(stamp.resize(size, Image.Resampling.BICUBIC), random)
    place = (int(random.integers(SIDE - size[0] + 1)), int(random.integers(SIDE - size[1] + 1)))
    image.paste(stamp, place, stamp)


def mirrored(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """The image or, as often, its mirror image."""
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def write(packages: Path, folder: Path, seed: int = 0) -> None:
    """The sets as ``<split>.safetensors`` in ``folder``, from unpacked packages."""
    sources = find_wallpapers(packages) + find_stamps(packages)
    for number, (split, part) in enumerate(divide(sources, seed).items()):
        found = compose(sources, part, SPLITS[split][1], np.random.default_rng([seed, number]))
        keep(found, folder, split)
        stamps = sum(sources[k].stamp for k in part)
        print(f"{split}: {len(part) - stamps} wallpapers, {stamps} stamps, {len(found.images)} images", flush=True)
    found = lesson(packages)
    keep(found, folder, LESSON)
    print(f"{LESSON}: {len(found.images)} photographs", flush=True)


def keep(found: Photographs, folder: Path, split: str) -> None:
    """A set, as :func:`read_photographs` reads it."""
    from safetensors.torch import save_file

    tensors = {"images": found.images, "picture": found.picture, "background": found.background}
    with atomic_file(folder / f"{split}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"names": json.dumps(found.names)})


def read_photographs(folder: Path | str, split: str) -> Photographs:
    """A set as it was written."""
    from safetensors import safe_open

    with safe_open(Path(folder) / f"{split}.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
        return Photographs(*(file.get_tensor(key) for key in ("images", "picture", "background")), names)


def load_photographs(folder: Path | str, split: str, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The set's images ``[N, 3, 224, 224]`` as float32, normalised for a net."""
    images = read_photographs(folder, split).images.float().div_(255)
    return images.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the sets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as packages:
        unpack([*WALLPAPERS, STAMPS, GCOMPRIS], Path(packages))
        write(Path(packages), options.out, options.seed)


if __name__ == "__main__":
    main()
