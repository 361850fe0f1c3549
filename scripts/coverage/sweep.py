"""The models that patching works for: every model of timm and vision models of transformers, swept and tabulated.

Two depths. *Structure*: every name of timm is built on the meta device, patched in each mode, and its slots are counted
against its norm layers. *Real tensors*: the smallest model of each module, of each architecture and set of norm classes
in it, and all of timm's ``test_*`` models, are checked by ``PatchingCheck`` at the smallest image size they accept; so
are small transformers models made from configurations.

A sweep appends one JSON line a model, so that an interrupted one goes on.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from cn_hf.errors import CnHfError, ConfigError, PatchError, nearest
from cn_hf.patching import patch_model, patch_report, unpatch_model
from cn_hf.patching.convert import NORMS, REFUSED, qualified_name
from cn_hf.patching.placement import is_norm_like, refused_inside
from scripts.coverage.properties import PatchingCheck, settle_parameters

__all__ = ["BATCH_SIZE", "Rows", "build_timm", "check_model", "chosen_timm_models", "structure_of_timm", "sweep"]

NORM_MODES = ("cn-patches", "cn-channels", "cn", "dsbn")
IMAGE_SIZES = (64, 96, 128, 160, 192, 224, 256)
BATCH_SIZE = 3
LARGE = 30_000_000
"""Models with more parameters are run only where nothing smaller is in their module."""

SHALLOW: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 3},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 3},
    "naflexvit_base_patch16_parfac_gap": {"depth": 3},
    "qwen3_vit_88m": {"depth": 3},
    "samvit_base_patch16_224": {"depth": 3},
}
"""Models of modules that have only large ones: their blocks repeat, so fewer show the same."""

DOES_NOT_RUN = (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError, TypeError)
"""What models raise at an image size they do not take."""


# ----------------------------------------------------------------------------------------------------- a file of rows


class Rows:
    """JSON lines, one a model, appended as they come; rows of other library versions and failures are made again.

    Args:
        path: of the file; made with its folders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.versions = {name: metadata.version(name) for name in ("timm", "transformers", "torch")}
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):  # killed within a line
            path.write_text(f"{text}\n")
        for line in text.splitlines():
            row = _parsed(line)
            if row.get("versions") == self.versions:
                self.rows[row["key"]] = row

    def has(self, key: str) -> bool:
        """True if a row without failures is there."""
        return key in self.rows and not self.rows[key].get("failures")

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self.rows[key] = {"key": key, "versions": self.versions, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the last line of a sweep that was killed
        return {}
    return row if isinstance(row, dict) else {}


# ------------------------------------------------------------------------------------------------------------ structure


def structure_of_timm(name: str) -> dict[str, Any]:
    """Patch one timm model on the meta device in each mode and count.

    Args:
        name: a name of ``timm.list_models()``.

    Returns:
        ``module``, ``architecture`` (the class), ``parameters``, ``norms`` (class -> count), ``refused`` (class
        and reason -> count, of norm layers that are left as they are), ``slots`` (mode -> count), ``input`` and
        ``failures``.
    """
    import timm

    try:
        with torch.device("meta"), _NoInitialization():
            model = timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # early versions of timm read values while they build
        model = timm.create_model(name)
    return {
        "kind": "structure",
        "library": "timm",
        "name": name,
        "module": timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1],
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_structure(model),
    }


