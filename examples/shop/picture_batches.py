"""Photos to learn from: drawn by worker processes as training goes on, resized and batched on the device.

Workers draw each photo at the largest size with chats about it and never import torch. A pool on the device
holds the latest photos; a batch takes some of them at one size. Sizes below the largest are made from it by
Pillow's own coefficients, as two matrix products.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from shop.picture_questions import PICTURE_KINDS, ask, chat_text
from shop.pictures import draw_with_digits, make_photo
from shop.sheet import split_rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHATS_PER_PHOTO = 4
QUESTIONS_PER_CHAT = 3
ROW_TOKENS = 64
MAX_DIGITS = 2
EASY_SHARE = 0.1
TEXT_FIRST_SHARE = 0.15
POOL_DEADLINE_S = 300.0
SHARDS_AHEAD = 2  # per worker: what waits to be taken is bounded
ARRAYS = ("pixels", "tokens", "digits")


@dataclass(frozen=True, slots=True)
class Shard:
    """Some photos: pixels [n, side, side, 3] uint8; token ids [n, chats, tokens] int16, padded with 0, each
    row with one image token; digits [n, 2, 5] float32: class (-1 for none), x, y, width, height."""

    pixels: np.ndarray
    tokens: np.ndarray
    digits: np.ndarray


def draw_shard(
    number: int, num_photos: int, side_px: int, tokenizer_file: Path, num_easy: int, seed: int
) -> Shard:
    """Shard `number`, the same for the same arguments; the first `num_easy` shards have easy photos alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rng = split_rng("train", seed * 1_000_003 + number)
    shard = Shard(
        np.empty((num_photos, side_px, side_px, 3), np.uint8),
        np.zeros((num_photos, CHATS_PER_PHOTO, ROW_TOKENS), np.int16),
        np.full((num_photos, MAX_DIGITS, 5), -1, np.float32),
    )
    for row in range(num_photos):
        photo = make_photo(rng, "train", number < num_easy or rng.random() < EASY_SHARE)
        image, digits = draw_with_digits(photo)
        shard.pixels[row] = np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC))
        for index, digit in enumerate(digits):
            kind = 10 * digit.place + digit.value
            shard.digits[row, index] = (kind, digit.x, digit.y, digit.width, digit.height)
        for chat in range(CHATS_PER_PHOTO):
            kinds = rng.sample(PICTURE_KINDS, QUESTIONS_PER_CHAT)
            text = chat_text([ask(rng, photo, kind) for kind in kinds], rng.random() < TEXT_FIRST_SHARE)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            shard.tokens[row, chat, : len(ids)] = ids
    return shard


def _write_shard(number: int, folder: Path, make: Callable[[int], Shard]) -> Path:
    shard = make(number)
    for name in ARRAYS:
        np.save(folder / f"{number}.{name}.npy", getattr(shard, name))
    return folder / str(number)


def _taken(stem: Path) -> Shard:
    """A shard out of its files, which are gone then; the memory goes with the arrays."""
    paths = [stem.with_name(f"{stem.name}.{name}.npy") for name in ARRAYS]
    shard = Shard(*(np.load(path, mmap_mode="c") for path in paths))
    for path in paths:
        path.unlink()
    return shard


def shards(make: Callable[[int], Shard], num_processes: int, stopped: threading.Event) -> Iterator[Shard]:
    """Shards in order, drawn ahead by `num_processes` processes until `stopped`.

    They travel through files in memory: a pipe would copy every byte under the interpreter's lock.
    """
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=memory, prefix="photos-") as folder,
        ProcessPoolExecutor(num_processes, get_context("spawn")) as pool,
    ):
        numbers, waiting = count(), deque[Future[Path]]()
        while not stopped.is_set():
            while len(waiting) < num_processes * SHARDS_AHEAD:
                waiting.append(pool.submit(_write_shard, next(numbers), Path(folder), make))
            yield _taken(waiting.popleft().result(POOL_DEADLINE_S))
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """pixels [rows, 3, side, side] float16 in -1..1; tokens [rows, tokens]; digits as in a shard."""

    pixels: Tensor
    tokens: Tensor
    digits: Tensor


