from pathlib import Path

import pytest

from models.compute import ComputeConfig, LocalEngine
from storage.errors import UserError
from storage.objects import Store
from tasks.contract import StageContext
from tasks.ingest import DataConfig, ingest, open_source, plan_stretches
from tasks.reject_limit import RejectLimit
from tasks.source_parts import Stretch
from tasks.sources import UNKNOWN_ROWS, SourceFile
from tests.real_images import pngs, write_images


def rows(name: str, count: int) -> Stretch:
    file = SourceFile(split="unlabeled", name=name, bytes=0, sha256=name, rows=count)
    return Stretch(file=file, first=0, last=count)


def tar(name: str, num_bytes: int) -> Stretch:
    file = SourceFile(split="unlabeled", name=name, bytes=num_bytes, sha256=name, rows=UNKNOWN_ROWS)
    return Stretch(file=file, first=0, last=UNKNOWN_ROWS, in_place=True)


def test_a_split_that_cannot_come_out_well_ends_the_work_at_once(store: Store, tmp_path: Path) -> None:
    """The first of 40 files holds more broken images than all 40 together may have."""
    root = tmp_path / "images"
    write_images(root / "unlabeled-00.parquet", [b"text"] * 30)
    for number in range(1, 40):
        write_images(root / f"unlabeled-{number:02d}.parquet", pngs(2, 10 * number))
    config = DataConfig(root=str(root))
    stretches = plan_stretches(config, open_source(config).files(["unlabeled"]))
    compute = ComputeConfig(processes=1)
    context = StageContext(store, "k", LocalEngine(compute), compute)
    with pytest.raises(
        UserError, match=r"data\.unlabeled: 30 of the first 30 images cannot be decoded.*unknown format"
    ):
        ingest(context, config, stretches)
    made = len({path.split("/")[2] for path in store.paths("parts/ingest")})
    assert made < 40
    with pytest.raises(UserError, match=r"30 of the first \d+ images"):
        ingest(context, config, stretches)
    assert len({path.split("/")[2] for path in store.paths("parts/ingest")}) == made, (
        "known from the parts that are there"
    )


def test_what_can_still_come_out_well_goes_on() -> None:
    stretches = [rows("a", 100), rows("b", 900)]
    limit = RejectLimit(0.05, stretches, [])
    limit.add(stretches[0].part_key(), kept=50, rejected=50, reasons=[])
    limit = RejectLimit(0.05, stretches, [])
    with pytest.raises(UserError, match="51 of the first 100 images .* even if all others can"):
        limit.add(stretches[0].part_key(), kept=49, rejected=51, reasons=[])


def test_of_unread_tars_more_images_are_expected_than_the_read_ones_lead_to() -> None:
    tars = [tar("a", 1000), tar("b", 1000), tar("c", 18_000)]
    limit = RejectLimit(0.05, tars, [])
    limit.add(tars[0].part_key(), kept=0, rejected=100, reasons=["first"])
    limit.add(tars[1].part_key(), kept=0, rejected=100, reasons=["second"])
    limit = RejectLimit(0.02, tars, [])
    limit.add(tars[0].part_key(), kept=0, rejected=100, reasons=["first"])
    with pytest.raises(UserError, match=r"200 of the first 200 .*first; second"):
        limit.add(tars[1].part_key(), kept=0, rejected=100, reasons=["second"])


def test_each_split_has_its_own_limit() -> None:
    val = SourceFile(split="val", name="v", bytes=0, sha256="v", rows=1000)
    stretches = [rows("a", 1000), rows("b", 1000), Stretch(file=val, first=0, last=1000)]
    limit = RejectLimit(0.1, stretches, [])
    limit.add(stretches[2].part_key(), kept=900, rejected=100, reasons=[])
    with pytest.raises(UserError, match=r"data\.unlabeled: 201 of the first 1000"):
        limit.add(stretches[0].part_key(), kept=799, rejected=201, reasons=[])
