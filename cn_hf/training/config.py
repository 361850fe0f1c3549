"""Everything that decides a training run, in one validated object.

A ``TrainingConfig`` is what a script reads from YAML or the command line, what ``results.json`` stores, and what the
loop in ``supervised.py`` obeys. Defaults are those of the paper's ConvNet experiments (section IV-B): RMSprop with
momentum 0.9, batch 256, learning rate 1e-3, weight decay 1e-4.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from cn_hf.errors import ConfigError, nearest
from cn_hf.files import MOST_YAML, read_bounded
from cn_hf.validation import (
    Count,
    Flag,
    Fraction,
    Natural,
    NotNegative,
    Numbers,
    Options,
    Positive,
    Share,
    Text,
    Texts,
    Wholes,
    one_of,
    validated,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from cn_hf.patching.config import ContextNormConfig

__all__ = ["CALIBRATE", "MIXED_PRECISIONS", "OPTIMIZERS", "PLACEMENTS", "SCHEDULES", "TrainingConfig", "option"]

# Options that a resumed run may be given anew: none of them changes what is learned.
FREE_ON_RESUME = ("output_dir", "progress", "checkpoint_steps", "keep_checkpoints", "trackers", "num_workers")

OPTIMIZERS = ("rmsprop", "sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step")
CALIBRATE = ("auto", "always", "never")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
PLACEMENTS = ("norms", "paper", "input", "embed")


def option(help: str, default: Any = dataclasses.MISSING, *, section: str) -> Any:
    """A config field that carries its one-line help text and the section it is listed under on the command line."""
    return dataclasses.field(default=default, metadata=about(help, section))


def about(help: str, section: str) -> dict[str, str]:
    """The metadata of a config field."""
    return {"help": help, "section": section}


@validated
class TrainingConfig:
    """One training run of an image classifier.

    ``batch_size`` counts the images of one optimizer step over all processes. ``mode="none"`` leaves the network as it
    is. Every option of ``ContextNormConfig`` that has no field of its own goes into ``norm_options``.

    Raises:
        ConfigError: An option is unknown, of the wrong type or out of range. The message names the nearest valid one.
    """

    model: Text = option("timm name, or transformers id or folder", section="network")
    model_args: Options = dataclasses.field(
        default_factory=dict, metadata=about("keyword arguments of the network's factory", "network")
    )
    pretrained: Flag = option("start from the published weights", False, section="network")

    dataset: Texts = option("load_dataset id or folder; several are blended", (), section="data")
    dataset_config: Text | None = option("configuration of the dataset, where it has several", None, section="data")
    train_split: Text = option("split to train on", "train", section="data")
    validation_split: Text | None = option("split to validate on; else a part of train", None, section="data")
    test_split: Text | None = option("split to report on; none for no test", "test", section="data")
    validation_fraction: Fraction = option("part of train kept for validation", 0.1, section="data")
    image_column: Text | None = option("image column; found by its type if not given", None, section="data")
    label_column: Text | None = option("label column; found by its type if not given", None, section="data")
    image_size: Count | None = option(
        "side of the square images the network gets; else as stored", None, section="data"
    )
    decode_size: Count | None = option(
        "side to decode to; else image_size, or as stored where that is smaller", None, section="data"
    )
    max_train_images: Count | None = option("train on the first so many images of a shuffle", None, section="data")
    max_test_images: Count | None = option("test on the first so many images of a shuffle", None, section="data")
    share_labels: Flag = option("blended datasets share one label space", False, section="data")
    skip_corrupt: Flag = option("leave out images that cannot be read, and count them", False, section="data")
    augment: Texts = option("flip, crop, rotation, zoom, invert", (), section="data")
    augment_options: Options = dataclasses.field(
        default_factory=dict, metadata=about("options of AugmentationConfig", "data")
    )
    mixup: NotNegative = option("alpha of mixup; 0: none", 0.0, section="data")
    cutmix: NotNegative = option("alpha of CutMix; 0: none", 0.0, section="data")
    mix_probability: Share = option("part of the image pairs that are mixed", 1.0, section="data")
    mix_switch_probability: Share = option("where both are on, part that is cut-mixed", 0.5, section="data")
    mean: Numbers = option("mean of each channel, white being 1; else measured", (), section="data")
    std: Numbers = option("standard deviation of each channel; else measured", (), section="data")
    drop_last: Flag = option("leave out the last batch of an epoch where it is smaller", False, section="data")
    streaming: Flag = option("read the dataset as a stream, never storing it", False, section="data")
    memory: NotNegative = option("GiB of decoded images to hold; larger splits are read as used", 4.0, section="data")
    num_workers: Natural = option("processes (a stream: threads) that decode images; 0: none", 0, section="data")

    mode: Text = option("none, bn, mn, dsbn, cn, cn-channels or cn-patches", "none", section="contexts")
    where: Texts = option("norms, paper, input, embed or module-name patterns", (), section="contexts")
    contexts: Text = option(
        "where contexts come from: none, column:NAME, origin (of several datasets), clusters:METHOD:K:FEATURES or "
        "brightness",
        "none",
        section="contexts",
    )
    num_contexts: Count | None = option("number of contexts, where the source leaves it open", None, section="contexts")
    balance_contexts: Flag = option("train on every context equally often", False, section="contexts")
    norm_options: Options = dataclasses.field(
        default_factory=dict, metadata=about("further options of ContextNormConfig", "contexts")
    )
    calibrate: Annotated[Text, one_of(CALIBRATE)] = option(
        "start the norms from training images: auto (where a BatchNorm had none), always, never",
        "auto",
        section="contexts",
    )
    calibration_batches: Count = option("training batches used for that", 8, section="contexts")

    epochs: Count = option("passes over the training images", 100, section="training")
    batch_size: Count = option("images per step, over all processes", 256, section="training")
    accumulation_steps: Count = option("parts a step's images go through the network in", 1, section="training")
    optimizer: Annotated[Text, one_of(OPTIMIZERS)] = option(
        "rmsprop, sgd, adam or adamw", "rmsprop", section="training"
    )
    learning_rate: Positive = option("highest learning rate", 1e-3, section="training")
    momentum: Fraction = option("momentum of rmsprop and sgd", 0.9, section="training")
    weight_decay: NotNegative = option("weight decay", 1e-4, section="training")
    decay_context_parameters: Flag = option("decay the parameters CN added, too", False, section="training")
    decay_one_dimensional: Flag = option("decay biases and norm weights, too", True, section="training")
    optimizer_args: Options = dataclasses.field(
        default_factory=dict, metadata=about("further arguments of the torch optimizer", "training")
    )
    schedule: Annotated[Text, one_of(SCHEDULES)] = option("constant, cosine or step", "constant", section="training")
    warmup_epochs: NotNegative = option("epochs of linear warm-up", 0.0, section="training")
    minimum_learning_rate: NotNegative = option("where the cosine ends", 0.0, section="training")
    step_epochs: Wholes = option("epochs after which the step schedule drops", (), section="training")
    step_factor: Positive = option("factor of each drop", 0.1, section="training")
    clip_grad_norm: Positive | None = option("largest norm of the gradient", None, section="training")
    label_smoothing: Fraction = option("label smoothing", 0.0, section="training")
    ema_decay: Fraction | None = option(
        "average the weights with this decay a step, and validate and keep the averages", None, section="training"
    )
    patience: Count | None = option("stop after so many epochs without a better validation", None, section="training")
    keep_best: Flag = option("end with the weights of the best validation epoch", True, section="training")
    mixed_precision: Annotated[Text, one_of(MIXED_PRECISIONS)] | None = option(
        "no, fp16 or bf16; else the launcher's", None, section="training"
    )
    compile: Flag = option("torch.compile the network", False, section="training")
    channels_last: Flag = option("images and convolutions in channels-last layout", False, section="training")
    seed: Natural = option("seed of weights, data order and augmentation", 0, section="training")

    baseline: Flag = option("also train the same network without contexts, for the leak check", False, section="output")
    progress: Flag = option("show a progress bar", True, section="output")
    trackers: Texts = option("tensorboard, wandb, trackio, ... if installed", (), section="output")
    checkpoint_steps: Count | None = option("steps between checkpoints; else one per epoch", None, section="output")
    keep_checkpoints: Count = option("how many of them are kept", 2, section="output")
    output_dir: Text | None = option("folder for checkpoints, results.json and curves", None, section="output")

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a timm name or a transformers id or folder")
        self._check_agreement()
        self.context_norm_config()

    def _check_agreement(self) -> None:
        if any(epoch < 1 for epoch in self.step_epochs) or list(self.step_epochs) != sorted(set(self.step_epochs)):
            raise ConfigError(f"step_epochs must be positive and rising, got {list(self.step_epochs)}")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError(
                f"mean and std need one value per channel each, std positive; got {self.mean}, {self.std}"
            )
        if self.accumulation_steps > self.batch_size:
            raise ConfigError(f"accumulation_steps {self.accumulation_steps} is more than batch_size {self.batch_size}")
        if self.schedule == "step" and not self.step_epochs:
            raise ConfigError("schedule 'step' needs step_epochs, e.g. 60 80")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}: give fewer (--warmup-epochs)"
            )
        if self.minimum_learning_rate > self.learning_rate:
            raise ConfigError(
                f"minimum_learning_rate {self.minimum_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )

    def context_norm_config(
        self, num_contexts: int | None = None, context_names: tuple[str, ...] | None = None
    ) -> ContextNormConfig | None:
        """Return the config that the network is patched with, or None where ``mode`` is "none".

        Args:
            num_contexts: T as the source says; None: this config's ``num_contexts``, else the default.
            context_names: T names.

        Raises:
            ConfigError: An entry of ``norm_options`` is unknown, out of range, or has a field of its own here.
        """
        # Here and not above: it imports torch, which `--help` can do without.
        from cn_hf.patching.config import MODES, ContextNormConfig

        if self.mode not in ("none", *MODES):
            raise ConfigError(f"unknown mode {self.mode!r}; {nearest(self.mode, ('none', *MODES))}")
        for name in ("mode", "where", "num_contexts", "context_names"):
            if name in self.norm_options:
                raise ConfigError(f"norm_options holds {name!r}, which is set by the option or source of its own")
        if self.mode == "none":
            if self.norm_options or self.where:
                raise ConfigError("mode is 'none', so where and norm_options have no effect; give a mode")
            return None
        options: dict[str, Any] = {"mode": self.mode, **self.norm_options}
        if self.where:
            is_keyword = len(self.where) == 1 and self.where[0] in PLACEMENTS
            options["where"] = self.where[0] if is_keyword else self.where
        count = self.num_contexts if num_contexts is None else num_contexts
        if count is not None:
            options["num_contexts"] = count
        return ContextNormConfig.from_dict({**options, "context_names": context_names})

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Options in which a run with ``other`` (from ``to_dict``) would learn something else: name to (other's, own).

        An option that ``other`` does not hold, as one from an older version, counts as its default.
        """
        own, default = self.to_dict(), type(self)(model=self.model).to_dict()
        pairs = {name: (other.get(name, default[name]), value) for name, value in own.items()}
        changed = {name: pair for name, pair in pairs.items() if name not in FREE_ON_RESUME and pair[0] != pair[1]}
        # A folder may have moved; whether its data is the same is for the data's fingerprint to say.
        if "dataset" in changed and [Path(name).name for name in changed["dataset"][0]] == [
            Path(name).name for name in changed["dataset"][1]
        ]:
            del changed["dataset"]
        return changed

    def differences_in_words(self, other: Mapping[str, Any]) -> str:
        """``differences`` as "epochs was 3, is 4; ...", or "" where there are none."""
        return "; ".join(f"{name} was {then!r}, is {now!r}" for name, (then, now) in self.differences(other).items())

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed, validated again."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every option, as JSON types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """The config with these options; the others keep their defaults.

        Raises:
            ConfigError: An unknown option (the nearest valid one is named), or an invalid value.
        """
        return cls(**{str(name): value for name, value in options.items()})

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``to_json``."""
        try:
            options = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a training config must be JSON: {error}") from error
        return cls.from_dict(_mapping(options))

    def to_yaml(self) -> str:
        """YAML text that ``from_yaml`` reads back to an equal config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of ``to_yaml``."""
        return cls.from_dict(read_yaml_options(text))


def read_yaml_options(text: str, *, source: str = "a training config") -> dict[str, Any]:
    """The options that a YAML text gives, not yet validated, so that a command line can override some of them.

    Raises:
        ConfigError: The text is not YAML, or not a mapping of option names to values.
    """
    try:
        options = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    return _mapping({} if options is None else options, source=source)


def read_options_file(path: str | Path) -> dict[str, Any]:
    """The options in a YAML or JSON file (JSON is YAML).

    Raises:
        ConfigError: The file cannot be read, or does not hold a mapping.
    """
    try:
        text = read_bounded(Path(path), MOST_YAML).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error}") from error
    return read_yaml_options(text, source=f"the config file {str(path)!r}")


def _mapping(options: Any, *, source: str = "a training config") -> dict[str, Any]:
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ConfigError(f"{source} must map option names to values, got {type(options).__name__}")
    return options
