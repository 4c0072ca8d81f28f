"""`nst diff`: two label versions of the same images: who changed class, how confidence moved, what is won and lost."""

import tempfile
from dataclasses import dataclass
from typing import Any

from storage.artifacts import Manifest, get
from storage.errors import UserError
from storage.objects import Store
from tasks.inspection.images import FILES_AT_ONCE, batched

Row = dict[str, Any]


@dataclass(frozen=True)
class LabelDiff:
    """What differs between labels A and B, of the images that both have.

    `changed`: keys that name another image in B's data set than in A's (a file of the source was replaced): counted here
    and nowhere else. `flips`: from_class, to_class, images, mean confidence before and after; the most frequent first.
    `won` images are at or above `min_confidence` in B only, `lost` ones in A only. `shift`: mean of B's confidence less A's.
    """

    images: int
    changed: int
    only_in_a: int
    only_in_b: int
    flipped: int
    shift: float
    min_confidence: float
    won: int
    lost: int
    flips: list[Row]
    per_class: list[Row]  # class_name (A's), images, flipped, shift, won, lost
    won_keys: list[str]
    lost_keys: list[str]


WON, LOST = "new >= $least::FLOAT AND old < $least::FLOAT", "old >= $least::FLOAT AND new < $least::FLOAT"
FACTS = f"""
    count(*) AS images, coalesce(sum((before != after)::INT), 0)::BIGINT AS flipped,
    coalesce(avg(new::DOUBLE - old), 0) AS shift,
    coalesce(sum(({WON})::INT), 0)::BIGINT AS won, coalesce(sum(({LOST})::INT), 0)::BIGINT AS lost
"""
BOTH = "FROM pairs WHERE NOT only_a AND NOT only_b AND NOT changed"


def diff_labels(store: Store, a: Manifest, b: Manifest, min_confidence: float, with_keys: bool = False) -> LabelDiff:
    """Compare two label artifacts image by image; out of core. `with_keys`: name the images won and lost too.

    Raises UserError where they are no labels of the same classes.
    """
    import duckdb

    for manifest in (a, b):
        if manifest.kind != "labels":
            raise UserError(
                f"{manifest.key} is no label artifact but of kind {manifest.kind}; give refs such as digits/1/label"
            )
    names = a.metrics["class_names"]
    if names != b.metrics["class_names"]:
        raise UserError("the two label versions have other classes; only labels of the same classes can be compared")
    with tempfile.TemporaryDirectory(prefix="nst-diff-") as folder, duckdb.connect() as connection:
        connection.execute("SET temp_directory = $folder", {"folder": folder})
        _pair_up(connection, store, a, b)
        least = {"least": min_confidence}
        (total,) = _rows(connection, f"SELECT {FACTS} {BOTH}", least)
        counts = ("only_a", "only_b", "changed")
        (apart,) = _rows(connection, f"SELECT {', '.join(f'count(*) FILTER ({c}) AS {c}' for c in counts)} FROM pairs")
        flips = f"""
            SELECT before, after, count(*) AS images, avg(old) AS old, avg(new) AS new {BOTH} AND before != after
            GROUP BY before, after ORDER BY images DESC, before, after
        """
        flipped = [
            {"from_class": names[row.pop("before")], "to_class": names[row.pop("after")], **row}
            for row in _rows(connection, flips)
        ]
        per_class = [
            {"class_name": names[row.pop("before")], **row}
            for row in _rows(connection, f"SELECT before, {FACTS} {BOTH} GROUP BY before ORDER BY before", least)
        ]
        won, lost = (
            [row["key"] for row in _rows(connection, f"SELECT key {BOTH} AND {crossed} ORDER BY key", least)]
            if with_keys
            else []
            for crossed in (WON, LOST)
        )
    return LabelDiff(
        only_in_a=apart["only_a"], only_in_b=apart["only_b"], changed=apart["changed"], min_confidence=min_confidence,
        flips=flipped, per_class=per_class, won_keys=won, lost_keys=lost, **total,
    )  # fmt: skip


def _pair_up(connection: Any, store: Store, a: Manifest, b: Manifest) -> None:
    """Make the table `pairs`: a row a key, with what A and B say of it."""
    for name, manifest in (("a", a), ("b", b)):
        _load(connection, name, store, manifest)
    connection.execute("CREATE TEMP TABLE changed (key VARCHAR)")
    data = [manifest.inputs.get("data") for manifest in (a, b)]
    if data[0] != data[1]:  # a key is a file's name and a row, so it may mean another image there
        for name, key in zip(("images_a", "images_b"), data, strict=True):
            _load_images(connection, name, store, get(store, "dataset", key or ""))
        connection.execute(
            "INSERT INTO changed SELECT key FROM images_a JOIN images_b USING (key) WHERE images_a.sha256 != images_b.sha256"
        )
    connection.execute("""
        CREATE TEMP TABLE pairs AS
        SELECT coalesce(a.key, b.key) AS key, a.label AS before, b.label AS after, a.confidence AS old, b.confidence AS new,
            a.key IS NULL AS only_b, b.key IS NULL AS only_a,
            a.key IS NOT NULL AND b.key IS NOT NULL AND changed.key IS NOT NULL AS changed
        FROM a FULL JOIN b ON a.key = b.key LEFT JOIN changed ON changed.key = a.key
    """)


def _load(connection: Any, name: str, store: Store, labels: Manifest) -> None:
    """Make a table of an artifact's predictions; of a bucket's files only some at once are kept here."""
    connection.execute(f"CREATE TEMP TABLE {name} (key VARCHAR, label INTEGER, confidence FLOAT)")
    query = f"""
        INSERT INTO {name} SELECT key, label, confidence FROM read_parquet($files, hive_partitioning = false)
    """
    for some in batched(labels.files_under("predictions/"), FILES_AT_ONCE):
        with store.local_copies(some) as paths:
            connection.execute(query, {"files": [str(path) for path in paths]})


def _load_images(connection: Any, name: str, store: Store, data: Manifest) -> None:
    """Make a table of which image each key of a data set names."""
    connection.execute(f"CREATE TEMP TABLE {name} (key VARCHAR, sha256 VARCHAR)")
    query = f"INSERT INTO {name} SELECT key, sha256 FROM read_parquet($files, hive_partitioning = false)"
    for some in batched(data.files_under("index/unlabeled/"), FILES_AT_ONCE):
        with store.local_copies(some) as paths:
            connection.execute(query, {"files": [str(path) for path in paths]})


def _rows(connection: Any, query: str, values: Row | None = None) -> list[Row]:
    found = connection.execute(query, values or {})
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
