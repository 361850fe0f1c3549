"""Everything that decides an AdaMatch run: a ``TrainingConfig`` with what the method adds.

| ``setting`` | ``dataset`` | labels |
|---|---|---|
| ``uda`` unsupervised domain adaptation | source, target | all of the source, none of the target (it may have none) |
| ``ssda`` semi-supervised domain adaptation | source, target | also ``labels_per_class`` of the target |
| ``ssl`` semi-supervised learning | one | ``labels_per_class`` of it |

Defaults are those of the paper's section IV-F and of the AdaMatch publication; the learning rate is not the paper's
0.03, which is for SGD.
"""

from __future__ import annotations

from typing import Annotated

from cn_hf.errors import ConfigError
from cn_hf.training.config import OPTIMIZERS, SCHEDULES, TrainingConfig, option
from cn_hf.validation import (
    Count,
    Flag,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Share,
    Text,
    Texts,
    one_of,
    validated,
)

__all__ = ["ALIGNMENTS", "SETTINGS", "STANDARDIZATIONS", "AdaMatchConfig"]

SETTINGS = ("uda", "ssl", "ssda")
ALIGNMENTS = ("per class", "overall")
STANDARDIZATIONS = ("dataset", "image")


@validated
class AdaMatchConfig(TrainingConfig):
    """One AdaMatch run.

    ``batch_size`` counts the labelled images of a step, and an epoch is one pass over the unlabelled ones. ``augment``
    is the weak augmentation; strong views are RandAugment's, on top of it, and of random convolutions if asked for.

    Raises:
        ConfigError: An option is unknown, of the wrong type or out of range, or contradicts another.
    """

    setting: Annotated[Text, one_of(SETTINGS)] = option(
        "uda, ssl or ssda: which labels are given", "uda", section="data"
    )
    labels_per_class: Count | None = option("labelled target images a class, for ssl and ssda", None, section="data")
    unlabelled_ratio: Count = option("unlabelled images of a step for each of batch_size", 3, section="data")
    strong_operations: Natural = option("operations of RandAugment on strong views", 2, section="data")
    strong_magnitude: Share = option("their magnitude, as a part of the largest", 0.5, section="data")
    labelled_neighbours: Share = option(
        "part of labelled images that are put between two others, as a digit stands in a number", 0.0, section="data"
    )
    strong_convolution: Share = option(
        "part of strong views that a random convolution goes over first", 0.0, section="data"
    )
    standardize: Annotated[Text, one_of(STANDARDIZATIONS)] = option(
        "inputs by the mean and std of the dataset, or of each image (instance statistics)", "dataset", section="data"
    )
    tau: Share = option("confidence threshold, relative to that in labelled images", 0.9, section="training")
    alignment: Annotated[Text, one_of(ALIGNMENTS)] = option(
        "distribution alignment: 'per class', or 'overall', which changes nothing", "per class", section="training"
    )

    share_labels: Flag = option("the two datasets share one label space; AdaMatch needs it", True, section="data")
    contexts: Text = option(
        "origin (of each image); for ssl none, or any of the classifier's other kinds", "origin", section="contexts"
    )
    augment: Texts = option("weak augmentation: flip, crop, rotation, zoom, invert", ("crop",), section="data")
    batch_size: Count = option("labelled images per step, over all processes", 64, section="training")
    epochs: Count = option("passes over the unlabelled images", 10, section="training")
    optimizer: Annotated[Text, one_of(OPTIMIZERS)] = option("rmsprop, sgd, adam or adamw", "adam", section="training")
    learning_rate: Positive = option("highest learning rate", 2e-3, section="training")
    weight_decay: NotNegative = option("weight decay", 5e-4, section="training")
    schedule: Annotated[Text, one_of(SCHEDULES)] = option("constant, cosine or step", "cosine", section="training")
    ema_decay: Fraction | None = option(
        "average the weights with this decay a step, and validate and keep the averages", 0.999, section="training"
    )
    keep_best: Flag = option("end with the weights of the best (labelled) validation epoch", False, section="training")

    def _check_agreement(self) -> None:
        TrainingConfig._check_agreement(self)
        self._check_setting()
        if self.mode == "mn":
            raise ConfigError(
                "mode 'mn' has no forward that leaves its mixture as it is, which AdaMatch needs; use none, bn, dsbn "
                "or a cn mode"
            )
        fixed = {
            "accumulation_steps": (1, "alignment and batch norms take their statistics over the whole step"),
            "mixup": (0.0, "pseudo-labels belong to whole images"),
            "cutmix": (0.0, "pseudo-labels belong to whole images"),
            "label_smoothing": (0.0, "the publication has none"),
            "balance_contexts": (False, "unlabelled_ratio says how many images of each kind a step has"),
            "streaming": (False, "images of both kinds are held in memory"),
            "drop_last": (False, "every step is of full size"),
        }
        for name, (value, reason) in fixed.items():
            if getattr(self, name) != value:
                raise ConfigError(f"{name} must be {value!r} for AdaMatch: {reason}; got {getattr(self, name)!r}")

    def _check_setting(self) -> None:
        if (self.labels_per_class is None) != (self.setting == "uda"):
            needs = "takes no labels_per_class" if self.setting == "uda" else "needs labels_per_class, e.g. 4"
            raise ConfigError(f"setting {self.setting!r} {needs}; got {self.labels_per_class}")
        if self.setting == "ssl":
            datasets, contexts = "one dataset", "contexts none, or of another kind than origin"
        else:
            datasets, contexts = "two datasets, the source and then the target", "contexts origin or origin:NAME,NAME"
        if self.dataset and len(self.dataset) != (1 if self.setting == "ssl" else 2):
            raise ConfigError(f"setting {self.setting!r} takes {datasets}; got {list(self.dataset)}")
        if (self.contexts.split(":")[0] == "origin") == (self.setting == "ssl"):
            raise ConfigError(f"setting {self.setting!r} takes {contexts}; got {self.contexts!r}")
        if not self.share_labels:
            raise ConfigError(
                "source and target must share their classes (share_labels); AdaMatch learns one label space"
            )
