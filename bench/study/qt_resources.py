"""Files in a binary resource of Qt (``.rcc``): a header, a tree of nodes, the names and the data of files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

COMPRESSED, FOLDER = 1, 2  # of a node's flags
NODE = {1: 14, 2: 22, 3: 22}  # bytes of a node, by the format's version: later ones keep a time as well


def read_resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every file's path in the resource and its content, in the order of the tree.

    Raises:
        ValueError: a file that is no such resource.
    """
    held = path.read_bytes()
    version, tree, contents, names = (
        struct.unpack_from(">4I", held, 4) if held[:4] == b"qres" and len(held) >= 20 else [0] * 4
    )
    if version not in NODE:
        raise ValueError(f"{path}: must be a binary resource of Qt, version 1 to 3")

    def name(at: int) -> str:
        (length,) = struct.unpack_from(">H", held, names + at)
        start = names + at + 6  # behind the length and a hash
        return held[start : start + 2 * length].decode("utf-16-be")

    def content(at: int, flags: int) -> bytes:
        (length,) = struct.unpack_from(">I", held, contents + at)
        start = contents + at + 4
        found = held[start : start + length]
        return zlib.decompress(found[4:]) if flags & COMPRESSED else found  # behind its length

    def walk(node: int, above: str) -> Iterator[tuple[str, bytes]]:
        at = tree + NODE[version] * node
        named, flags, count, first = struct.unpack_from(">IHII", held, at)
        own = f"{above}/{name(named)}" if node else ""
        if not flags & FOLDER:
            (start,) = struct.unpack_from(">I", held, at + 10)
            yield own, content(start, flags)
            return
        for child in range(first, first + count):
            yield from walk(child, own)

    yield from walk(0, "")
