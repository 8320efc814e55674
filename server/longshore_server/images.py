"""A request's pictures, decoded and scaled in threads: bounded in number and time, so that no loop waits.

Which size a picture is read at is image_sizes' choice. It loads neither weights nor torch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from longshore.errors import InvalidRequestError, QueueFullError, UnavailableError
from longshore.images import image_bytes, image_size, rgb_pixels
from longshore.wire import AnyRequest, ChatRequest, ImageUrl, ImageUse
from longshore_server.engines.base import JobImage
from longshore_server.image_sizes import ImageSizes, Picture

TIMEOUT_S = 10.0
MAX_WAITING = 64
_NUM_THREADS = 2
_RETRY_AFTER_S = 1.0

Choose = Callable[[Sequence[Picture]], tuple[ImageUse, ...]]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class ReadImages:
    """A request's pictures in the order of its messages: the size that each was read at, and its pixels."""

    uses: tuple[ImageUse, ...] = ()
    images: tuple[JobImage, ...] = ()


class ImageReader:
    """Reads the pictures of requests for one model; `close` it in the end."""

    def __init__(
        self, sizes: ImageSizes, *, timeout_s: float = TIMEOUT_S, max_waiting: int = MAX_WAITING
    ) -> None:
        self.sizes = sizes
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._places = threading.BoundedSemaphore(max_waiting)
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="picture")

    @classmethod
    def load(cls, folder: Path) -> ImageReader | None:
        """For the model of a Hugging Face folder; None where it takes no pictures. Raises ConfigError."""
        sizes = ImageSizes.load(folder)
        return None if sizes is None else cls(sizes)

    def close(self) -> None:
        """Let go of the threads; a picture that is being decoded has a bounded number of pixels."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: AnyRequest, *, max_tokens: int, max_pixels: int) -> ReadImages:
        """The request's pictures in sizes chosen for these bounds; see ImageSizes.choose.

        Raises InvalidImageError naming the picture, OutOfRangeError, QueueFullError or UnavailableError.
        """
        urls = list(image_urls(request))
        if not urls:
            return ReadImages()
        if not self._places.acquire(blocking=False):
            raise QueueFullError(
                f"the pictures of {self._max_waiting} requests are waiting already",
                retry_after_s=_RETRY_AFTER_S,
            )
        choose = partial(self.sizes.choose, max_tokens=max_tokens, max_pixels=max_pixels)
        work = self._executor.submit(_read, urls, choose)
        work.add_done_callback(lambda _: self._places.release())  # when the thread is done, not the waiting
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(work)
        except TimeoutError:
            raise UnavailableError(
                f"the pictures were not read within {self._timeout_s:g} s", retry_after_s=_RETRY_AFTER_S
            ) from None


def image_urls(request: AnyRequest) -> Iterator[tuple[str, ImageUrl]]:
    """Each picture of the request and the path of it, in order."""
    if not isinstance(request, ChatRequest):
        return
    for number, message in enumerate(request.messages):
        if isinstance(message.content, str):
            continue
        for index, part in enumerate(message.content):
            if part.image_url is not None:
                yield f"messages[{number}].content[{index}].image_url", part.image_url


def without_pictures(request: AnyRequest) -> AnyRequest:
    """The request with its text alone."""
    if not isinstance(request, ChatRequest) or not any(message.images for message in request.messages):
        return request
    messages = tuple(replace(message, content=message.text) for message in request.messages)
    return replace(request, messages=messages)


def _read(urls: list[tuple[str, ImageUrl]], choose: Choose) -> ReadImages:
    files = [(param, _named(param, _open, url)) for param, url in urls]
    uses = choose([picture for _, (_, picture) in files])
    scaled = (
        _named(param, _scaled, (data, use)) for (param, (data, _)), use in zip(files, uses, strict=True)
    )
    return ReadImages(uses, tuple(scaled))


def _open(image: ImageUrl) -> tuple[bytes, Picture]:
    data = image_bytes(image.url)
    return data, Picture(*image_size(data), image.detail == "low")


def _scaled(picture: tuple[bytes, ImageUse]) -> JobImage:
    data, use = picture
    return JobImage(use.height_px, use.width_px, rgb_pixels(data, use.width_px, use.height_px))


def _named(param: str, work: Callable[[T], U], value: T) -> U:
    """What `work` makes of the value; an error of the picture's names where it stands."""
    try:
        return work(value)
    except InvalidRequestError as error:
        raise type(error)(f"{param}: {error.message}", param=param) from None
