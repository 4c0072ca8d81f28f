"""Predictions as Parquet: two files a shard, with the same rows in the same order. Without torch.

`predictions.parquet` says which class and how sure; it is small, so that selection fetches it alone.
`probabilities.parquet` holds what a student learns from: all classes, or with `label.top_k` the k likeliest.
In an artifact they are `predictions/<split>/00000.parquet` and `probabilities/<split>/00000.parquet`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from storage.artifacts import FileEntry, Manifest
from storage.objects import Store
from storage.shards import read_rows, read_table, read_tables

PREDICTIONS_FILE = "predictions.parquet"
PROBABILITIES_FILE = "probabilities.parquet"
PROBABILITIES_GROUP_ROWS = 512  # a student that joins labels by key reads single rows: 1 MB of 1000 classes
TOP_K_CLASSES = 1 << 15  # classes that an int16 can name

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("key_hash", pa.uint64()),  # of `key_hashes`: a join or a draw of chance needs no strings
        ("label", pa.int32()),  # the likeliest class for the un-noised, un-tempered model; ties go to the lower
        ("confidence", pa.float32()),  # its probability
    ]
)


def probabilities_schema(num_classes: int, top_k: int = 0) -> pa.Schema:
    """All classes as fp16; or the `top_k` likeliest by falling probability, ties by class, as int16 and fp16."""
    if not top_k:
        return pa.schema([("probabilities", pa.list_(pa.float16(), num_classes))])
    return pa.schema(
        [("top_classes", pa.list_(pa.int16(), top_k)), ("top_probabilities", pa.list_(pa.float16(), top_k))]
    )


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """The first 8 bytes, big-endian, of the sha256 of each key's UTF-8: uint64 [n]."""
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def predictions_table(keys: Sequence[str], probabilities: np.ndarray) -> pa.Table:
    """Class and confidence of a shard's images from their probabilities, float32 [n, classes]."""
    columns = [
        pa.array(keys, pa.string()),
        pa.array(key_hashes(keys)),
        pa.array(probabilities.argmax(axis=1).astype(np.int32)),
        pa.array(probabilities.max(axis=1).astype(np.float32)),
    ]
    return pa.Table.from_arrays(columns, schema=PREDICTIONS_SCHEMA)


def probabilities_table(probabilities: np.ndarray, top_k: int = 0) -> pa.Table:
    """What is stored of probabilities float32 [n, classes] that sum to 1; they are ranked before they are rounded.

    Raises ValueError where `top_k` is more than the classes, or the classes more than an int16 can name.
    """
    num_classes = probabilities.shape[1]
    if not 0 <= top_k <= num_classes or (top_k and num_classes > TOP_K_CLASSES):
        raise ValueError(f"top_k={top_k} does not fit {num_classes} classes (of at most {TOP_K_CLASSES:,})")
    stored = [probabilities.astype(np.float16)]
    if top_k:
        classes = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        stored = [classes.astype(np.int16), np.take_along_axis(stored[0], classes, axis=1)]
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1]) for v in stored]
    return pa.Table.from_arrays(columns, schema=probabilities_schema(num_classes, top_k))


def restore_probabilities(table: pa.Table, num_classes: int) -> np.ndarray:
    """All classes of stored rows, float16 [n, classes], in [0, 1], summing to 1 within fp16's rounding.

    The mass that top k storage leaves out is spread evenly over the other classes: the least that can be assumed of them,
    and none comes above the k-th. So a student's loss, and what is measured of all classes (log loss, Brier score), see
    distributions, never a cut or a rescaled one: the k likeliest keep their probabilities. What is measured of the first
    class alone (confidence, expected calibration error) takes `confidence` of the predictions, in which nothing is missing.
    """
    if "probabilities" in table.column_names:
        return _matrix(table["probabilities"], num_classes)
    classes, top = _matrix(table["top_classes"]), _matrix(table["top_probabilities"])
    missing = np.clip(1.0 - top.sum(axis=1, dtype=np.float32), 0.0, None)
    others = max(1, num_classes - top.shape[1])
    restored = np.repeat((missing / others).astype(np.float16)[:, None], num_classes, axis=1)
    np.put_along_axis(restored, classes.astype(np.int64), top, axis=1)
    return restored


def read_predictions(store: Store, labels: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
    """Keys, classes and confidences of a label or evaluation artifact, in the order of its shards."""
    return pa.concat_tables(read_tables(store, labels.files_under("predictions/"), columns))


def read_probabilities(
    store: Store, labels: Manifest, entry: FileEntry, rows: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Probabilities of one shard of a label artifact, float16 [n, classes], as `restore_probabilities` gives them.

    `entry` is one of `labels.files_under("probabilities/")`; `rows` are places in it, in any order (None: all).
    """
    table = read_table(store, entry) if rows is None else read_rows(store, entry, np.asarray(rows, np.int64))
    return restore_probabilities(table, len(labels.metrics["class_names"]))


def _matrix(column: pa.ChunkedArray, width: int | None = None) -> np.ndarray:
    """A fixed-size-list column as an array [rows, width]."""
    values = column.combine_chunks()
    return np.asarray(values.flatten()).reshape(-1, width or values.type.list_size)
