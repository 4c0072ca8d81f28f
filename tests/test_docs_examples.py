"""The examples of docs/extending.md: its evaluator, selection rule and network, each made and run."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.datasets import HereEngine
from tests.models.artifacts import COMPUTE, make_artifacts
from tests.tasks.labeling import teacher

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def module_of(text: str, name: str) -> ModuleType:
    """Code of a page as a module."""
    module = sys.modules[name] = ModuleType(name)  # timm looks there for where a network comes from
    exec(compile(text, name, "exec"), module.__dict__)
    return module


def example(heading: str, language: str) -> str:
    """The first block of a section of docs/extending.md."""
    page = DOCS / "extending.md"
    section = page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def test_the_evaluator_of_extending_measures_what_it_says(tmp_path: Path) -> None:
    from tasks.contract import StageContext
    from tasks.evaluators import clean

    module = module_of(example("An evaluator", "python"), "confident")
    artifacts = make_artifacts(tmp_path)
    inputs = {"data": artifacts.data, "model": teacher(artifacts.store, 3)}
    context = StageContext(artifacts.store, "0" * 32, HereEngine(), COMPUTE)  # type: ignore[arg-type]
    plain = clean.evaluate(context, clean.CleanConfig(), inputs).metrics["test"]
    everything = module.evaluate(context, module.ConfidentConfig(min_confidence=0), inputs)
    assert (everything.metrics["sure"], everything.metrics["top1"]) == (1.0, plain["top1"])
    configs = [module.ConfidentConfig(min_confidence=share) for share in (0, 0.34, 0.36, 0.4, 1)]
    shares = [module.evaluate(context, config, inputs).metrics["sure"] for config in configs]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1, 0)
    assert module.headline(everything.metrics).title == "confident"
    assert module.headline({"top1": None}) is None


def patched(diff: str, path: str) -> str:
    """A source file with the hunks of a diff in it; each stands at one place."""
    text = (ROOT / path).read_text()
    own = diff.partition(f"--- {path}\n@@\n")[2].partition("--- ")[0]
    for hunk in own.split("@@\n"):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_selection_rule_of_extending_keeps_as_many_images_by_chance(tmp_path: Path) -> None:
    from tasks.selection.rules import DECISIONS, find_rules
    from tests.tasks.selection.predicted import predicted

    diff = example("A selection rule", "diff")
    config = module_of(patched(diff, "tasks/selection/config.py"), "config").SelectConfig
    rules = module_of(patched(diff, "tasks/selection/rules.py"), "rules")
    rows = [(f"{n:04d}", n % 3, 0.5 + n / 1000) for n in range(300)]
    found = predicted(tmp_path, [rows])

    def kept(method: str, find: Any) -> list[str]:
        decide = find(found, config(method=method, images_per_class=40)).decide
        fates = [(batch.keys(np.arange(len(batch))), *decide(batch)) for batch in batches()]
        return [
            str(key)
            for keys, decisions, _ in fates
            for key, decision in zip(keys.to_pylist(), decisions, strict=True)
            if DECISIONS[decision] == "kept"
        ]

    def batches() -> Iterator[Any]:
        return iter(list(found.scan(lambda batch: batch)))

    sure, chosen = kept("exact", find_rules), kept("random", rules.find_rules)
    assert kept("exact", rules.find_rules) == sure
    assert len(sure) == len(chosen) == 120
    assert min(sure) > min(chosen), "the least confident are among them too"
    counts = rules.count_classes(found, config(method="random", images_per_class=40))
    assert counts.kept.tolist() == [40, 40, 40]


def test_the_network_of_extending_reloads_as_itself(tmp_path: Path) -> None:
    import torch

    from models import zoo
    from models.configs import ModelConfig

    module_of(example("A network", "python"), "variant")
    config = ModelConfig(name="resnet18_small_images", image_size=32)
    model = zoo.build(config, 3)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    zoo.save(model, config, ["a", "b", "c"], tmp_path)  # raises where it does not
