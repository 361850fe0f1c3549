"""Model cards of the checkpoints that an experiment produced, from the results file of its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.evaluation.report import BASELINE, MASKED
from cn_hf.files import write_whole
from cn_hf.hub.card import run_card

__all__ = ["experiment_cards", "write_cards"]

ORGANISATION = "cn-hf"  # under which the cards name their repositories


def experiment_cards(content: Mapping[str, Any]) -> dict[str, str]:
    """Text of a card for each finished cell that trained a patched network, by name.

    Args:
        content: of an experiment's ``results.json``.

    Raises:
        ConfigError: it is not an experiment's.
    """
    try:
        name = f"{content['experiment']}-{content['budget']}"
        cells = [(cell, values) for cell, values in content["cells"].items() if "slots" in values.get("network", {})]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"these are no results of `cn-hf reproduce`: {error!r}.") from error
    shared = {"is_evidence": content.get("is_evidence", True), "findings": content.get("findings")}
    cards = {}
    for cell, values in cells:
        title = f"{name}-{cell.replace('.', '-')}"
        cards[title] = str(run_card({**_measured(values), **shared}, f"{ORGANISATION}/{title}"))
    return cards


def _measured(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """A cell without the rows that need a baseline network: another cell has it, and the findings compare the two."""
    evaluation = cell.get("evaluation")
    if not evaluation:
        return cell
    rows = [row for row in evaluation["rows"] if row["name"] not in (BASELINE, MASKED) or row["correct"]]
    return {**cell, "evaluation": {**evaluation, "rows": rows}}


def write_cards(results_file: Path, folder: Path) -> list[Path]:
    """Write the cards of an experiment, or the one of a single run's results, ``NAME.md`` each.

    Raises:
        CheckpointError: the results cannot be read, or the folder cannot be written to.
        ConfigError: the file is not an experiment's.
    """
    try:
        content = json.loads(results_file.read_bytes())
        if "networks" in content:
            name = f"{results_file.parent.parent.name}-{results_file.parent.name}"
            cards = {name: str(run_card(content, f"{ORGANISATION}/{name}"))}
        else:
            cards = experiment_cards(content)
        return [write_whole(folder / f"{name}.md", text.encode()) for name, text in cards.items()]
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cards of {results_file} in {folder}: {error}") from error
