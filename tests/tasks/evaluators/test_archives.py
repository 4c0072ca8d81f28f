"""Published benchmarks, read as they are: ImageNet-A, -C and -P in their own layouts, in small."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.classifier import Classifier
from models.decode import clean_pixels, decode_pixels
from models.numerics import chosen_numerics
from models.tested_images import video_frames
from storage.errors import StoreError, UserError
from storage.shards import read_tables
from tasks.evaluators.altered import first_classes, ranked_classes
from tasks.metrics.corruption import ALEXNET
from tests.models.artifacts import COMPUTE
from tests.tasks.evaluators.conftest import Subject
from tests.tasks.evaluators.evaluations import CountingEngine, evaluate
from tests.tasks.evaluators.small_archives import (
    SIDE,
    digit,
    write,
    write_imagenet_a,
    write_imagenet_c,
    write_imagenet_p,
    write_video,
)


def network(tested: Subject) -> Classifier:
    return Classifier(tested.store, tested.model, chosen_numerics(COMPUTE), "cpu")


def measure(tested: Subject, short: str, root: Path, **config: Any) -> Any:
    return evaluate(tested.store, short, {"model": tested.model}, root=str(root), **config)


def test_a_subsets_logits_are_restricted_before_the_argmax(tested: Subject, tmp_path: Path) -> None:
    root = write_imagenet_a(tmp_path / "imagenet-a", ("one", "three"))
    made = measure(tested, "subset", root)
    (rows,) = read_tables(tested.store, made.files)
    own = network(tested)
    files = [root / key for key in rows["key"].to_pylist()]
    pixels = [clean_pixels(decode_pixels(file.read_bytes()), own.image_size, own.crop_pct) for file in files]
    logits = own.logits(torch.stack(pixels))
    restricted = logits[:, [1, 3]].softmax(dim=1).numpy()
    assert first_classes(rows).tolist() == [(1, 3)[place] for place in restricted.argmax(axis=1)]
    assert rows["confidence"].to_numpy() == pytest.approx(restricted.max(axis=1), abs=1e-5)
    assert set(logits.argmax(dim=1).tolist()) - {1, 3}, "unrestricted it would name other classes"
    truth = [1 if file.parent.name == "one" else 3 for file in files]
    assert rows["label"].to_pylist() == truth
    assert made.metrics["top1"] == pytest.approx((first_classes(rows) == truth).mean())
    assert (made.metrics["images"], made.metrics["num_classes"]) == (6, 2)


def test_the_list_of_classes_is_a_setting(tested: Subject, tmp_path: Path) -> None:
    """Images of one class, but three to choose from."""
    root = write_imagenet_a(tmp_path / "a", ("one",))
    made = measure(tested, "subset", root, classes=["zero", "one", "two"])
    (rows,) = read_tables(tested.store, made.files)
    assert made.metrics["num_classes"] == 3
    assert set(ranked_classes(rows).ravel().tolist()) == {0, 1, 2}


def test_an_empty_subset_and_a_class_that_the_model_does_not_know_are_refused(tested: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a choice needs two classes and an image"):
        measure(tested, "subset", write_imagenet_a(tmp_path / "a", ("one",)))
    write(tmp_path / "a" / "n01440764" / "b.jpg", digit(0, 0))
    with pytest.raises(UserError, match="does not know, 1 of 2 .*'n01440764'"):
        measure(tested, "subset", tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no .jpg or .jpeg or .png file lies there; unpack the archive"):
        measure(tested, "subset", tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist; set root=FOLDER"):
        measure(tested, "subset", tmp_path / "nowhere")


def test_stored_corruptions_are_seen_whole_and_counted_by_kind_and_severity(tested: Subject, tmp_path: Path) -> None:
    root = write_imagenet_c(tmp_path / "imagenet-c", {"fog": "weather", "contrast": "digital"})
    made = measure(tested, "imagenet_c", root, kinds=["contrast", "fog"])
    own, errors = network(tested), {}
    for kind, group in (("contrast", "digital"), ("fog", "weather")):
        for severity in range(1, 6):
            files = sorted((root / group / kind / str(severity)).rglob("*.JPEG"))
            whole = torch.stack([decode_pixels(file.read_bytes()).permute(1, 2, 0) for file in files])
            assert whole.shape[1:] == (SIDE, SIDE, 3), "own crop would cut .125 off"
            truth = [["zero", "one", "two", "three"].index(file.parent.name) for file in files]
            errors[kind, severity] = float((own.logits(whole).argmax(dim=1).numpy() != truth).mean())
    measured = {(k, int(s)): e for k, by_severity in made.metrics["errors"].items() for s, e in by_severity.items()}
    assert measured == pytest.approx(errors)
    means = {kind: np.mean([errors[kind, s] for s in range(1, 6)]) for kind in ("contrast", "fog")}
    assert made.metrics["mean_errors"] == pytest.approx(means)
    ces = {kind: mean / ALEXNET[kind] for kind, mean in means.items()}
    assert made.metrics["corruption_errors"] == pytest.approx(ces)
    assert made.metrics["mce"] == pytest.approx(100 * np.mean(list(ces.values())))
    assert made.metrics["images"] == 2 * 5 * 8


def test_a_new_file_changes_the_fingerprint_and_another_place_does_not(tested: Subject, tmp_path: Path) -> None:
    from tasks.evaluators.archives import ArchiveConfig

    first, second = (write_imagenet_a(tmp_path / name) for name in ("a", "b"))
    before = ArchiveConfig(root=str(first)).fingerprint()
    assert ArchiveConfig(root=str(second)).fingerprint() == before
    write(first / "one" / "new.jpg", digit(5, 1))
    assert ArchiveConfig(root=str(first)).fingerprint() != before


def test_an_archive_without_a_kind_a_severity_or_an_image_is_refused(tested: Subject, tmp_path: Path) -> None:
    root = write_imagenet_c(tmp_path / "c", {"fog": "weather"}, (1, 2, 4, 5))
    with pytest.raises(UserError, match="has no folder snow; unpack that part"):
        measure(tested, "imagenet_c", root, kinds=["fog", "snow"])
    with pytest.raises(UserError, match="fog has no severity 3"):
        measure(tested, "imagenet_c", root, kinds=["fog"])
    write_imagenet_c(root, {"fog": "weather"}, (3,))
    next((root / "weather" / "fog" / "3").rglob("*.JPEG")).unlink()
    with pytest.raises(UserError, match=r"another number of images at each severity \(1: 8, 2: 8, 3: 7, 4: 8, 5: 8\)"):
        measure(tested, "imagenet_c", root, kinds=["fog"])


def test_an_image_of_another_form_than_a_benchmarks_is_refused(tested: Subject, tmp_path: Path) -> None:
    root = write_imagenet_c(tmp_path / "c", {"fog": "weather"})
    wide = next((root / "weather" / "fog" / "2" / "two").glob("*.JPEG"))
    write(wide, digit(0, 2).resize((40, 24)))
    with pytest.raises(UserError, match="is 40 x 24 pixels; images of such a benchmark are stored as squares"):
        measure(tested, "imagenet_c", root, kinds=["fog"])


def test_stored_images_of_another_size_are_resized_and_not_cropped(tested: Subject, tmp_path: Path) -> None:
    root = write_imagenet_c(tmp_path / "c", {"fog": "weather"})
    for file in root.rglob("*.JPEG"):
        write(file, digit(0, 0, 48))
    made = measure(tested, "imagenet_c", root, kinds=["fog"])
    rows = read_tables(tested.store, made.files)[0]
    whole = clean_pixels(decode_pixels(next(root.rglob("*.JPEG")).read_bytes()), SIDE, 1.0)
    assert set(first_classes(rows)) == {int(network(tested).logits(whole[None]).argmax())}


def test_sequences_are_read_frame_by_frame(tested: Subject, tmp_path: Path) -> None:
    pytest.importorskip("av")
    kinds = ("translate", "gaussian_noise")
    root = write_imagenet_p(tmp_path / "imagenet-p", kinds)
    made = measure(tested, "imagenet_p", root, kinds=kinds)
    own, flips = network(tested), {}
    for kind in kinds:
        shares = []
        for file in sorted((root / kind).rglob("*.mp4")):
            frames = torch.from_numpy(np.stack(video_frames(file.read_bytes(), file.name)))
            guessed = own.logits(frames).argmax(dim=1).numpy()
            before = guessed[:1] if kind == "gaussian_noise" else guessed[:-1]
            shares.append((guessed[1:] != before).mean())
        flips[kind] = float(np.mean(shares))
    assert made.metrics["flips"] == pytest.approx(flips)
    assert made.metrics["mean_flip"] == pytest.approx(np.mean(list(flips.values())))
    assert made.metrics["images"] == 8
    assert all(0 <= distance <= 15 for distance in made.metrics["top5_distances"].values())


def test_harder_noise_is_another_folder_and_harder_motion_every_second_frame(tested: Subject, tmp_path: Path) -> None:
    pytest.importorskip("av")
    root = write_imagenet_p(tmp_path / "p", ("translate", "gaussian_noise"))
    with pytest.raises(UserError, match="has no folder gaussian_noise_2"):
        measure(tested, "imagenet_p", root, kinds=["gaussian_noise"], difficulty=2)
    easy, hard = (measure(tested, "imagenet_p", root, kinds=["translate"], difficulty=d) for d in (1, 2))
    (rows,) = read_tables(tested.store, hard.files)
    guessed = first_classes(rows).reshape(4, 5)
    assert hard.metrics["flips"]["translate"] == pytest.approx((guessed[:, 2:] != guessed[:, :-2]).mean())
    assert easy.metrics["flips"]["translate"] == pytest.approx((guessed[:, 1:] != guessed[:, :-1]).mean())


def test_a_broken_video_is_named(tested: Subject, tmp_path: Path) -> None:
    pytest.importorskip("av")
    root = write_imagenet_p(tmp_path / "p", ("tilt",))
    broken = next(root.rglob("*.mp4"))
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(StoreError, match=f"{broken.name}: the video"):
        measure(tested, "imagenet_p", root, kinds=["tilt"])


def test_frames_come_back_as_they_were_but_for_the_codec(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = [np.asarray(digit(n, 3, 64)) for n in range(4)]
    write_video(tmp_path / "v.mp4", frames)
    found = video_frames((tmp_path / "v.mp4").read_bytes(), "v.mp4")
    assert len(found) == 4
    for before, after in zip(frames, found, strict=True):
        assert np.abs(before.astype(int) - after).mean() < 4


def test_a_broken_off_benchmark_goes_on_with_the_next_kind(tested: Subject, tmp_path: Path) -> None:
    root = write_imagenet_c(tmp_path / "c", {"snow": "weather", "frost": "weather"})
    config: dict[str, Any] = {"root": str(root), "kinds": ["snow", "frost"]}
    with pytest.raises(KeyboardInterrupt):
        evaluate(tested.store, "imagenet_c", {"model": tested.model}, CountingEngine(most_jobs=5), **config)
    rest = CountingEngine()
    evaluate(tested.store, "imagenet_c", {"model": tested.model}, rest, **config)
    assert {job["name"].split()[0] for job in rest.jobs} == {"frost"}
