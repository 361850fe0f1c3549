"""Where: which slots of a model are meant by a mode and a ``where``.

Finding never changes a model. timm and transformers are met by the structure of their modules: timm's ``first_conv``
and ``patch_embed``, transformers' ``...PatchEmbeddings``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from cn_hf.errors import PatchError, nearest
from cn_hf.patching.config import BASELINES, ContextNormConfig
from cn_hf.patching.convert import MIXING, NORMS, REFUSED, NormEntry, qualified_name
from cn_hf.patching.swapped import own_class

__all__ = ["Target", "find_new_norms", "find_targets", "first_layers", "fitting_mode"]

NORM_BASES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
KEYWORDS = ("norms", "paper", "input", "embed")
FEATURE_DIMS = {"cn-patches": (-1,), "cn-channels": (1,), "cn": (1, -1), "bn": (1, -1), "mn": (1, -1), "dsbn": (1, -1)}
BATCH_NORMS = (*BASELINES, "dsbn")  # modes whose norm slots are batch norms


@dataclass(frozen=True, slots=True)
class Target:
    """One slot-to-be: a module, what part of it is meant, and along which axis its features lie."""

    name: str
    module: nn.Module
    role: str  # "norm", "input" or "output"
    num_features: int
    feature_dim: int
    near_sequence_first: bool = False  # attention below the module's parent takes (L, N, C)


def find_targets(model: nn.Module, config: ContextNormConfig) -> list[Target]:
    """The slots that ``config`` means, in the order of ``named_modules``.

    Args:
        model: any module.
        config: its ``mode`` and ``where`` are used.

    Returns:
        At least one target.

    Raises:
        PatchError: nothing matches, a pattern matches nothing, a named module cannot be swapped, or one is lazy.
    """
    _check_initialized(model, config)
    where = config.where
    if where is None:
        where = "paper" if config.mode in BASELINES or not _norms(model, config.mode) else "norms"
    if not isinstance(where, str):
        return _by_pattern(model, config.mode, where)
    if where not in KEYWORDS:
        return _by_pattern(model, config.mode, (where,))
    if where == "paper":
        where = {
            "cn-patches": "embed",
            "cn-channels": "input",
            "bn": "input",
            "cn": "both",
            "mn": "third",
            "dsbn": "norms",
        }[config.mode]
    if where == "third":
        return _third_batch_norm(model)
    if where == "both":
        return [*_input(model, config.mode), *_embed(model, config.mode)]
    if where == "norms":
        return _all_norms(model, config.mode)
    return _input(model, config.mode) if where == "input" else _embed(model, config.mode)


def fitting_mode(model: nn.Module) -> str:
    """Return the cn mode of the norms that a model has.

    ``"cn-channels"`` for norms of maps and norms with stored statistics, ``"cn-patches"`` for norms of tokens, ``"cn"``
    where there are both. A model without norms gets ``"cn-patches"``, or ``"cn-channels"`` if it has no patch
    embedding.
    """
    axes = {target.feature_dim for target in _norms(model, "cn")}
    if len(axes) == 2:
        return "cn"
    if axes:
        return "cn-channels" if 1 in axes else "cn-patches"
    try:
        _embed(model, "cn-patches")
    except PatchError:
        return "cn-channels"
    return "cn-patches"


def find_new_norms(model: nn.Module, config: ContextNormConfig, known: Collection[nn.Module]) -> list[Target]:
    """The norms that ``config`` means among the modules of a patched model that are not ``known``."""
    targets = [target for target in _norms(model, config.mode) if target.module not in known]
    where = (config.where,) if isinstance(config.where, str) else config.where
    if where is None or where == ("norms",):
        return targets
    return [target for target in targets if any(_matches(target.name, pattern) for pattern in where)]


def _check_initialized(model: nn.Module, config: ContextNormConfig) -> None:
    """Raise for lazy modules, but for norms that are left out with a warning, or refused by name, further on."""
    for name, module in model.named_modules():
        if not isinstance(module, LazyModuleMixin) or not module.has_uninitialized_params():  # type: ignore[misc]
            continue
        if qualified_name(type(module)) in REFUSED and (config.where is not None or _norms(model, config.mode)):
            continue
        raise PatchError(
            f"Expected a model whose shapes are known, received one in which {name or 'the model'} "
            f"({type(module).__name__}) is lazy. Run the model once on a batch, then patch it."
        )


# --------------------------------------------------------------------------------------------------------------- norms


def _entry(module: nn.Module) -> NormEntry | None:
    return NORMS.get(qualified_name(own_class(module)))


def _norms(model: nn.Module, mode: str) -> list[Target]:
    """Norms of the mode's kind; dsbn and the baselines mean batch norms only."""
    targets = []
    sequence_first = _near_sequence_first(model)
    inside = refused_inside(model)
    for name, module in model.named_modules():
        entry = _entry(module)
        if entry is None or entry.axis(module) not in FEATURE_DIMS[mode] or id(module) in inside:
            continue
        if mode in BATCH_NORMS and entry.standardize is not None:
            continue
        if entry.refusal(module) is None:
            near = name.rpartition(".")[0] in sequence_first
            targets.append(Target(name, module, "norm", entry.num_features(module), entry.axis(module), near))
    return targets


