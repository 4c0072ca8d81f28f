"""What was decided of every labeled image: `decisions.parquet`, with the rows of the predictions in their order.

The file repeats nothing of the predictions: 100 million decisions fit into some 100 MB. `read_decisions` puts both
together; in SQL it is a positional join.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import Manifest
from storage.errors import StoreError
from storage.objects import Store
from storage.shards import ROW_GROUP_ROWS
from tasks.selection.rules import DECISIONS

DECISIONS_FILE = "decisions.parquet"
DECISIONS_SCHEMA = pa.schema(
    [
        ("decision", pa.dictionary(pa.int8(), pa.string())),
        ("copies", pa.int32()),  # 0: not kept
    ]
)
BIOGRAPHY_SCHEMA = pa.schema(
    [("key", pa.string()), ("label", pa.int32()), ("confidence", pa.float32()), *DECISIONS_SCHEMA]
)


def decisions_batch(decisions: np.ndarray, copies: np.ndarray) -> pa.RecordBatch:
    """Rows of the file, from what `Rules.decide` returns."""
    codes = pa.DictionaryArray.from_arrays(pa.array(decisions), pa.array(DECISIONS))
    return pa.RecordBatch.from_arrays([codes, pa.array(copies)], schema=DECISIONS_SCHEMA)


def read_decisions(store: Store, labels: Manifest, selection: Manifest) -> pa.RecordBatchReader:
    """key, label, confidence, decision, copies of every labeled image, in the order of the predictions, read piece by piece.

    `labels` are those that the selection was made from. Raises StoreError where they are others.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        with store.local_copy(selection.file(DECISIONS_FILE)) as path, pq.ParquetFile(path) as decisions:
            rest = decisions.iter_batches(ROW_GROUP_ROWS)
            waiting = DECISIONS_SCHEMA.empty_table()
            for predictions in _prediction_batches(store, labels):
                while waiting.num_rows < predictions.num_rows:
                    piece = next(rest, None)
                    if piece is None:
                        raise StoreError(f"selection {selection.key} was made from other labels than {labels.key}")
                    waiting = pa.concat_tables([waiting, pa.Table.from_batches([piece])])
                own = waiting.slice(0, predictions.num_rows).combine_chunks()
                waiting = waiting.slice(predictions.num_rows)
                columns = [*predictions.columns, *(own[name].combine_chunks() for name in own.column_names)]
                yield pa.RecordBatch.from_arrays(columns, schema=BIOGRAPHY_SCHEMA)

    return pa.RecordBatchReader.from_batches(BIOGRAPHY_SCHEMA, batches())


def _prediction_batches(store: Store, labels: Manifest) -> Iterator[pa.RecordBatch]:
    for entry in labels.files_under("predictions/"):
        with store.local_copy(entry) as path, pq.ParquetFile(path) as reader:
            yield from reader.iter_batches(ROW_GROUP_ROWS, columns=["key", "label", "confidence"])
