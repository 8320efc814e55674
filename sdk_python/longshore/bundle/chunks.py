"""The chunks of a bundle's files: which there are, which an installed version has. Fetches nothing."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from longshore.bundle.check import read_manifest
from longshore.bundle.files import open_plain
from longshore.errors import BundleDamagedError, BundleError
from longshore.wire import BundleFile

_READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    first: int
    end: int
    sha256: str


Donors = dict[tuple[str, int], tuple[Path, str, int]]


def chunks_of(file: BundleFile) -> list[Chunk]:
    """The pieces that have a digest; the whole where the manifest names none."""
    if file.chunk_bytes is None:
        return [Chunk(0, file.size_bytes, file.sha256)] if file.size_bytes else []
    firsts = range(0, file.size_bytes, file.chunk_bytes)
    return [
        Chunk(first, min(first + file.chunk_bytes, file.size_bytes), digest)
        for first, digest in zip(firsts, file.chunk_sha256, strict=True)
    ]


def first_run(missing: list[Chunk]) -> list[Chunk]:
    """The chunks that follow one another without a gap, from the first one missing."""
    run: list[Chunk] = []
    for chunk in missing:
        if run and chunk.first != run[-1].end:
            break
        run.append(chunk)
    return run


def find_donors(home: Path) -> Donors:
    """Where each chunk and each whole file of the installed versions lies: (folder, path, offset)."""
    donors: Donors = {}
    for folder in (path for path in home.iterdir() if path.name.isdecimal()):
        with contextlib.suppress(BundleError):
            for file in read_manifest(folder).files:
                donors[file.sha256, file.size_bytes] = (folder, file.path, 0)
                for chunk in chunks_of(file):
                    donors[chunk.sha256, chunk.end - chunk.first] = (folder, file.path, chunk.first)
    return donors


def take(donors: Donors, chunk: Chunk, target: BinaryIO) -> bool:
    """True if the chunk could be copied from an installed version, its bytes checked on the way."""
    donor = donors.get((chunk.sha256, chunk.end - chunk.first))
    if donor is None:
        return False
    folder, path, offset = donor
    try:
        with open_plain(folder, path) as source:
            target.seek(chunk.first)
            return digest_of(source, offset, chunk.end - chunk.first, target) == chunk.sha256
    except BundleDamagedError:
        return False


def digest_of(source: BinaryIO, offset: int, num_bytes: int, target: BinaryIO | None = None) -> str:
    """SHA-256 of a part of a file, which is copied to where `target` stands."""
    digest = hashlib.sha256()
    source.seek(offset)
    while num_bytes and (piece := source.read(min(num_bytes, _READ_BYTES))):
        digest.update(piece)
        num_bytes -= len(piece)
        if target is not None:
            target.write(piece)
    return digest.hexdigest()