class _NoInitialization(TorchFunctionMode):
    """Leaves out operations that fill tensors in place: on the meta device they only cost time."""

    FILLING = ("uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fills = getattr(func, "__name__", "") in self.FILLING
        if fills and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _structure(model: nn.Module, takes_images: bool = True) -> dict[str, Any]:
    norms: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failures = []
    inside = refused_inside(model)
    for module in model.modules():
        if is_norm_like(module):
            key = qualified_name(type(module))
            norms[key] += 1
            reason = inside.get(id(module)) or REFUSED.get(key) or (key in NORMS and NORMS[key].refusal(module))
            if reason:
                refused[f"{key}: {reason}"] += 1
            elif key not in NORMS:
                failures.append(f"{key} is in no table")
    slots = {mode: _count_slots(model, mode, "norms") for mode in NORM_MODES}
    expected = sum(norms.values()) - sum(refused.values())
    if slots["cn"] != expected or slots["cn-patches"] + slots["cn-channels"] != expected:
        failures.append(f"{expected} norm layers, but slots {slots}")
    at_input = _count_slots(model, "cn-channels", "input")
    if at_input == 0 and takes_images:
        failures.append("no slot at the input")
    return {
        "norms": dict(norms),
        "refused": dict(refused),
        "slots": slots,
        "input": at_input,
        "failures": sorted(set(failures)),
    }


def _count_slots(model: nn.Module, mode: str, where: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norm layers left as they are: counted here
        try:
            count = len(patch_report(patch_model(model, mode, where=where)))
        except PatchError:
            return 0
    unpatch_model(model)
    return count


def chosen_timm_models(structures: Iterable[Mapping[str, Any]]) -> list[str]:
    """The models to check on real tensors, by their structures: see the module's first lines; smallest first."""
    smallest: dict[Any, Mapping[str, Any]] = {}
    chosen = set()
    for row in structures:
        if row["name"].startswith("test_"):
            chosen.add(row["name"])
        keys: list[Any] = [row["module"]]
        if row["parameters"] <= LARGE:
            keys.append((row["module"], row["architecture"], *sorted(row["norms"])))
        for key in keys:
            if key not in smallest or row["parameters"] < smallest[key]["parameters"]:
                smallest[key] = row
    sizes = {row["name"]: row["parameters"] for row in structures}
    return sorted(chosen | {row["name"] for row in smallest.values()}, key=sizes.__getitem__)


# --------------------------------------------------------------------------------------------------------- real tensors


def build_timm(name: str) -> tuple[nn.Module, Tensor]:
    """A timm model with random weights, and a batch of images of the smallest size it takes.

    Raises:
        ConfigError: it takes none of ``IMAGE_SIZES`` nor its own.
    """
    import timm

    options = SHALLOW.get(name, {})
    torch.manual_seed(0)
    plain = timm.create_model(name, **options).eval()
    channels, *_, own = plain.pretrained_cfg["input_size"]
    takes_size = True
    for size in dict.fromkeys((*IMAGE_SIZES, own)):
        images = torch.randn(BATCH_SIZE, channels, size, size, generator=torch.Generator().manual_seed(1))
        model = plain
        if takes_size and size != own:
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, img_size=size, **options).eval()
            except TypeError:  # the architecture has no such argument
                takes_size = False
            except DOES_NOT_RUN:
                continue
        try:
            with torch.no_grad():
                output = model(images)
        except DOES_NOT_RUN:
            continue
        if len(output) == BATCH_SIZE:
            return model, images
    raise ConfigError(f"{name} runs at none of the image sizes {IMAGE_SIZES} nor at its own, {own}.")


def check_model(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """Check a model in every applicable mode at ``"norms"``, and at ``"input"``.

    ``"cn"`` is left out where the norms are of one kind: it means the same slots then.

    Returns:
        ``checks``: fields of ``PatchingResult``, one a mode; ``failures``, in words.
    """
    start = time.perf_counter()
    slots = {mode: _count_slots(model, mode, "norms") for mode in NORM_MODES}
    ways = [(mode, "norms") for mode in NORM_MODES if slots[mode]]
    if not slots["cn-patches"] or not slots["cn-channels"]:
        ways = [way for way in ways if way[0] != "cn"]
    if _first(inputs).is_floating_point():
        ways.append(("cn-channels", "input"))
    checks, failures = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norm layers left as they are: named by the structure
        check = PatchingCheck(settle_parameters(model, inputs), inputs)
        for mode, where in ways:
            try:
                result = check(mode, where)
            except CnHfError as error:
                failures.append(f"{mode} at {where}: {error}")
                continue
            checks.append(asdict(result))
            failures += [f"{mode} at {where}: {words}" for words in result.failures]
    return {"checks": checks, "failures": failures, "seconds": round(time.perf_counter() - start, 1)}


def _first(inputs: Mapping[str, Any] | Tensor) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else next(v for v in inputs.values() if isinstance(v, Tensor))


def _real_timm(name: str, module: str) -> dict[str, Any]:
    row = {"kind": "real", "library": "timm", "name": name, "module": module, "changed": SHALLOW.get(name, {})}
    try:
        model, images = build_timm(name)
        return {**row, "size": images.shape[-1], **check_model(model, images)}
    except (CnHfError, *DOES_NOT_RUN) as error:
        return {**row, "checks": [], "failures": [f"{type(error).__name__}: {error}"[:500]]}


def _real_transformers(name: str) -> dict[str, Any]:
    from scripts.coverage.transformers_models import TRANSFORMERS

    row = {"kind": "real", "library": "transformers", "name": name, "module": name}
    try:
        model, inputs = TRANSFORMERS[name]()
        structure = _structure(model, _first(inputs).is_floating_point())
        result = check_model(model, inputs)
    except (CnHfError, *DOES_NOT_RUN) as error:
        return {**row, "checks": [], "failures": [f"{type(error).__name__}: {error}"[:500]]}
    failures = [*structure["failures"], *result["failures"]]
    size = _first(inputs).shape[-1]
    return {**row, "architecture": type(model).__name__, "size": size, **structure, **result, "failures": failures}


# ------------------------------------------------------------------------------------------------------------ the sweep


def sweep(rows: Rows, names: Iterable[str] = ()) -> Iterator[str]:
    """Fill ``rows`` with what they lack, model by model.

    Args:
        rows: where results go.
        names: check these timm and transformers models alone; all if empty.

    Yields:
        The key of each row made.

    Raises:
        ConfigError: an unknown name.
    """
    import timm

    from scripts.coverage.transformers_models import TRANSFORMERS

    known = [name for name in timm.list_models() if not name.startswith("cn_")]  # cn_hf registers its own
    wanted = list(names)
    for name in wanted:
        if name not in TRANSFORMERS and name not in known:
            raise ConfigError(f"There is no model {name!r} in the sweep; {nearest(name, [*known, *TRANSFORMERS])}")
    meant = [name for name in known if not wanted or name in wanted]
    for name in tqdm(meant, desc="structure", disable=None):
        if not rows.has(f"structure/{name}"):
            rows.add(f"structure/{name}", structure_of_timm(name))
            yield f"structure/{name}"
    structures = {name: rows.rows[f"structure/{name}"] for name in meant}
    for name in tqdm(wanted or TRANSFORMERS, desc="transformers", disable=None):
        if name in TRANSFORMERS and not rows.has(f"transformers/{name}"):
            rows.add(f"transformers/{name}", _real_transformers(name))
            yield f"transformers/{name}"
    chosen = meant if wanted else chosen_timm_models(structures.values())
    for name in tqdm(chosen, desc="real tensors", disable=None):
        if not rows.has(f"timm/{name}"):
            rows.add(f"timm/{name}", _real_timm(name, structures[name]["module"]))
            yield f"timm/{name}"
