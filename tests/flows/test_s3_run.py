"""The pipeline with every byte in a bucket, on a real server; and what of the credentials may be found afterwards."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.seaweedfs import SECRET_KEY, S3Server
from flows.experiment import load_experiment
from storage.artifacts import get, list_artifacts
from storage.errors import UserError
from storage.external import ExternalFolder
from storage.objects import Store
from storage.runs import resolve_ref
from storage.shards import read_index, shard_files
from storage.verify import verify_all
from tests.flows.runs import command, contents, nst, run, start
from tests.flows.tiny import RECIPE, write_recipe
from tests.real_images import write_splits

TOKEN = "session-token-that-nobody-should-find"
SMALL = (
    "iterations=[{}]",
    "train.model.args={layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}",
    "train.labeled_batch=8",
    "train.epochs=1",
    "teacher.epochs=1",
    "student.epochs=1",
    "student.batch_ratio=1",
    "select.min_confidence=0.0",
    "select.on_empty_class=skip",
    "select.images_per_class=12",
    "data.shard_images=10",
)


def holding(secrets: tuple[str, ...], files: dict[str, bytes]) -> list[str]:
    return [name for name, data in files.items() if any(secret.encode() in data for secret in secrets)]


def test_a_run_in_a_bucket_ends_with_the_artifacts_of_one_on_disk_and_shows_no_secret(
    s3: str, finished: Path, tmp_path: Path
) -> None:
    """Through Prefect's API: neither objects, Prefect's database, output nor errors hold the secret or its token."""
    home = tmp_path / "prefect"
    environment = {"PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_SERVER_LOGGING_LEVEL": "DEBUG"}
    output = run(command(s3, prefect="ephemeral"), **environment)
    assert contents(s3) == contents(finished)
    store = Store(s3)
    assert verify_all(store).problems == []
    assert store.paths("leases") == store.paths("gc") == store.paths("probes") == []
    assert "all is as it was written" in nst("verify", "--all", "--store", s3, cwd=tmp_path)
    assert f"report: {tmp_path}/report.html" in nst("report", "digits", "--store", s3, cwd=tmp_path)
    entry = get(store, "report", resolve_ref(store, "digits/report").key).file("report.html")
    assert (tmp_path / "report.html").read_bytes() == store.read_verified(entry.path, entry.sha256)
    nst("export", "digits/1/student", "model", "--store", s3, cwd=tmp_path)
    assert (tmp_path / "model/model.safetensors").stat().st_size > 1000

    failing = {**environment, "AWS_SESSION_TOKEN": TOKEN, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    child = start(command(s3, prefect="ephemeral"), **failing)
    error = child.communicate(timeout=120)[0]
    assert child.returncode == 2
    assert "cannot be reached" in error
    files = {path: store.read_bytes(path) for path in store.paths("")}
    files |= {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert any(name.endswith("prefect.db") for name in files)
    files |= {"output": output.encode(), "error": error.encode()}
    assert len(files) > 60
    assert holding((SECRET_KEY, TOKEN), files) == []
    assert holding(("digits",), files), "the search finds what is there"


def test_stages_that_share_nothing_but_the_bucket_pass_their_work_on(s3: str, tmp_path: Path) -> None:
    """Images in the bucket too; each stage runs in a folder, with a cache and a temporary folder of its own."""
    images, store = Store(f"{s3}/images of mine"), Store(f"{s3}/store")
    for path in write_splits(tmp_path / "images").iterdir():
        images.put_file(path, path.name)
    recipe = write_recipe(tmp_path, RECIPE)
    stages = [["stage", name, recipe] for name in ("prepare", "unlabeled", "0/teacher", "1/label", "1/select")]
    for number, line in enumerate([*stages, ["run", recipe]]):
        machine = tmp_path / f"machine-{number}"
        for folder in ("tmp", "work"):
            (machine / folder).mkdir(parents=True)
        own = {"NST_CACHE_DIR": str(machine / "cache"), "TMPDIR": str(machine / "tmp")}
        options = [*SMALL, f"data.root={images.url}", "--store", store.url, "--prefect", "off"]
        output = nst(*line, *options, cwd=machine / "work", **own)
        assert list((machine / "work").iterdir()) == [], "nothing is written beside the bucket and the cache"
        assert list((machine / "cache").glob("*/*.files")) == []
    assert output.count(": reused") == 5, output
    assert verify_all(store).problems == []
    assert {m.kind for m in list_artifacts(store)} == {
        "dataset",
        "model",
        "evaluation",
        "labels",
        "selection",
        "report",
    }
    data = get(store, "dataset", resolve_ref(store, "tiny/unlabeled").key)
    assert data.metrics["unlabeled"]["images"] == 30
    assert len(shard_files(data, "unlabeled")) == 3
    assert read_index(store, data, "unlabeled")["source"].to_pylist()[0] == "unlabeled.parquet:0.png"


def test_images_that_are_missing_in_the_bucket_are_named_before_any_work(s3: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    options = ["--store", f"{s3}/store", "--prefect", "off", f"data.root={s3}/nothing"]
    error = nst("run", recipe, *options, cwd=tmp_path, code=2)
    assert f"nothing matches 'labeled.parquet' in {s3}/nothing" in error.replace("\n", "")
    assert Store(s3).paths("store/artifacts") == []


def test_a_recipe_may_lie_in_the_bucket(s3: str, tmp_path: Path) -> None:
    Store(s3).put_file(Path(write_recipe(tmp_path, RECIPE)), "recipes/tiny.yaml")
    assert load_experiment(f"{s3}/recipes/tiny.yaml", ["student.epochs=3"]).iterations[0].epochs == 3.0
    with pytest.raises(UserError, match="there is no such file"):
        load_experiment(f"{s3}/recipes/gone.yaml")


def test_a_bucket_that_may_only_be_read_serves_readers_and_stops_a_run_at_once(
    s3: str, s3_process: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3)
    store.check_writable()
    s3_process.add_reader("reader", "reader-secret")
    reader = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"}
    nst("ls", "--store", s3, cwd=tmp_path, **reader)
    nst("verify", "--all", "--store", s3, cwd=tmp_path, **reader)
    nst("gc", "--store", s3, cwd=tmp_path, **reader)
    for line in (["run", "digits"], ["gc", "--delete"]):
        error = nst(*line, "--store", s3, cwd=tmp_path, code=2, **reader)
        assert "AccessDenied" in error
        assert "may not do this; the store needs list, get, put and delete" in error
        assert "reader-secret" not in error
    assert store.paths("") == ["store.json"]
    for name, value in reader.items():
        monkeypatch.setenv(name, value)
    assert ExternalFolder(s3, "data.root").find("store.json") != [], "images need no more than reading"


@pytest.mark.parametrize("setting", ["store", "data.root"])
def test_credentials_in_a_url_are_refused_before_anything_keeps_them(setting: str, tmp_path: Path) -> None:
    url = "s3://key:hidden-secret@bucket/images"
    line = ["run", "cifar10", *([f"data.root={url}"] if setting == "data.root" else ["--store", url])]
    error = nst(*line, cwd=tmp_path, code=2, PREFECT_HOME=str(tmp_path / "prefect"))
    assert f"{setting}: credentials must not be part of a URL" in error
    assert "hidden-secret" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["store", "cache"])
def test_a_full_disk_in_the_middle_of_a_stage_is_one_line_and_more_room_lets_it_go_on(
    s3: str, small_disk: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """The store's own disk, or the one on which files for a bucket are made."""
    disk = small_disk("400k")
    store = str(disk / "store") if kind == "store" else s3
    environment = {"NST_CACHE_DIR": str(disk / "cache")} if kind == "cache" else {}
    line = ["stage", "prepare", "digits", "data.shard_images=1000", "--prefect", "off", "--store", store]
    error = nst(*line, cwd=tmp_path, code=2, **environment)
    assert "No space left on device" in error
    assert "ree some space" in error
    assert "Traceback" not in error
    assert list_artifacts(Store(store)) == []
    assert verify_all(Store(store)).problems == []
    small_disk("20m")
    nst(*line, cwd=tmp_path, **environment)
    assert [m.kind for m in list_artifacts(Store(store))] == ["dataset"]
    assert verify_all(Store(store)).problems == []
