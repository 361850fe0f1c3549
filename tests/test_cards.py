"""Model cards: every figure comes from a results file, their metadata are the Hub's, and their code runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard

import cn_hf
import cn_hf.models
from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.experiments.cards import experiment_cards, write_cards
from cn_hf.hub.card import checkpoint_card, run_card

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
# The other tables and figures show the cells of these.
RESULTS = [CARDS / "results" / "small" / name / "results.json" for name in ("table5", "table7", "table8", "table9")]
SIAMESE = ("cameras", "views")


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    return code


def numbers(value: object) -> set[float]:
    """Every number in a JSON value, and every number in its texts."""
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, (int, float)):
        return {float(value)}
    if isinstance(value, str):
        return {float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", value)}
    values = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return set().union(*map(numbers, values)) if values else set()


def test_each_card_has_its_results():
    made = {name for path in RESULTS for name in experiment_cards(json.loads(path.read_text()))}
    assert {card.stem for card in CARDS.glob("*.md")} == made | {f"daynight-{name}" for name in SIAMESE}


@pytest.mark.parametrize("name", SIAMESE)
def test_the_card_of_a_siamese_run(name, tmp_path):
    path = CARDS / "results" / "daynight" / name / "results.json"
    (written,) = write_cards(path, tmp_path)
    text = written.read_text()
    assert text == (CARDS / written.name).read_text()
    network = list(json.loads(path.read_text())["networks"].values())[-1]
    found = re.findall(r"^\| (.+?) \| ([\d.]+) ± ([\d.]+) \| (.+) \| ([\d,]+) \|$", text, flags=re.MULTILINE)
    assert [row[0] for row in found] == list(network["held_out"])
    for (_, accuracy, error, area, n), values in zip(found, network["held_out"].values(), strict=True):
        assert float(accuracy) == pytest.approx(100 * values["accuracy"], abs=0.005)
        assert float(error) == pytest.approx(100 * values["accuracy_error"], abs=0.005)
        assert int(n.replace(",", "")) == values["pairs"]
        assert area == "–" or float(area) == pytest.approx(100 * values["roc_auc"], abs=0.005)
    assert ModelCard(text).data.pipeline_tag == "image-feature-extraction"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_committed_cards_are_what_their_results_say(path):
    cards = experiment_cards(json.loads(path.read_text()))
    assert cards
    for name, text in cards.items():
        assert (CARDS / f"{name}.md").read_text() == text, f"run: cn-hf cards {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_no_figure_without_a_results_file(path):
    content = json.loads(path.read_text())
    for name, text in experiment_cards(content).items():
        cell = next(cell for cell in content["cells"] if name.endswith(cell.replace(".", "-")))
        values = content["cells"][cell]
        known = numbers(values) | numbers(content["findings"])
        rates = {}
        for row in values["evaluation"]["rows"]:
            for k, correct in row["correct"].items():
                rates[row["name"], k] = correct / row["num_samples"]
        table = re.findall(r"^\| (.+?) \| (.+) \| ([\d,]+) \|$", text, flags=re.MULTILINE)
        assert len(table) == len([1 for row in values["evaluation"]["rows"] if f"| {row['name']} |" in text]) > 0
        for row, cells, n in table:
            assert float(n.replace(",", "")) in known
            for k, shown in zip(map(str, values["evaluation"]["top_k"]), cells.split(" | "), strict=True):
                if shown == "–":
                    assert (row, k) not in rates
                    continue
                rate, _, error = shown.partition(" ± ")
                p = rates[row, k]
                assert float(rate) == pytest.approx(100 * p, abs=0.005)
                if error:
                    sigma = 100 * math.sqrt(p * (1 - p) / float(n.replace(",", "")))
                    assert float(error) == pytest.approx(sigma, abs=0.005)
        for result in ModelCard(text).data.eval_results:
            assert result.metric_value in known


def test_metadata_are_the_hubs(tmp_path):
    results = json.loads(RESULTS[0].read_text())
    name, cell = next((n, c) for n, c in results["cells"].items() if "slots" in c["network"])
    card = run_card({**cell, "config": {**cell["config"], "dataset": ["uoft-cs/cifar10"]}}, "me/model")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.pipeline_tag == "image-classification"
    assert data.library_name == "timm"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.model_name == "model"
    assert {"cn_hf", "context-normalization"} <= set(data.tags)
    assert {result.dataset_type for result in data.eval_results} == {"uoft-cs/cifar10"}
    names = [result.metric_name for result in data.eval_results]
    assert len(names) == len(set(names)), name


@pytest.mark.parametrize(
    ("mode", "contexts"),
    [
        ("cn-channels", {"context_names": ["day", 'nig"ht']}),
        ("cn-channels", {"num_contexts": 2}),
        ("dsbn", {"num_contexts": 2}),
        ("mn", {}),
    ],
)
def test_the_code_of_a_card_runs(mode, contexts, tmp_path):
    where = "input" if mode == "cn-channels" else "paper"
    model = cn_hf.patch_model(timm.create_model("cn_cifar_convnet", num_classes=3), mode=mode, where=where, **contexts)
    folder = cn_hf.save_pretrained(model.eval(), tmp_path / "model")
    card = str(checkpoint_card(model, "me/model"))
    namespace: dict[str, object] = {}
    code = code_of(card)
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code.replace("me/model", str(folder)), namespace)
    outputs = [namespace[name] for name in ("known", "unknown", "output") if name in namespace]
    assert outputs
    assert all(output.shape == (1, 3) for output in outputs)
    assert not re.search(r"\d\.\d+ ±", card)


def test_a_card_without_measurements_has_no_table():
    model = cn_hf.patch_model(timm.create_model("test_vit"), context_names=["a", "b"])
    card = checkpoint_card(model, "me/model", norms_only=True)
    assert "|" not in card.content.split("---", 2)[2]
    assert card.data.eval_results is None
    assert card.data.base_model == "timm/test_vit.r160_in1k"
    assert "added parameters alone" in card.content


def test_results_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="lack what a card tells"):
        run_card({"config": {}}, "me/model")
    plain = {"config": {"mode": "none"}, "data": {}, "network": {}}
    with pytest.raises(ConfigError, match="without contexts"):
        run_card(plain, "me/model")
    with pytest.raises(ConfigError, match="cn-hf reproduce"):
        experiment_cards({"config": {}})
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"results\.json"):
        write_cards(tmp_path / "results.json", tmp_path)
