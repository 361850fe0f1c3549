"""Everything that decides a Siamese run (paper IV-E): a ``TrainingConfig`` with what pairs add.

Defaults are made for small sets of photographs and a CPU: the paper names neither its ViT's size nor its optimizer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cn_hf.errors import ConfigError
from cn_hf.training.config import CALIBRATE, OPTIMIZERS, SCHEDULES, TrainingConfig, option
from cn_hf.validation import Count, Flag, Fraction, NotNegative, Positive, Text, Texts, one_of, validated

__all__ = ["VIEWS", "SiameseConfig"]

VIEWS = "none"
"""``identity_column`` where nothing says which object an image shows."""

_WITHOUT_MEANING = ("label_column", "mixup", "cutmix", "label_smoothing", "balance_contexts", "streaming", "baseline")


@validated
class SiameseConfig(TrainingConfig):
    """One Siamese run.

    ``batch_size`` counts the pairs of a step, and an epoch has as many pairs as there are images. ``calibrate`` says
    how the norm on the input starts: "always" from the images' own statistics, "never" as identity.

    Raises:
        ConfigError: An option is unknown, of the wrong type or out of range, or has no meaning for pairs.
    """

    model: Text = option("timm name, or transformers id or folder", "test_vit", section="network")
    embedding_dim: Count = option("outputs of the network", 64, section="network")

    identity_column: Text | None = option(
        f"column that says which object an image shows; {VIEWS}: two views of an image are the same object",
        None,
        section="data",
    )
    validation_fraction: Fraction = option("part of train kept for validation", 0.2, section="data")
    image_size: Count | None = option("side of the square images the network gets; else as stored", 128, section="data")
    augment: Texts = option("flip, crop, rotation, zoom, invert", ("flip", "rotation", "zoom"), section="data")

    mode: Text = option("none, bn, mn, dsbn, cn, cn-channels or cn-patches", "cn-channels", section="contexts")
    where: Texts = option("norms, paper, input, embed or module-name patterns", ("input",), section="contexts")
    calibrate: Annotated[Text, one_of(CALIBRATE)] = option(
        "start the norms from training images: auto (where a BatchNorm had none), always, never",
        "always",
        section="contexts",
    )
    calibration_batches: Count = option("training batches used for that", 64, section="contexts")
    source_context: Text = option("context that images are restyled from, and back to", "day", section="contexts")
    target_context: Text = option("context that images are restyled to", "night", section="contexts")

    share_labels: Flag = option("objects of the same name in several datasets are the same", True, section="data")

    margin: Positive = option("distance from which pairs of different objects are left alone", 1.0, section="training")
    epochs: Count = option("passes over the training images", 40, section="training")
    batch_size: Count = option("pairs per step, over all processes", 32, section="training")
    optimizer: Annotated[Text, one_of(OPTIMIZERS)] = option("rmsprop, sgd, adam or adamw", "adamw", section="training")
    learning_rate: Positive = option("highest learning rate", 3e-4, section="training")
    weight_decay: NotNegative = option("weight decay", 0.05, section="training")
    decay_one_dimensional: Flag = option("decay biases and norm weights, too", False, section="training")
    schedule: Annotated[Text, one_of(SCHEDULES)] = option("constant, cosine or step", "cosine", section="training")
    warmup_epochs: NotNegative = option("epochs of linear warm-up", 2.0, section="training")
    clip_grad_norm: Positive | None = option("largest norm of the gradient", 1.0, section="training")

    compare: Flag = option(
        "also train without contexts and with the other start, and report all three", False, section="output"
    )

    def _check_agreement(self) -> None:
        TrainingConfig._check_agreement(self)
        for name in _WITHOUT_MEANING:
            if getattr(self, name) != next(f.default for f in dataclasses.fields(TrainingConfig) if f.name == name):
                hint = "; identity_column says which object an image shows" if name == "label_column" else ""
                raise ConfigError(f"{name} has no meaning for pairs of images{hint}; leave it out")
        if self.source_context == self.target_context:
            raise ConfigError(f"source_context and target_context are both {self.source_context!r}; give two contexts")
        if self.compare and self.mode == "none":
            raise ConfigError("compare sets a network with contexts beside one without, so mode must not be 'none'")
        if self.identity_column == VIEWS and not self.augment and not self.augment_options:
            raise ConfigError("two views of an image need augmentation to differ; give some, e.g. flip, zoom, rotation")

    def as_training_config(self, *, label_column: str | None) -> TrainingConfig:
        """The part that a classifier's run has, too, with this label column: what data is loaded by."""
        names = [field.name for field in dataclasses.fields(TrainingConfig)]
        options = {name: getattr(self, name) for name in names}
        # Photographs differ in size, also where all are small.
        decode_size = self.image_size if self.decode_size is None else self.decode_size
        return TrainingConfig(**{**options, "label_column": label_column, "decode_size": decode_size})

    def networks(self) -> dict[str, SiameseConfig]:
        """The networks to train, by name: one, or with ``compare`` three, whose seed, data and budget are the same."""
        if not self.compare:
            return {_name(self): self}
        plain = self.replace(mode="none", where=(), norm_options={}, compare=False)
        starts = [self.replace(calibrate=start, compare=False) for start in ("never", "always")]
        return {_name(config): config for config in (plain, *starts)}

    def folder_of(self, name: str, folder: Path) -> Path:
        """Return the folder of this network's checkpoints in a run's folder."""
        return folder / "networks" / name.replace(", ", "-").replace(" ", "-") if self.compare else folder


def _name(config: SiameseConfig) -> str:
    if config.mode == "none":
        return "no contexts"
    start = {"always": "calibrated start", "never": "identity start", "auto": "start as fits"}[config.calibrate]
    return f"{config.mode.upper().replace('CHANNELS', 'Channels').replace('PATCHES', 'Patches')}, {start}"
