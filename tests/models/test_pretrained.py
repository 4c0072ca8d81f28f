"""Weights from outside are found in a folder or in the Hugging Face cache, without torch and without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCATE = """
import sys
from models.pretrained import locate
from storage.errors import UserError
try:
    found = locate(sys.argv[1])
    print(found.architecture, found.num_classes, found.fingerprint())
except UserError as error:
    print("refused:", error)
print("torch" in sys.modules)
"""


def located(source: str, cache: Path) -> list[str]:
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", LOCATE, source]
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def lay_out(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 7}))


def test_a_timm_name_a_hub_name_and_a_folder_with_the_same_weights_are_the_same_weights(tmp_path: Path) -> None:
    cache, commit = tmp_path / "cache", "0" * 40
    repository = cache / "models--timm--resnet18.mine"
    lay_out(repository / "snapshots" / commit, b"weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    lay_out(tmp_path / "folder", b"weights")
    lay_out(tmp_path / "other", b"other weights")
    sources = ("resnet18.mine", "hf-hub:timm/resnet18.mine", f"local-dir:{tmp_path / 'folder'}")
    named, hub, folder = (located(source, cache) for source in sources)
    assert named == hub == folder
    assert named[0].startswith("resnet18 7 ")
    assert named[1] == "False", "a plan loads no torch"
    assert located(f"local-dir:{tmp_path / 'other'}", cache)[0] != named[0]


def test_weights_that_are_not_to_be_had_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    (told, _) = located("resnet18.nowhere", tmp_path)
    assert told.startswith(
        "refused: pretrained=resnet18.nowhere: model.safetensors of timm/resnet18.nowhere is neither in"
    )
    assert told.endswith("check the name and the network, or give local-dir:FOLDER")
