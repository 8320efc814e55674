"""The exact answer cache: a bytes-bounded LRU in memory over SQLite, keyed by tenant and model digest.

Owns keys, storage and single-flight; never sees a socket. Stores only whole answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import queue
import sqlite3
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longshore.errors import ConfigError
from longshore.wire import AnyRequest, ChatRequest, ContentPart, Extension, dump_json, encode

_MAX_QUEUED_WRITES = 256
_BUSY_TIMEOUT_S = 2.0
_ENTRY_OVERHEAD_BYTES = 200
_TOUCH_AFTER_S = 60.0
_EVICT_TO = 0.9
_MAX_MODELS = 10_000

_T = TypeVar("_T")

# The total is kept by triggers, so that a write never reads the whole table.
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, body BLOB NOT NULL, size_bytes INTEGER NOT NULL,
    stored_s REAL NOT NULL, used_s REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_by_use ON answers (used_s, key, size_bytes);
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), size_bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0);
CREATE TRIGGER IF NOT EXISTS answer_stored AFTER INSERT ON answers
    BEGIN UPDATE total SET size_bytes = size_bytes + new.size_bytes; END;
CREATE TRIGGER IF NOT EXISTS answer_gone AFTER DELETE ON answers
    BEGIN UPDATE total SET size_bytes = size_bytes - old.size_bytes; END;
CREATE TABLE IF NOT EXISTS models (name TEXT PRIMARY KEY, digest TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer; `stored_s` is Unix time, since entries outlive the process."""

    body: bytes
    stored_s: float

    @property
    def size_bytes(self) -> int:
        """What it counts against the bound."""
        return len(self.body) + _ENTRY_OVERHEAD_BYTES


def is_deterministic(request: AnyRequest) -> bool:
    """True if the same request has the same answer: greedy, or with a seed."""
    return request.temperature == 0.0 or request.seed is not None


def answer_key(tenant: str, model_digest: str, request: AnyRequest) -> bytes:
    """SHA-256 over everything that decides the answer's bytes, and nothing that does not.

    The tenant comes first, so that no tenant ever reads another's answers. Request id, deadline,
    target, lane and trace are left out; `stream` is in, since it decides the form. Pictures are in by their
    digests: they are megabytes that would be written as JSON else.
    """
    bare = dataclasses.replace(
        _with_image_digests(request),
        longshore=Extension(continue_from=request.longshore.continue_from),
        user=None,
        metadata=None,
        store=None,
        service_tier=None,
    )
    kind = "chat" if isinstance(request, ChatRequest) else "completion"
    return hashlib.sha256(dump_json([1, tenant, model_digest, kind, encode(bare)])).digest()


def _with_image_digests(request: AnyRequest) -> AnyRequest:
    if not isinstance(request, ChatRequest) or not any(message.images for message in request.messages):
        return request
    messages = tuple(
        dataclasses.replace(message, content=tuple(map(_with_digest, message.content)))
        if not isinstance(message.content, str)
        else message
        for message in request.messages
    )
    return dataclasses.replace(request, messages=messages)


def _with_digest(part: ContentPart) -> ContentPart:
    if part.image_url is None:
        return part
    digest = hashlib.sha256(part.image_url.url.encode()).hexdigest()
    return dataclasses.replace(
        part, image_url=dataclasses.replace(part.image_url, url=f"data:image/sha256,{digest}")
    )


class KeyMemo:
    """Keys already made, by the request object itself: equal small bodies share one (see app.parse_request).

    Requests are held weakly: a large one must not live on for its key's sake.
    """

    def __init__(self, max_entries: int = 512) -> None:
        self._max_entries = max_entries
        self._made: OrderedDict[tuple[int, str, str], tuple[weakref.ref[AnyRequest], bytes]] = OrderedDict()

    def key_of(self, tenant: str, model_digest: str, request: AnyRequest) -> bytes:
        """`answer_key`, from memory where it was made before."""
        place = (id(request), tenant, model_digest)
        made = self._made.get(place)
        if made is not None and made[0]() is request:  # else the identity passed to another request
            return made[1]
        key = answer_key(tenant, model_digest, request)
        self._made[place] = (weakref.ref(request), key)
        if len(self._made) > self._max_entries:
            self._made.popitem(last=False)
        return key


class MemoryLru:
    """Least recently used entries out first, once their bytes are over `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry | None:
        """The entry, which becomes the most recently used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep the entry, unless it alone is over the bound."""
        self.discard(key)
        if entry.size_bytes > self.max_bytes:
            return
        self._entries[key] = entry
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= oldest.size_bytes

    def discard(self, key: bytes) -> None:
        """Forget the entry if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= entry.size_bytes


