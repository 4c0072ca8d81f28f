"""What a study at the paper's own size would cost, in days of one GPU: an estimate by a rule, before any data is there.

The rule, for one RTX 4090 in mixed precision:

* Labeling rates that were measured: EfficientNet-B7 at 600 px 182 images a second, L2 at 475 px 82.
* Another EfficientNet costs as much as width^2 x depth x resolution^2 says (the paper's appendix A.1), B0 to B6 beside
  B7, L2 beside itself: 29 a second at 800 px, which was measured too. ResNet-50 costs 10.5 times what B0 does at 224 px (4.1
  and 0.39 billion multiply-adds, table 2 of the EfficientNet paper). B0 for SVHN has B0's maps at 128 px from its third
  block on, so it counts as that: an upper bound.
* An image of training costs three of labeling: forward, and twice that backward.
* A training sees epochs x labeled images x (1 + batch ratio) of them, a teacher or a fine-tuning epochs x labeled images.
* Labeling sees all unlabeled images, or the distinct selected ones (order=once), a view each.

Evaluating, selecting, reading and the memory that a network needs are left out. As a check: three passes for each of the 6.7
billion images of one L2 at ratio 14 come to 2,850 days; the paper took 6 days on 2,048 TPU v3 cores, 12,288 core-days.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from flows.graph import Node
from flows.studies import Images
from models.configs import ModelConfig, TrainConfig
from storage.errors import UserError
from tasks.selection.config import SelectConfig

DAY_S = 86_400
TRAINING_PASSES = 3
# width, depth (paper, table 8; EfficientNet's own coefficients)
SCALING = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "l2": (4.3, 5.3),
}
B7_RATE, B7_PX = 182.0, 600
L2_RATE, L2_PX = 82.0, 475
RESNET50_IN_B0 = 4.1 / 0.39
SVHN_PX_FACTOR = 4  # 128 px for 32
EFFICIENTNET = re.compile(r"efficientnet_(b[0-7]|l2)(_svhn)?$")


def gpu_days(needed: Iterable[tuple[str, Node, Mapping[str, Node], Images]]) -> float:
    """Days of one GPU for artifacts, each counted once: (key, node, all nodes of its run by name, the data's size).

    Raises UserError where the rule knows nothing of a network.
    """
    seconds = {key: _seconds(node, nodes, images) for key, node, nodes, images in needed}
    return sum(seconds.values()) / DAY_S


def labeling_rate(model: ModelConfig) -> float:
    """Images a second that the GPU labels with a network. Raises UserError where the rule knows nothing of it."""
    name, px = model.name.partition(".")[0], model.image_size
    if name == "resnet50":
        return _efficientnet_rate("b0", px) / RESNET50_IN_B0
    found = EFFICIENTNET.search(name)
    if found is None:
        raise UserError(
            f"the cost of {model.name} is not known; flows/study_cost.py has a rule for EfficientNets and resnet50"
        )
    return _efficientnet_rate(found[1], px * (SVHN_PX_FACTOR if found[2] else 1))


def _efficientnet_rate(size: str, px: int) -> float:
    if size == "l2":
        return L2_RATE * (L2_PX / px) ** 2
    return B7_RATE * _work("b7", B7_PX) / _work(size, px)


def _work(size: str, px: int) -> float:
    width, depth = SCALING[size]
    return width**2 * depth * px**2


def _seconds(node: Node, nodes: Mapping[str, Node], images: Images) -> float:
    rule = RULES.get(node.stage)
    return rule(node, nodes, images) if rule is not None else 0.0


def _training_seconds(node: Node, nodes: Mapping[str, Node], images: Images) -> float:
    config = node.config
    assert isinstance(config, TrainConfig)
    unlabeled = config.batch_ratio if "selection" in node.inputs else 0.0
    labeled = 0.0 if unlabeled and config.train_on == "unlabeled" else 1.0
    return config.epochs * images.labeled * (labeled + unlabeled) * TRAINING_PASSES / labeling_rate(config.model)


def _labeling_seconds(node: Node, nodes: Mapping[str, Node], images: Images) -> float:
    seen = float(images.unlabeled)
    if "selection" in node.inputs:
        chosen = nodes[node.inputs["selection"]].config
        assert isinstance(chosen, SelectConfig)
        seen = images.selected * chosen.subset
    views = len(getattr(node.config, "views", ())) or 1
    teachers = [nodes[name].config for role, name in node.inputs.items() if role.split(".")[0] == "model"]
    return sum(seen * views / labeling_rate(c.model) for c in teachers if isinstance(c, TrainConfig))


RULES: dict[str, Callable[[Node, Mapping[str, Node], Images], float]] = {
    "train": _training_seconds,
    "label": _labeling_seconds,
}