def refused_inside(model: nn.Module) -> dict[int, str]:
    """Modules, by ``id``, below one whose norms cannot be swapped: its class and the reason."""
    inside: dict[int, str] = {}
    for module in model.modules():
        key = qualified_name(own_class(module))
        if key in REFUSED or key in MIXING:
            reason = f"inside {type(module).__name__}, {MIXING.get(key) or REFUSED[key]}"
            inside |= {id(part): reason for part in module.modules() if part is not module}
    return inside


def _near_sequence_first(model: nn.Module) -> set[str]:
    """Names of all modules that hold, somewhere below, attention with ``batch_first=False``."""
    near = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            parts = name.split(".")
            near |= {".".join(parts[:depth]) for depth in range(len(parts))}
    return near


def _all_norms(model: nn.Module, mode: str) -> list[Target]:
    targets = _norms(model, mode)
    left_out = _left_out(model, mode)
    words = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in left_out[:5])
    if len(left_out) > 5:
        words += f"; and {len(left_out) - 5} more"
    if not targets:
        kinds = {1: "maps (NCHW)", -1: "tokens (features last)"}
        kind = "batch norms" if mode in BATCH_NORMS else " or ".join(kinds[dim] for dim in FEATURE_DIMS[mode])
        other = {"cn-patches": "cn-channels", "cn-channels": "cn-patches"}.get(mode, mode)
        advice = f" Its norms are those of mode={other!r}." if other != mode and _norms(model, other) else ""
        raise PatchError(
            f"{type(model).__name__} has no norm layer that mode={mode!r} can swap ({kind}).{advice} "
            f"{words or _inventory(model)}"
        )
    if left_out:
        warnings.warn(f"Norm layers left as they are: {words}.", UserWarning, stacklevel=4)
    return targets


def _left_out(model: nn.Module, mode: str) -> list[tuple[str, str]]:
    left_out = []
    inside = refused_inside(model)
    for name, module in model.named_modules():
        key, entry = qualified_name(own_class(module)), _entry(module)
        if key in REFUSED:
            left_out.append((name, f"{type(module).__name__}, {REFUSED[key]}"))
        elif entry is not None and entry.axis(module) in FEATURE_DIMS[mode]:
            reason = inside.get(id(module)) or entry.refusal(module)
            if reason is not None:
                left_out.append((name, f"{type(module).__name__}, {reason}"))
        elif entry is None and is_norm_like(module):
            left_out.append((name, f"{key} is not a norm class cn_hf knows"))
    return left_out


def is_norm_like(module: nn.Module) -> bool:
    """True if a module looks like a norm layer: torch's bases, or a name with "norm" over no layer of its own."""
    if isinstance(module, NORM_BASES):
        return True
    own = not any(True for child in module.children() for _ in child.parameters())
    return "norm" in type(module).__name__.lower() and own and not isinstance(module, (nn.Identity, nn.ModuleList))


def _inventory(model: nn.Module) -> str:
    found = sorted({type(m).__name__ for m in model.modules() if _entry(m) is not None})
    return f"Its norm layers: {', '.join(found)}." if found else "It has no norm layer at all."


def _by_pattern(model: nn.Module, mode: str, patterns: Sequence[str]) -> list[Target]:
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = refused_inside(model)
    meant: dict[int, tuple[str, nn.Module]] = {}
    for pattern in patterns:
        names = [name for name in modules if name and _matches(name, pattern)]
        norms = [name for name in names if _entry(modules[name]) is not None]
        if not names:
            hint = nearest(pattern, [name for name, module in modules.items() if _entry(module) is not None][:50])
            raise PatchError(
                f"where={pattern!r} is no keyword ({', '.join(KEYWORDS)}) and matches no module of "
                f"{type(model).__name__} by full name, suffix or regular expression; {hint}"
            )
        if not norms:
            raise PatchError(f"where={pattern!r} matches {_describe(modules, names)}, no norm layer cn_hf can swap.")
        for name in norms:
            if id(modules[name]) in inside:
                raise PatchError(f"where={pattern!r} matches {name}, {inside[id(modules[name])]}.")
            meant.setdefault(id(modules[name]), (name, modules[name]))
    order = {id(module): index for index, module in enumerate(model.modules())}
    sequence_first = _near_sequence_first(model)
    return [_named_norm(*meant[key], mode, sequence_first) for key in sorted(meant, key=order.__getitem__)]


def _describe(modules: dict[str, nn.Module], names: list[str]) -> str:
    name = names[0]
    key = qualified_name(own_class(modules[name]))
    reason = f" ({REFUSED[key]})" if key in REFUSED else ""
    return f"{name}, a {type(modules[name]).__name__}{reason}"


