"""Model cards, all from one template: what a checkpoint is, how it is used, and what a results file says of it.

Every figure of a card is read from ``results.json``; a card of a model without one has no figures. The metadata follow
the Hub's ``model-index``, so that its pages show the table with the honest rows, not the flattering one alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from cn_hf.errors import ConfigError
from cn_hf.hub.base_model import describe_base
from cn_hf.hub.base_weights import base_origin
from cn_hf.hub.preprocessing import input_size_of
from cn_hf.patching import context_parameters, patch_report
from cn_hf.patching.config import BASELINES
from cn_hf.patching.routing import router_of
from cn_hf.printing import as_code, for_markdown, for_terminal

__all__ = ["checkpoint_card", "context_counts", "run_card"]

PAPER = "https://hal.science/hal-04456071"
MODES = {
    "cn-patches": "CN-Patches: the features of tokens are normalised",
    "cn-channels": "CN-Channels: the channels of maps are normalised",
    "cn": "CN-Patches and CN-Channels: features of tokens and channels of maps are normalised",
    "dsbn": "the rival DSBN: a batch normalization for each context",
    "bn": "the baseline BN: batch normalization",
    "mn": "the baseline MN: mixture normalization",
}
MANY = 20  # contexts named one by one

CITATION = """\
```bibtex
@inproceedings{faye2023context,
  title = {Context Normalization Layer with Applications},
  author = {Faye, Bilal and Azzag, Hanane and Lebbah, Mustapha and Dilmi, Mohamed-Djallel and Bouchaffra, Djamel},
  booktitle = {IEEE International Conference on Data Mining Workshops (ICDMW)},
  year = {2023}
}
```"""


def checkpoint_card(model: nn.Module, repo_id: str, *, norms_only: bool = False) -> ModelCard:
    """The card of a patched model of which nothing was measured.

    Args:
        model: a patched model.
        repo_id: where the checkpoint will be.
        norms_only: the checkpoint holds the context parameters alone.

    Raises:
        PatchError: the model is not patched.
    """
    config = router_of(model).config
    base = describe_base(model)
    added = sum(p.numel() for p in context_parameters(model))
    facts = [
        f"- network: `{base['architecture']}` ({base['library']}), {_count(p.numel() for p in model.parameters())} "
        f"parameters, {added:,} of them added",
        f"- {MODES[config.mode]}, in {_slots(len(patch_report(model)))} of the network",
    ]
    if norms_only:
        facts.append("- The checkpoint holds the added parameters alone; they are applied to a copy of the base model.")
    origin = base_origin(model).get("id") if norms_only or base["library"] == "transformers" else None
    data = _metadata(repo_id, library=base["library"], base_model=origin)
    names = config.context_names
    body = [*facts, *_contexts(config.mode, names, config.num_contexts, None)]
    sections = {
        "Model": body,
        "Use": _use(repo_id, config.mode, names, input_size_of(model), needs_base=norms_only and origin is None),
        "Limits": _LIMITS,
    }
    return _card(data, repo_id, sections)


def run_card(results: Mapping[str, Any], repo_id: str) -> ModelCard:
    """The card of a trained checkpoint, from what its run wrote down.

    Args:
        results: content of a run's ``results.json``, or one cell of an experiment's with the experiment's
            ``is_evidence`` and ``findings``.
        repo_id: where the checkpoint will be.

    Raises:
        ConfigError: the results lack what a card tells, or are those of a network without contexts.
    """
    try:
        verifies = "networks" in results  # of a Siamese run: the checkpoint is its last network
        if verifies:
            name, last = list(results["networks"].items())[-1]
            results = {**results, "network": last["network"], "history": {name: last["history"]}}
        config, data, network = results["config"], results["data"], results["network"]
        if config["mode"] not in MODES:
            raise ConfigError("the run trained a network without contexts: there is no context-normalized checkpoint.")
        names = data.get("context_names")
        sections = {
            "Model": [
                f"- network: {as_code(config['model'])}, {network['parameters']:,} parameters, "
                f"{network['context_parameters']:,} of them added",
                f"- {MODES[config['mode']]}, in {_slots(len(network['slots']))} of the network "
                f"({_listed([slot['name'] for slot in network['slots']], 3)})",
                *_contexts(config["mode"], names, _count_of(results), config.get("contexts")),
            ],
            "Use": _use(repo_id, config["mode"], names, data["input_size"], needs_base=False, verifies=verifies),
            "Data": _data(config, data),
            "Training": _training(results),
            "Results": _verification(results, last) if verifies else _results(results),
            "Limits": _VERIFICATION_LIMITS if verifies else [*_limits_of(results), *_LIMITS],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"these results lack what a card tells: {error!r}. was the file written by cn_hf?") from error
    library = "transformers" if "/" in str(config["model"]) and ":" not in str(config["model"]) else "timm"
    metadata = _metadata(
        repo_id,
        library=library,
        datasets=_hub_ids(config["dataset"]),
        evaluation=_index(results),
        base_model=None,
        task="image-feature-extraction" if verifies else "image-classification",
    )
    return _card(metadata, repo_id, sections)


# ------------------------------------------------------------------------------------------------------------ sections


_LIMITS = [
    "- Made for classifying images like those it was trained on; nothing else was looked at, fairness included.",
    "- A context given at test time is information. Where it depends on the label, compare with the masked baseline, "
    "which is told the same contexts, not with the baseline.",
]

_VERIFICATION_LIMITS = [
    "- Made for telling whether two images like those it was trained on show the same object; nothing else was looked "
    "at, fairness included.",
]


def _verification(results: Mapping[str, Any], network: Mapping[str, Any]) -> list[str]:
    """Held-out pairs, and what restyling does to the statistics of held-out images."""
    lines = [
        f"Pairs of the {results['held_out_split']} split; the threshold was chosen on validation pairs; ± is the "
        "binomial standard error.",
        "",
        "| pairs | accuracy, % | ROC AUC, % | n |",
        "|---|--:|--:|--:|",
    ]
    for group, found in network["held_out"].items():
        accuracy, n = found["correct"] / found["pairs"], found["pairs"]
        error = 100 * found["accuracy_error"]
        area = "–" if found["roc_auc"] is None else f"{100 * found['roc_auc']:.2f}"
        lines.append(f"| {for_markdown(group)} | {100 * accuracy:.2f} ± {error:.2f} | {area} | {n:,} |")
    lines.append("")
    for shift in network["restyling"]:
        before, after = shift["distance_before"], shift["distance_after"]
        source, target = for_markdown(shift["source"]), for_markdown(shift["target"])
        lines.append(
            f"- {source} restyled as {target}: the channels' means are {after[0]:.1f} of 255 levels "
            f"from real {target} images' ({before[0]:.1f} before), the standard deviations {after[1]:.1f} "
            f"({before[1]:.1f} before), over {shift['images']} images."
        )
    return lines


def _contexts(mode: str, names: Sequence[str] | None, count: int, source: str | None) -> list[str]:
    if mode == "mn":
        return [f"- {count} mixture components; no contexts"]
    if mode == "bn":
        return ["- no contexts"]
    derived = f", derived by {as_code(source)}" if source else ""
    if not names:
        return [f"- contexts: {count}{derived}, without names"]
    return [f"- contexts: {len(names)}{derived}: {_listed(names, MANY)}"]


def _use(
    repo_id: str,
    mode: str,
    names: Sequence[str] | None,
    size: Sequence[int],
    *,
    needs_base: bool,
    verifies: bool = False,
) -> list[str]:
    """Code that loads and calls it, with a context and without, as far as the mode has contexts and can do without."""
    context = json.dumps(names[0], ensure_ascii=not names[0].isprintable()) if names else "0"
    calls = [f"known = model(images, context_ids={context})  # the context is known"] if mode not in BASELINES else []
    calls += [] if mode == "dsbn" else ["unknown = model(images)  # it is not"] if calls else ["output = model(images)"]
    model = ", model=base" if needs_base else ""
    on_files = f"On image files: {as_code(f'cn-hf predict {repo_id} IMAGE.jpg')}."
    if verifies:
        restyle = f"cn-hf restyle IMAGE.jpg --model {repo_id} --to {_in_a_shell(names[0]) if names else 0} -o OUT"
        on_files = f"Images in the style of a context: {as_code(restyle)}."
    given = ["`base` is a copy of the base model.", ""] if needs_base else []
    return [
        *given,
        "```python",
        "import torch, cn_hf",
        "",
        f'model = cn_hf.from_pretrained("{repo_id}"{model})',
        f"images = torch.randn(1, {', '.join(map(str, size))})  # one image, normalised as in training",
        *calls,
        "```",
        "",
        f"{on_files} What it is: `cn-hf inspect {repo_id}`.",
    ]


def _in_a_shell(name: str) -> str:
    quoted = shlex.quote(name)
    return f'"{name}"' if quoted == name else quoted


def _data(config: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    images = ", ".join(f"{split} {count:,}" for split, count in data["images"].items())
    size = " x ".join(str(side) for side in data["input_size"])
    count = f"{data['num_classes']} classes" if "num_classes" in data else f"{data['identities']['train']} identities"
    lines = [
        f"- {', '.join(map(as_code, config['dataset']))}; images: {images}",
        f"- {count}, images of {size} (channels, height, width)",
    ]
    skipped = sum(len(rows) for rows in data.get("skipped", {}).values())
    return [*lines, f"- {skipped:,} unreadable images left out"] if skipped else lines


def _training(results: Mapping[str, Any]) -> list[str]:
    config, environment = results["config"], results.get("environment") or {}
    epochs = max((len(history["epochs"]) for history in results["history"].values()), default=0)
    lines = [
        f"- {config['optimizer']}, learning rate {config['learning_rate']:g}, weight decay {config['weight_decay']:g}, "
        f"batches of {config['batch_size']}, {epochs} of {config['epochs']} epochs, seed {config['seed']}",
    ]
    if environment.get("device"):
        cpu = f", {environment['cpu']} with {environment['cpu_cores']} cores" if environment.get("cpu") else ""
        versions = environment.get("versions", {})
        known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "transformers") if name in versions)
        lines.append(f"- hardware: {environment['device']}{cpu}; {known}")
    if environment.get("command"):
        lines += ["", "```bash", for_terminal(environment["command"]), "```"]
    return lines


def _results(results: Mapping[str, Any]) -> list[str]:
    evaluation = results.get("evaluation")
    if not evaluation:
        return ["Nothing was measured: there was no test or validation split."]
    ks = evaluation["top_k"]
    lines = [f"On the {results['evaluated_split']} split; ± is the binomial standard error.", ""]
    lines += [f"| protocol | {' | '.join(f'top-{k}, %' for k in ks)} | n |", f"|---|{'--:|' * (len(ks) + 1)}"]
    for row in evaluation["rows"]:
        cells = [_percent(row, k) for k in ks]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['num_samples']:,} |")
    lines += _within_contexts(evaluation)
    missing = [f"- {row['name']}: {row['unavailable']}" for row in evaluation["rows"] if row.get("unavailable")]
    findings = results.get("findings") or evaluation["findings"]
    return [*lines, "", *missing, *([""] if missing else []), *(f"- {for_markdown(text)}" for text in findings)]


def _within_contexts(evaluation: Mapping[str, Any]) -> list[str]:
    """Accuracy of every row within each context, a line a context; nothing where the test set has none."""
    k = min(evaluation["top_k"])
    found = {row["name"]: counts for row in evaluation["rows"] if (counts := context_counts(row, k))}
    if not found:
        return []
    lines = ["", f"Within each context, top-{k}, %:", "", f"| context | {' | '.join(found)} |"]
    lines.append(f"|---|{'--:|' * len(found)}")
    contexts = list(next(iter(found.values())).items())
    for name, (_, n) in contexts[:MANY]:
        lines.append(
            f"| {for_markdown(name)} (n = {n:,}) | {' | '.join(_rate(*counts[name]) for counts in found.values())} |"
        )
    return lines if len(contexts) <= MANY else [*lines, "", f"and {len(contexts) - MANY} contexts more."]


def context_counts(row: Mapping[str, Any], k: int) -> dict[str, tuple[int, int]]:
    """Return (right among the k best, samples) of each context that has samples, from a row of ``results.json``."""
    right = row.get("context_correct", {}).get(str(k), {})
    return {name: (right[name], n) for name, n in row.get("context_samples", {}).items() if n and name in right}


def _percent(row: Mapping[str, Any], k: int) -> str:
    return "–" if row.get("unavailable") else _rate(row["correct"][str(k)], row["num_samples"])


def _rate(correct: int, n: int) -> str:
    p = correct / n
    return f"{100 * p:.2f}" + (f" ± {100 * (p * (1 - p) / n) ** 0.5:.2f}" if 0 < correct < n else "")


def _limits_of(results: Mapping[str, Any]) -> list[str]:
    if results.get("is_evidence", True):
        return []
    return ["- A check of the machinery: far too little training to be evidence for or against the method."]


def _count_of(results: Mapping[str, Any]) -> int:
    """Contexts of a run, components of MN."""
    names, given = results["data"].get("context_names"), results["config"].get("num_contexts")
    return len(names) if names and results["config"]["mode"] != "mn" else int(given or 3)


def _listed(names: Sequence[str], most: int) -> str:
    shown = ", ".join(map(as_code, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _slots(count: int) -> str:
    return "1 slot" if count == 1 else f"{count} slots"


def _count(numbers: Any) -> str:
    return f"{sum(numbers):,}"


# ------------------------------------------------------------------------------------------------------------ metadata


def _hub_ids(names: Sequence[str]) -> list[str]:
    # A relative folder looks like an id; these are what folders of data are called, and no owners on the Hub.
    folders = (".", "/", "~", "data/", "datasets/", "runs/")
    return [name for name in names if name.count("/") == 1 and not name.startswith(folders)]


def _index(results: Mapping[str, Any]) -> list[EvalResult]:
    evaluation = results.get("evaluation")
    if not evaluation:
        return []
    name = " + ".join(str(dataset).rsplit("/", 1)[-1] for dataset in results["config"]["dataset"])
    kind = (_hub_ids(results["config"]["dataset"]) or [name])[0]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=kind,
            dataset_name=name,
            dataset_split=results["evaluated_split"],
            metric_type="accuracy" if k == 1 else f"top_{k}_accuracy",
            metric_name=f"top-{k} accuracy, {row['name']}",
            metric_value=row["correct"][str(k)] / row["num_samples"],
        )
        for row in evaluation["rows"]
        if not row.get("unavailable")
        for k in evaluation["top_k"]
    ]


def _metadata(
    repo_id: str,
    *,
    library: str,
    base_model: str | None,
    datasets: Sequence[str] = (),
    evaluation: Sequence[EvalResult] = (),
    task: str = "image-classification",
) -> ModelCardData:
    return ModelCardData(
        library_name=library if library in ("timm", "transformers") else None,
        pipeline_tag=task,
        tags=["cn_hf", "context-normalization", task],
        datasets=list(datasets) or None,
        base_model=base_model,
        model_name=repo_id.rsplit("/", 1)[-1] if evaluation else None,
        eval_results=list(evaluation) or None,
    )


def _card(metadata: ModelCardData, repo_id: str, sections: Mapping[str, Sequence[str]]) -> ModelCard:
    title = f"# {repo_id.rsplit('/', 1)[-1]}"
    about = (
        f"An image {'classifier' if metadata.pipeline_tag == 'image-classification' else 'encoder'} with "
        "[Context Normalization]("
        f"{PAPER}): each sample is normalised with the learned mean and variance of its context. Made with "
        "the Python package `cn_hf`, which loads it; without it, timm and transformers refuse this checkpoint."
    )
    parts = [f"## {heading}\n\n" + "\n".join(lines) for heading, lines in sections.items() if lines]
    content = "\n\n".join([f"---\n{metadata.to_yaml()}\n---", title, about, *parts, f"## Citation\n\n{CITATION}"])
    return ModelCard(content + "\n", ignore_metadata_errors=False)
