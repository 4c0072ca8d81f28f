"""Predictions as Parquet: one part a shard, with key, label, confidence and all probabilities. Without torch."""

import numpy as np
import pyarrow as pa

from storage.artifacts import Manifest
from storage.objects import Store
from storage.shards import read_tables


def predictions_schema(num_classes: int) -> pa.Schema:
    """key; label: argmax; confidence: the largest probability, before rounding to fp16; probabilities: all, fp16."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("label", pa.int32()),
            ("confidence", pa.float32()),
            ("probabilities", pa.list_(pa.float16(), num_classes)),
        ]
    )


def predictions_table(keys: list[str], probabilities: np.ndarray) -> pa.Table:
    """The table of a shard's predictions; probabilities float32 [n, classes] sum to 1."""
    num_classes = probabilities.shape[1]
    flat = pa.array(probabilities.astype(np.float16).reshape(-1))
    columns = [
        pa.array(keys, pa.string()),
        pa.array(probabilities.argmax(axis=1).astype(np.int32)),
        pa.array(probabilities.max(axis=1).astype(np.float32)),
        pa.FixedSizeListArray.from_arrays(flat, num_classes),
    ]
    return pa.Table.from_arrays(columns, schema=predictions_schema(num_classes))


def read_predictions(store: Store, labels: Manifest) -> pa.Table:
    """All predictions of a label or evaluation artifact, in the order of its shards."""
    return pa.concat_tables(read_tables(store, labels.files_under("predictions/")))