def _matches(name: str, pattern: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _named_norm(name: str, module: nn.Module, mode: str, sequence_first: Collection[str] = ()) -> Target:
    entry = NORMS[qualified_name(own_class(module))]
    reason = entry.refusal(module)
    if reason is not None:
        raise PatchError(f"{name} ({type(module).__name__}) cannot be swapped: {reason}.")
    axis = entry.axis(module)
    if axis not in FEATURE_DIMS[mode]:
        other = "cn-channels" if axis == 1 else "cn-patches"
        raise PatchError(
            f"{name} ({type(module).__name__}) has its features along axis {axis}, which mode={mode!r} "
            f"does not mean; use mode={other!r} or mode='cn'."
        )
    near = name.rpartition(".")[0] in sequence_first
    return Target(name, module, "norm", entry.num_features(module), axis, near)


def _third_batch_norm(model: nn.Module) -> list[Target]:
    names = dict(model.named_children())
    norm = names.get("bn3")
    is_convnet = {"conv3", "bn1", "bn2", "bn4"} <= names.keys()
    entry = None if norm is None else _entry(norm)
    if norm is None or entry is None or entry.standardize is not None or not is_convnet:
        raise PatchError(
            f"mode='mn' at where='paper' means the third batch norm of the CIFAR ConvNet; {type(model).__name__} is "
            "another model: name the slots, e.g. where=['layer1.0.bn1'], or take all batch norms, where='norms'."
        )
    return [_named_norm("bn3", norm, "mn")]


# ------------------------------------------------------------------------------------------------ inputs and embeddings


def _input(model: nn.Module, mode: str) -> list[Target]:
    if mode == "cn-patches":
        raise PatchError(
            "where='input' normalises the channels of images: use mode='cn-channels' (or where='embed' for patches)."
        )
    found = first_layers(model)
    if found and not isinstance(found[0][1], LAYERS):
        kind = "an embedding of ids" if isinstance(found[0][1], nn.Embedding) else "attention"
        raise PatchError(f"The input of {type(model).__name__} goes into {kind} ({found[0][0]}); name norm layers.")
    if not found:
        raise PatchError(f"{type(model).__name__} has no convolution or linear layer that could receive an input.")
    return [_input_target(name, module) for name, module in found]


def first_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers that first receive the image, as timm's configuration gives them; else the first.

    They are convolutions and linear layers; without such a configuration, also attention or an embedding of ids.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    named = (_first_layer(modules.get(name)) for name in _first_names(model))
    found = [module for module in named if module is not None]
    if not found:
        layers = (nn.MultiheadAttention, nn.Embedding, *LAYERS)
        found += [module for module in modules.values() if isinstance(module, layers)][:1]
    return [(names[id(module)], module) for module in found]


def _first_names(model: nn.Module) -> list[str]:
    """Names of the modules that receive the image, as timm's configs give them."""
    for prefix, module in model.named_modules():
        config = getattr(module, "pretrained_cfg", None)
        first = config.get("first_conv") if isinstance(config, dict) else None
        if first:
            names = [first] if isinstance(first, str) else list(first)
            return [f"{prefix}.{name}" if prefix else name for name in names]
    return []


def _first_layer(module: nn.Module | None) -> nn.Module | None:
    return None if module is None else next((m for m in module.modules() if isinstance(m, LAYERS)), None)


def _input_target(name: str, module: nn.Module) -> Target:
    if isinstance(module, nn.Linear):
        return Target(name, module, "input", module.in_features, -1)
    return Target(name, module, "input", int(module.in_channels), 1)  # type: ignore[arg-type]  # a convolution's int


def _embed(model: nn.Module, mode: str) -> list[Target]:
    if mode == "cn-channels":
        raise PatchError(
            "where='embed' normalises patch tokens: use mode='cn-patches' (or where='input' for channels)."
        )
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last == "patch_embed" or type(module).__name__.endswith(("PatchEmbed", "PatchEmbeddings")):
            projection = next((m for m in (getattr(module, a, None) for a in ("proj", "projection")) if m), None)
            if isinstance(projection, (nn.Conv2d, nn.Linear)):
                return [_embed_target(name, module, projection)]
    raise PatchError(
        f"{type(model).__name__} has no patch embedding with a projection that cn_hf knows; use where='norms' (with "
        "mode='cn-channels' for a convolutional network), or name norm layers."
    )


def _embed_target(name: str, module: nn.Module, projection: nn.Conv2d | nn.Linear) -> Target:
    features = projection.out_features if isinstance(projection, nn.Linear) else projection.out_channels
    layout = getattr(getattr(module, "output_fmt", None), "value", "NHWC")
    maps = not getattr(module, "flatten", True) and layout == "NCHW"
    return Target(name, module, "output", features, 1 if maps else -1)
