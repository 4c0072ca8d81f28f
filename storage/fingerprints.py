"""The sha256 of files of this machine, remembered by path, size and time, so that a listing need not read them again.

Kept in the node's cache folder. A file that changed within the last seconds is not remembered: it may change again
without another time.
"""

import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from storage.cache import node_cache
from storage.keys import file_sha256

SETTLED_S = 5
HASHES_AT_ONCE = 8
WAIT_S = 60
BATCH = 500  # files that are looked up, hashed and remembered at once
TABLE = "CREATE TABLE IF NOT EXISTS file (path TEXT PRIMARY KEY, bytes INT, mtime INT, inode INT, sha256 TEXT)"

State = tuple[int, int, int]


def file_digests(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file, read only where it changed since it was last asked for. Raises OSError."""
    digests: list[str] = []
    for start in range(0, len(paths), BATCH):
        batch = [str(path.resolve()) for path in paths[start : start + BATCH]]
        states = [_state(path) for path in batch]
        known = _recall(batch)
        fresh = [i for i, path in enumerate(batch) if known.get(path, ((), ""))[0] != states[i]]
        with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
            hashed = dict(zip(fresh, pool.map(file_sha256, [Path(batch[i]) for i in fresh]), strict=True))
        settled = time.time_ns() - SETTLED_S * 10**9
        _remember([(batch[i], *states[i], hashed[i]) for i in fresh if states[i][1] < settled])
        digests += [hashed[i] if i in hashed else known[batch[i]][1] for i in range(len(batch))]
    return digests


def _state(path: str) -> State:
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _recall(paths: Sequence[str]) -> dict[str, tuple[State, str]]:
    try:
        with closing(_connect()) as memory:
            query = f"SELECT * FROM file WHERE path IN ({','.join('?' * len(paths))})"
            return {
                path: ((size, mtime, inode), sha256)
                for path, size, mtime, inode, sha256 in memory.execute(query, paths)
            }
    except (sqlite3.Error, OSError):  # without the memory files are read again, nothing else
        return {}


def _remember(rows: Sequence[tuple[str, int, int, int, str]]) -> None:
    try:
        with closing(_connect()) as memory, memory:
            memory.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?)", rows)
    except (sqlite3.Error, OSError):
        pass


def _connect() -> sqlite3.Connection:
    folder = node_cache().root
    folder.mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(folder / "fingerprints.sqlite", timeout=WAIT_S)
    memory.execute(TABLE)
    return memory