class DiskStore:
    """Entries in one SQLite file that all workers share; used from one thread of its own at a time."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        try:
            self._db = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA recursive_triggers=ON")  # so that a replaced row counts as gone
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise ConfigError(f"the cache file {path} can't be used: {error}") from None

    def get(self, key: bytes, now_s: float) -> Entry | None:
        """The entry of any age; its time of use is noted at most once a minute."""
        row = self._db.execute("SELECT body, stored_s, used_s FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if now_s - row[2] > _TOUCH_AFTER_S:
            self._db.execute("UPDATE answers SET used_s = ? WHERE key = ?", (now_s, key))
        return Entry(row[0], row[1])

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep the entry; the least recently used go when the bytes are over the bound."""
        self._db.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
            (key, entry.body, entry.size_bytes, entry.stored_s, entry.stored_s),
        )
        if self.size_bytes() > self._max_bytes:
            self._evict()

    def digests(self) -> dict[str, str]:
        """The digest of each model, as it was told last."""
        return dict(self._db.execute("SELECT name, digest FROM models"))

    def put_digests(self, digests: Mapping[str, str]) -> None:
        """Keep the digests of these models; those told longest ago go when there are too many."""
        kept = "SELECT rowid FROM models ORDER BY rowid DESC LIMIT ?"
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO models VALUES (?, ?)", digests.items())
            self._db.execute(f"DELETE FROM models WHERE rowid NOT IN ({kept})", (_MAX_MODELS,))

    def size_bytes(self) -> int:
        """The bytes of all entries."""
        return int(self._db.execute("SELECT size_bytes FROM total").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _evict(self) -> None:
        """Down to nine tenths of the bound, so that not every write evicts."""
        excess_bytes = self.size_bytes() - int(self._max_bytes * _EVICT_TO)
        doomed: list[tuple[bytes]] = []
        self._db.execute("BEGIN IMMEDIATE")
        for key, size_bytes in self._db.execute("SELECT key, size_bytes FROM answers ORDER BY used_s"):
            if excess_bytes <= 0:
                break
            doomed.append((key,))
            excess_bytes -= size_bytes
        self._db.executemany("DELETE FROM answers WHERE key = ?", doomed)
        self._db.execute("COMMIT")


class AnswerCache:
    """Both layers. Reads of the disk and all writes run in one thread, never in the event loop.

    The write queue is bounded; when it is full, an answer is not stored, which costs nothing
    but a later miss. A disk that fails turns the cache into a memory cache.
    """

    def __init__(
        self, memory: MemoryLru, disk: DiskStore | None, ttl_s: float, clock: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._ttl_s = ttl_s
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._writes: queue.Queue[tuple[bytes, Entry]] = queue.Queue(_MAX_QUEUED_WRITES)
        self.num_failures = 0

    def get_from_memory(self, key: bytes) -> Entry | None:
        """A fresh entry that is in memory."""
        entry = self._memory.get(key)
        return entry if entry is not None and self._is_fresh(entry) else None

    async def get(self, key: bytes, *, stale: bool = False) -> Entry | None:
        """A fresh entry of either layer; with `stale`, one of any age."""
        entry = self._memory.get(key)
        if entry is None or not (stale or self._is_fresh(entry)):
            kept = None if self._disk is None else await self._read(self._disk.get, key, self._clock())
            entry = kept or entry
        if entry is None or not (stale or self._is_fresh(entry)):
            return None
        self._memory.put(key, entry)
        return entry

    def put(self, key: bytes, body: bytes) -> None:
        """Store a whole answer; the disk follows behind."""
        entry = Entry(body, self._clock())
        self._memory.put(key, entry)
        if self._disk is None:
            return
        with contextlib.suppress(queue.Full):
            self._writes.put_nowait((key, entry))
            self._pool.submit(self._write_next, self._disk)

    async def digests(self) -> dict[str, str]:
        """The digests that were kept last, in an earlier life perhaps; none without a disk."""
        return (None if self._disk is None else await self._read(self._disk.digests)) or {}

    def keep_digests(self, digests: Mapping[str, str]) -> None:
        """Keep digests beside the answers, whose keys hold them; the disk follows behind."""
        if self._disk is not None:
            self._pool.submit(self._write, self._disk.put_digests, digests)

    def close(self) -> None:
        """Finish the writes and close the file."""
        self._pool.shutdown(wait=True)
        if self._disk is not None:
            self._disk.close()

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory."""
        return self._memory.size_bytes

    def _is_fresh(self, entry: Entry) -> bool:
        return self._clock() - entry.stored_s <= self._ttl_s

    async def _read(self, read: Callable[..., _T], *arguments: object) -> _T | None:
        """What `read` gives in the disk's thread; None if the disk fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, read, *arguments)
        except sqlite3.Error:
            self.num_failures += 1
            return None

    def _write(self, write: Callable[..., None], *arguments: object) -> None:
        """In the disk's thread."""
        try:
            write(*arguments)
        except sqlite3.Error:
            self.num_failures += 1

    def _write_next(self, disk: DiskStore) -> None:
        self._write(disk.put, *self._writes.get_nowait())


class SingleFlight:
    """One request of a key goes out; the others wait for what it stores.

    When the one in front ends without storing (it failed, or its client left), the next in line
    goes out, so that nobody fails for another's sake. Waiting is bounded by the callers' own
    deadlines.
    """

    def __init__(self) -> None:
        self._locks: dict[bytes, tuple[asyncio.Lock, int]] = {}

    def __len__(self) -> int:
        return len(self._locks)

    def is_busy(self, key: bytes) -> bool:
        """True while a request of the key is out."""
        return key in self._locks

    async def enter(self, key: bytes) -> None:
        """Wait for the turn; whoever entered must `leave`."""
        lock, num_users = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = (lock, num_users + 1)
        try:
            await lock.acquire()
        except BaseException:
            self._forget(key)
            raise

    def leave(self, key: bytes) -> None:
        """Let the next one in."""
        self._locks[key][0].release()
        self._forget(key)

    def _forget(self, key: bytes) -> None:
        lock, num_users = self._locks[key]
        if num_users == 1:
            del self._locks[key]
        else:
            self._locks[key] = (lock, num_users - 1)

    @contextlib.asynccontextmanager
    async def turn(self, key: bytes) -> AsyncIterator[None]:
        """`enter` and `leave` around a block."""
        await self.enter(key)
        try:
            yield
        finally:
            self.leave(key)
