"""Weights from outside: found, hashed and described without torch, so that a plan knows their identity.

A timm name with its tag (`tf_efficientnet_b7.ns_jft_in1k`: timm's own place on the Hugging Face hub), `hf-hub:OWNER/NAME`
or `local-dir:FOLDER`: all are a folder with timm's `config.json` and `model.safetensors`. Pickled weights are not read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import UserError
from storage.keys import digest, file_sha256

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
LOCAL, HUB = "local-dir:", "hf-hub:"


@dataclass(frozen=True)
class Pretrained:
    """Weights on this machine: their file, and timm's description of the network they are of."""

    source: str
    weights: Path
    config: dict[str, Any]

    @property
    def architecture(self) -> str:
        """timm's name of the network, without a tag."""
        return str(self.config.get("architecture", ""))

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return int(self.config.get("num_classes") or self.config.get("pretrained_cfg", {}).get("num_classes") or 0)

    def fingerprint(self) -> str:
        """The identity of the weights: a digest of the file's sha256, 32 hex digits. Reads the whole file."""
        return digest({"pretrained": file_sha256(self.weights)})


def locate(source: str) -> Pretrained:
    """Find pretrained weights, fetched from the hub where they are not on this machine yet.

    Raises UserError where there are none, or only pickled ones.
    """
    if source.startswith(LOCAL):
        folder = Path(source.removeprefix(LOCAL)).expanduser().resolve()
        weights, described = folder / WEIGHTS_FILE, folder / CONFIG_FILE
        missing = [path.name for path in (weights, described) if not path.is_file()]
        if missing:
            raise UserError(
                f"pretrained={source}: {folder} has no {' and no '.join(missing)}; a folder of timm's has both "
                "(`nst export` writes one)"
            )
    else:
        weights, described = _from_hub(source)
    try:
        config = json.loads(described.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"pretrained={source}: its {CONFIG_FILE} cannot be read ({error})") from error
    found = Pretrained(source, weights, config)
    if not found.architecture:
        raise UserError(f"pretrained={source}: its {CONFIG_FILE} names no architecture; is it timm's?")
    return found


def _from_hub(source: str) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.removeprefix(HUB).partition("@")
    if not source.startswith(HUB):
        if "." not in name or "/" in name:
            raise UserError(
                f"pretrained={source}: name timm's weights with their tag, e.g. tf_efficientnet_b7.ns_jft_in1k, or use "
                f"{HUB}OWNER/NAME or {LOCAL}FOLDER"
            )
        name = f"timm/{name}"
    try:
        weights, config = (
            Path(hf_hub_download(name, file, revision=revision or None)) for file in (WEIGHTS_FILE, CONFIG_FILE)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"pretrained={source}: {WEIGHTS_FILE} of {name} is neither in this machine's Hugging Face cache nor to be "
            f"fetched ({first}); check the name and the network, or give {LOCAL}FOLDER"
        ) from error
    return weights, config