class PhotoPool:
    """The latest `capacity` photos on the device, filled by a thread that waits for the workers."""

    def __init__(
        self, capacity: int, shard_photos: int, side_px: int, tokenizer_file: Path, *, num_processes: int,
        num_easy: int, num_shards: int, seed: int, device: str,
    ):  # fmt: skip
        import torch

        if capacity % shard_photos:
            raise ValueError(f"a pool of {capacity} is not whole shards of {shard_photos}")
        self.side_px, self.device = side_px, device
        self.num_drawn = 0
        self._capacity, self._num_shards, self._processes = capacity, num_shards, num_processes
        shapes = {
            "pixels": ((side_px, side_px, 3), torch.uint8),
            "tokens": ((CHATS_PER_PHOTO, ROW_TOKENS), torch.int16),
            "digits": ((MAX_DIGITS, 5), torch.float32),
        }
        self._stored = {
            name: torch.zeros((capacity, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }
        self._resizers: dict[int, Tensor] = {}
        self._make = partial(
            draw_shard, num_photos=shard_photos, side_px=side_px, tokenizer_file=tokenizer_file,
            num_easy=num_easy, seed=seed,
        )  # fmt: skip
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        import torch

        # On a stream of its own, so that copies run beside training. A photo that is replaced while a batch
        # reads it is wrong once, in one batch of thousands.
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                for index, shard in enumerate(shards(self._make, self._processes, self._stopped)):
                    self._store(shard)
                    if stream:
                        stream.synchronize()
                    self.num_drawn += len(shard.pixels)
                    if index + 1 >= self._num_shards:
                        self._stopped.set()
        except Exception as error:  # told to whoever waits for photos
            self._error = error

    def _store(self, shard: Shard) -> None:
        import torch

        start = self.num_drawn % self._capacity
        for name, stored in self._stored.items():
            values = torch.from_numpy(getattr(shard, name))
            stored[start : start + len(values)].copy_(values)

    def wait_for(self, num_photos: int) -> None:
        """Until so many were drawn; TimeoutError after POOL_DEADLINE_S."""
        give_up_at = time.monotonic() + POOL_DEADLINE_S
        while self.num_drawn < num_photos:
            if self._error is not None:
                raise RuntimeError("the workers failed") from self._error
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"{self.num_drawn} of {num_photos} photos after {POOL_DEADLINE_S:.0f} s")
            time.sleep(0.05)

    def batch(self, rows: int, size_px: int, generator: torch.Generator) -> PictureBatch:
        """Photos drawn at random from the pool at `size_px`, each with one of its chats."""
        import torch

        known = min(self.num_drawn, self._capacity)
        chosen = torch.randint(known, (rows,), generator=generator, device=self.device)
        chat = torch.randint(CHATS_PER_PHOTO, (rows,), generator=generator, device=self.device)
        pixels = self._resized(self._stored["pixels"][chosen], size_px)
        return PictureBatch(
            pixels, self._stored["tokens"][chosen, chat].long(), self._stored["digits"][chosen]
        )

    def _resized(self, pixels: Tensor, size_px: int) -> Tensor:
        """uint8 [rows, side, side, 3] to values in -1..1 [rows, 3, size, size]."""
        import torch

        half = torch.float16 if self.device == "cuda" else torch.float32
        planes = pixels.permute(0, 3, 1, 2).to(half)
        if size_px != self.side_px:
            if size_px not in self._resizers:
                self._resizers[size_px] = torch.from_numpy(resizer(self.side_px, size_px)).to(
                    self.device, half
                )
            matrix = self._resizers[size_px]
            planes = ((planes @ matrix.T).transpose(2, 3) @ matrix.T).transpose(2, 3)
            planes = planes.round().clamp(0, 255)
        return planes / 127.5 - 1

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(POOL_DEADLINE_S)


def resizer(side_px: int, size_px: int) -> np.ndarray:
    """[size, side] float32: what Pillow's BICUBIC makes of one axis, read off a unit matrix."""
    unit = Image.fromarray(np.eye(side_px, dtype=np.float32))
    return np.array(unit.resize((side_px, size_px), Image.Resampling.BICUBIC))
