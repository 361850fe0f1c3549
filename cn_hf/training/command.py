"""The command line of a training script: one option for every field of its config, and ``--config FILE``.

The options come from the dataclass itself, so that no field can lack one. What is given on the command line overrides
the file. ``--resume``, ``--overwrite`` and ``--dry-run`` say what to do with the config, and are no part of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cn_hf.errors import ConfigError
from cn_hf.training.config import TrainingConfig, read_options_file

__all__ = ["config_command", "training_app"]


FLAGS = {
    "resume": "Go on with the run in the output folder from its last checkpoint; start it if there is none.",
    "overwrite": "Remove the run that the output folder holds, and start.",
    "dry_run": "Train nothing: print config, contexts and slots, and draw the first batch.",
}


def training_app(
    run: Callable[..., object], *, help: str, config_class: type[TrainingConfig] = TrainingConfig
) -> typer.Typer:
    """A command-line program that reads a config of this class and calls ``run`` with it and all of ``FLAGS``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=help)(config_command(run, config_class))
    return app


def config_command(
    run: Callable[..., object], config_class: type[TrainingConfig] = TrainingConfig
) -> Callable[..., None]:
    """``run(config, **flags)`` as a function with one keyword per config field and flag, in the form typer reads."""
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    mappings = {field.name for field in fields if typing.get_origin(hints[field.name]) is dict}

    def command(config: Path | None, **given: Any) -> None:
        flags = {name: given.pop(name) for name in FLAGS}
        options = {} if config is None else read_options_file(config)
        for name, value in given.items():
            # typer gives an empty list for a repeatable option that was not given
            if value is None or value == []:
                continue
            options[name] = {**options.get(name, {}), **_read_pairs(name, value)} if name in mappings else value
        checked = config_class.from_dict(options)
        from cn_hf.training.memory import keep_freed_memory  # heavy: only once the options are known to be right

        keep_freed_memory()
        run(checked, **flags)

    file_option = typer.Option("--config", help="YAML or JSON file of options; the command line overrides it.")
    annotations: dict[str, Any] = {"config": Annotated[Path | None, file_option]}
    annotations |= {
        name: Annotated[bool, typer.Option("--" + name.replace("_", "-"), help=text)] for name, text in FLAGS.items()
    }
    annotations |= {field.name: _annotation(field, hints[field.name]) for field in fields}
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False if name in FLAGS else None, annotation=annotation
        )
        for name, annotation in annotations.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it from there
    command.__annotations__ = annotations
    return command


def _annotation(field: dataclasses.Field[Any], hint: Any) -> Any:
    """The typer annotation of a field; every option may be absent, so that a file's value can stand."""
    flag = "--" + field.name.replace("_", "-")
    if isinstance(hint, types.UnionType):
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    kind = typing.get_origin(hint) or hint
    names, metavar = [flag], None
    if kind is bool:
        names = [f"{flag}/--no-{flag[2:]}"]
    elif kind is tuple:
        hint = list[typing.get_args(hint)[0]]  # type: ignore[misc]  # built from the field's own item type
    elif kind is dict:
        hint, metavar = list[str], "NAME=VALUE"
    return Annotated[
        hint | None,
        typer.Option(
            *names,
            help=field.metadata["help"] + (" (repeatable)" if kind in (tuple, dict) else ""),
            rich_help_panel=field.metadata["section"],
            show_default=_shown_default(field),
            metavar=metavar,
        ),
    ]


def _shown_default(field: dataclasses.Field[Any]) -> str | bool:
    default = field.default
    if default is dataclasses.MISSING or default is None or default == ():
        return False
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _read_pairs(name: str, pairs: list[str]) -> dict[str, Any]:
    """``["affine=true", "eps=0.001"]`` as a mapping; values are read as YAML."""
    values = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--{name.replace('_', '-')} takes NAME=VALUE, got {pair!r}")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name.replace('_', '-')} {pair!r}: the value is not YAML: {error}") from error
    return values
