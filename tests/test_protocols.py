"""Honest evaluation on real patched models: by hand where the network is simple, against slow loops where it is not."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import cn_hf
from cn_hf.contexts import BrightnessContexts, ColumnContexts, RuleContexts
from cn_hf.data import DeviceBatches
from cn_hf.errors import CnHfError, ConfigError, ContextIdError, DatasetError, InputTypeError, PatchError
from cn_hf.evaluation import evaluate_protocols
from cn_hf.evaluation.batch_statistics import batch_statistics

NUM_CLASSES = 6
Batches = list[dict[str, Tensor]]


def _convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, NUM_CLASSES),
    )


def _data(num_samples: int = 45, num_contexts: int = 2, seed: int = 5) -> dict[str, Tensor]:
    """Images of context 1 and up are darker."""
    generator = torch.Generator().manual_seed(seed)
    context_ids = torch.randint(num_contexts, (num_samples,), generator=generator)
    images = torch.rand(num_samples, 3, 12, 12, generator=generator) / (1 + 4 * context_ids.view(-1, 1, 1, 1))
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    return {
        "pixel_values": images,
        "labels": labels,
        "context_ids": context_ids,
        "index": torch.arange(num_samples),
    }


def _batches(data: dict[str, Tensor], batch_size: int = 16, without: tuple[str, ...] = ()) -> Batches:
    length = len(data["labels"])
    return [
        {name: column[start : start + batch_size] for name, column in data.items() if name not in without}
        for start in range(0, length, batch_size)
    ]


def _patched(num_contexts: int = 2, seed: int = 0, **options: object) -> nn.Module:
    """A network whose contexts matter: its statistics are those of the data, context by context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = cn_hf.patch_model(_convnet(seed), "cn-channels", where="norms", num_contexts=num_contexts, **options)
    data = _data(200, num_contexts, seed=9)
    cn_hf.calibrate(model, _batches(data, 200))
    return model.eval()


def _counts(labels: Tensor, context_ids: Tensor, num_contexts: int = 2) -> Tensor:
    counts = torch.zeros(num_contexts, NUM_CLASSES, dtype=torch.int64)
    for label, context in zip(labels.tolist(), context_ids.tolist(), strict=True):
        counts[context, label] += 1
    return counts


def _slow_top_k(logits: Tensor, labels: Tensor, k: int) -> int:
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]
        right += label in order and row[label] != float("-inf")
    return right


def _evaluate(model: nn.Module | None, batches: object, **options: object):
    return evaluate_protocols(model, batches, num_classes=NUM_CLASSES, progress=False, **options)


# ---------------------------------------------------------------------------------------------------- what the rows are


def test_every_row_equals_a_slow_loop() -> None:
    model, baseline, data = _patched(), _convnet(1).eval(), _data()
    source = BrightnessContexts(threshold=127.0)
    report = _evaluate(
        model, _batches(data), class_counts=_counts(data["labels"], data["context_ids"]), baseline=baseline,
        source=source, top_k=(1, 3, 20),
    )  # fmt: skip
    images, labels, ids = data["pixel_values"], data["labels"], data["context_ids"]
    one_by_one = [image[None] for image in images]
    guessed = source.predict((images * 255).round().to(torch.uint8))
    assert 5 < int((guessed != ids).sum()) < 40
    permuted = ids[torch.randperm(45, generator=torch.Generator().manual_seed(0))]
    probe = copy.deepcopy(model)

    def with_ids(chosen: Tensor) -> Tensor:
        return torch.cat([probe(x, context_ids=i[None]) for x, i in zip(one_by_one, chosen, strict=True)])

    with torch.no_grad():
        expected = {
            "true contexts": with_ids(ids),
            "predict": with_ids(guessed),
            "shuffled contexts": with_ids(permuted),
        }
        cn_hf.set_inference(probe, "cn+", plus_stats="learned", plus_scale="none")
        expected["CN+ (learned, none)"] = torch.cat([probe(x) for x in one_by_one])
        cn_hf.set_inference(probe, "cn+", plus_stats="batch", plus_scale="sqrt_t")
        expected["CN+ (batch, sqrt_t)"] = torch.cat([probe(part) for part in images.split(16)])
        with batch_statistics(probe):
            expected["batch statistics, mixed"] = torch.cat([probe(part) for part in images.split(16)])
            parts = []
            for part, of in zip(images.split(16), ids.split(16), strict=True):
                found = torch.empty(len(of), NUM_CLASSES)
                for context in of.unique():
                    found[of == context] = probe(part[of == context], context_ids=of[of == context])
                parts.append(found)
            expected["batch statistics, one context"] = torch.cat(parts)
        softmax = [with_ids(torch.full_like(ids, context)).softmax(dim=1) for context in (0, 1)]
        expected["average"] = (softmax[0] + softmax[1]) / 2
        expected["baseline"] = torch.cat([baseline(x) for x in one_by_one])
    assert [row.name for row in report] == [
        "true contexts", "CN+ (batch, sqrt_t)", "CN+ (learned, none)", "predict", "average",
        "batch statistics, mixed", "batch statistics, one context", "shuffled contexts",
        "context-only floor", "masked baseline", "baseline",
    ]  # fmt: skip
    for name, logits in expected.items():
        row = report[name]
        assert row.num_samples == 45
        assert row.correct == {1: _slow_top_k(logits, labels, 1), 3: _slow_top_k(logits, labels, 3), 20: 45}, name
        for context in (0, 1):
            chosen = ids == context
            right = _slow_top_k(logits[chosen], labels[chosen], 3)
            assert row.context_correct[3][f"context_{context}"] == right
            assert row.accuracy(3, context=f"context_{context}") == right / int(chosen.sum())
    assert len({tuple(row.correct.items()) for row in report}) > 4  # the protocols do differ on this data


def test_a_network_by_hand() -> None:
    """Images whose pixels are the logits plus an offset that only the right context takes away."""
    offsets = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    network = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3), nn.Flatten())
    with pytest.warns(UserWarning, match="never saw data"):
        cn_hf.patch_model(
            network, "cn-channels", where="norms", context_names=["left", "right"], parametrization="table"
        )
    network[1].normalizer.set_statistics(offsets, torch.ones(2, 3))
    labels, ids = torch.tensor([0, 1, 2, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1, 0])
    images = (torch.eye(3)[labels] + offsets[ids])[:, :, None, None]
    batches = [{"pixel_values": images, "labels": labels, "context_ids": ids}]
    report = evaluate_protocols(
        network, batches, num_classes=3, baseline=nn.Flatten(), class_counts=[[5, 5, 9], [4, 4, 3]], top_k=(1, 2),
        progress=False,
    )  # fmt: skip
    assert report["true contexts"].correct == {1: 7, 2: 7}
    assert report["CN+ (learned, none)"].correct[1] == 7  # the offsets give the context away
    # Contexts read (0,0,0,1,1,1,0) permuted: a wrong id adds 9 where its own offset is and takes 9 where the other is.
    permuted = ids[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    logits = images[:, :, 0, 0] - offsets[permuted]
    assert report["shuffled contexts"].correct == {1: _slow_top_k(logits, labels, 1), 2: _slow_top_k(logits, labels, 2)}
    # The baseline sees 9 at class 0 (left) or 1 (right): top-1 right for label 0 on the left and label 1 on the right.
    assert report["baseline"].correct[1] == 2
    # Floor: most frequent class is 2 on the left (two of the four), 0 on the right (one of the three).
    assert report["context-only floor"].correct == {1: 3, 2: 5}
    assert report["true contexts"].context_samples == {"left": 4, "right": 3}
    assert report["true contexts"].accuracy(1, context="left") == 1.0
    assert report.context_depends_on_label is False
    assert "beats the masked baseline" in report.findings[1]


def test_a_context_that_determines_the_class() -> None:
    """One class in each context: the floor is perfect, and so is any masked baseline."""
    data = _data(36, NUM_CLASSES)
    data["context_ids"] = data["labels"].clone()
    report = _evaluate(
        _patched(NUM_CLASSES), _batches(data), class_counts=10 * torch.eye(NUM_CLASSES), baseline=_convnet(3)
    )
    assert report["context-only floor"].accuracy(1) == 1.0
    assert report["masked baseline"].accuracy(1) == 1.0
    assert report["true contexts"].accuracy(1) < 1.0
    assert report.context_depends_on_label is True
    assert "at most 1 in one" in report.findings[0]
    assert "2.58 of the 2.58 bits" in report.findings[0]
    assert "does not beat the masked baseline" in report.findings[1]


def test_masked_baseline_by_hand() -> None:
    baseline = nn.Flatten()  # pixels are logits
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    batch = {
        "pixel_values": logits[:, :, None, None],
        "labels": torch.tensor([2, 2, 1, 3]),
        "context_ids": torch.tensor([0, 1, 1, 2]),
    }
    # context 0 knows classes 2 and 3, context 1 classes 0 and 1, context 2 was never seen in training
    counts = [[0, 0, 4, 1, 0, 0], [3, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    report = _evaluate(None, [batch], class_counts=counts, baseline=baseline, top_k=(1, 2, 5))
    assert [row.name for row in report] == ["context-only floor", "masked baseline", "baseline"]
    # 1: of 2 and 3, 2 is ahead. 2: class 2 is masked out, wrong at every k. 3: of 0 and 1, 1 is ahead.
    # 4: nothing is known of the context, so nothing is masked: class 3 is fourth.
    assert report["masked baseline"].correct == {1: 2, 2: 2, 5: 3}
    assert report["baseline"].correct == {1: 0, 2: 0, 5: 4}
    # Floor: classes 2, 3 first in context 0; 0, 1 in context 1, then 2 by overall frequency; that order in context 2.
    assert report["context-only floor"].correct == {1: 1, 2: 2, 5: 4}
    assert report["baseline"].context_samples == {"context_0": 1, "context_1": 2, "context_2": 1}


def test_several_baselines_and_none() -> None:
    data = _data()
    counts = _counts(data["labels"], data["context_ids"])
    report = _evaluate(
        _patched(), _batches(data), class_counts=counts, baseline={"BN": _convnet(1), "plain": _convnet(2)}
    )
    assert [row.name for row in report][-4:] == [
        "masked baseline (BN)", "baseline (BN)", "masked baseline (plain)", "baseline (plain)",
    ]  # fmt: skip
    assert sum("masked baseline" in sentence for sentence in report.findings) == 2
    bare = _evaluate(_patched(), _batches(data))
    assert bare.context_depends_on_label is None
    assert bare["masked baseline"].unavailable == "no baseline network was given"
    assert "class_counts" in bare["context-only floor"].unavailable
    assert "not known" in bare.findings[0]
    assert "not known" in bare.findings[1]


def test_report_goes_to_json() -> None:
    data = _data()
    report = _evaluate(_patched(), _batches(data))
    values = json.loads(json.dumps(report.to_dict()))
    assert values["rows"][0]["top_1"] == report["true contexts"].accuracy(1)
    assert values["rows"][3]["unavailable"].startswith("inference=")
    assert len(report) == len(values["rows"]) == 11


# -------------------------------------------------------------------------------------------------- rows that cannot be


def test_predict_unavailable_says_why() -> None:
    model, batches = _patched(), _batches(_data())

    def reason(**options: object) -> str:
        row = _evaluate(model, batches, **options)["predict"]
        assert row.accuracy(1) is None
        assert row.standard_error(1) is None
        return row.unavailable

    assert "source" in reason()
    assert "cannot tell a context from pixels" in reason(source=_fitted_columns())
    assert "not fitted" in reason(source=BrightnessContexts())
    assert "3 contexts" in reason(source=RuleContexts(lambda image: 0, ["a", "b", "c"], on="image"))
    assert "pass the mean and std" in reason(source=BrightnessContexts(threshold=80.0), mean=(5.0,), std=(0.2,))
    assert model.router.source is None


def _fitted_columns() -> ColumnContexts:
    from datasets import ClassLabel, Dataset, Features

    features = Features({"coarse": ClassLabel(names=["a", "b"])})
    return ColumnContexts("coarse").fit(Dataset.from_dict({"coarse": [0, 1]}, features=features))


def test_predict_undoes_the_normalisation_and_uses_the_attached_source() -> None:
    data, source = _data(), BrightnessContexts(threshold=80.0)
    model = _patched()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    moved = dict(data)
    moved["pixel_values"] = (data["pixel_values"] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    guessed = source.predict((data["pixel_values"] * 255).round().to(torch.uint8))
    with torch.no_grad():
        expected = _slow_top_k(model(moved["pixel_values"], context_ids=guessed), data["labels"], 1)
    assert _evaluate(model, _batches(moved), source=source, mean=mean, std=std)["predict"].correct[1] == expected
    cn_hf.set_inference(model, "average", source=source, mean=mean, std=std)
    assert _evaluate(model, _batches(moved))["predict"].correct[1] == expected
    assert model.context_config.inference == "average"
    assert model.router.source is source
    assert model.router.pixel_mean == mean


def test_without_context_ids() -> None:
    data = _data()
    batches = _batches(data, without=("context_ids", "index"))
    report = _evaluate(
        _patched(), batches, class_counts=_counts(data["labels"], data["context_ids"]), baseline=_convnet()
    )
    for name in ("true contexts", "shuffled contexts", "context-only floor", "masked baseline"):
        assert report[name].unavailable == "the test set has no context_ids"
    for name in ("CN+ (learned, none)", "average", "baseline"):
        assert report[name].available
    assert report["baseline"].context_samples == {}


def test_one_context_and_too_many_to_average() -> None:
    report = _evaluate(_patched(1), _batches(_data(20, 1)))
    assert report["shuffled contexts"].unavailable == "there is one context only"
    assert report["true contexts"].correct == report["CN+ (learned, none)"].correct == report["average"].correct
    many = _evaluate(_patched(5, parametrization="table"), _batches(_data(20, 5)), max_average_contexts=4)
    assert "5 contexts" in many["average"].unavailable


def test_nan_logits_are_wrong_and_said() -> None:
    data = _data(20)
    data["pixel_values"][3] = float("nan")
    report = _evaluate(None, _batches(data), baseline=_convnet())
    assert "1 samples got NaN" in report["baseline"].explanation
    assert report["baseline"].correct[5] <= 19


def test_batch_statistics_are_said_to_depend_on_the_batch() -> None:
    data = _data(40)
    small, large = (_evaluate(_patched(), _batches(data, size)) for size in (3, 40))
    assert "up to 3 samples" in small["CN+ (batch, sqrt_t)"].explanation
    assert "up to 40 samples" in large["CN+ (batch, sqrt_t)"].explanation
    assert small["CN+ (learned, none)"].correct == large["CN+ (learned, none)"].correct
    assert small["shuffled contexts"].correct == large["shuffled contexts"].correct


def test_other_plus_settings() -> None:
    report = _evaluate(_patched(), _batches(_data(20)), plus_settings=[["learned", "sqrt_t"], ("learned", "sqrt_t")])
    assert [row.name for row in report][1:3] == ["CN+ (learned, sqrt_t)", "predict"]


# -------------------------------------------------------------------------------------------- models, loaders, wrappers


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_library_models(kind: str) -> None:
    if kind == "timm":
        model = timm.create_model("test_vit", num_classes=NUM_CLASSES, img_size=32)
        baseline = copy.deepcopy(model)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=NUM_CLASSES,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        baseline = copy.deepcopy(model)
    cn_hf.patch_model(model, num_contexts=2)
    generator = torch.Generator().manual_seed(0)
    data = _data(10) | {"pixel_values": torch.randn(10, 3, 32, 32, generator=generator)}
    report = _evaluate(model, _batches(data, 4), baseline=baseline)
    for name in ("true contexts", "CN+ (learned, none)", "average", "shuffled contexts"):
        assert report[name].correct == report["baseline"].correct  # equal right after patching


def test_compiled_and_wrapped_models_are_unwrapped() -> None:
    model, data = _patched(), _data(20)
    expected = _evaluate(model, _batches(data), baseline=_convnet())
    compiled = _evaluate(torch.compile(model), _batches(data), baseline=torch.compile(_convnet()))
    assert compiled == expected


def test_device_batches_shuffled_and_not() -> None:
    model, data = _patched(), _data()
    pixels = (data["pixel_values"] * 255).round().to(torch.uint8)

    def batches(shuffle: bool) -> DeviceBatches:
        return DeviceBatches(pixels, data["labels"], data["context_ids"], batch_size=16, shuffle=shuffle, seed=3)

    settings = {"plus_settings": [("learned", "none")]}
    in_order = _evaluate(model, batches(False), **settings)
    assert _evaluate(model, batches(True), **settings) == in_order  # shuffled contexts go by dataset row


class _Reshuffled:
    """Batches in another order at each pass, as a DataLoader with shuffle=True gives them."""

    def __init__(self, data: dict[str, Tensor], without: tuple[str, ...] = ()) -> None:
        self.data, self.without, self.passes = data, without, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        order = torch.randperm(len(self.data["labels"]), generator=torch.Generator().manual_seed(self.passes))
        yield from _batches({name: column[order] for name, column in self.data.items()}, without=self.without)


def test_reshuffled_between_passes() -> None:
    model, data = _patched(), _data()
    settings = {"plus_settings": [("learned", "none")]}
    assert _evaluate(model, _Reshuffled(data), **settings) == _evaluate(model, _batches(data), **settings)
    with pytest.raises(DatasetError, match="second pass"):
        _evaluate(model, _Reshuffled(data, without=("index",)))


def test_transformers_style_data_loader() -> None:
    data = _data(21)
    rows = [{name: column[row] for name, column in data.items()} for row in range(21)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    assert _evaluate(_patched(), loader) == _evaluate(_patched(), _batches(data, 8))


# ----------------------------------------------------------------------------------------------- nothing is left behind


def _state(model: nn.Module) -> tuple[object, ...]:
    router = model.router
    layers = [
        (module.inference, module.plus_stats, module.plus_scale)
        for module in model.modules()
        if isinstance(module, cn_hf.ContextNorm)
    ]
    flags = [module.training for module in model.modules()]
    running = router.calls.running.get(), router.calls.blocks.get(), router.observer
    return router.config, router.source, router.pixel_mean, router.pixel_std, *running, layers, flags


def _mixed_state_model() -> nn.Module:
    """In training, but for one frozen part, with inference settings of its own."""
    model = _patched().train()
    model[3].eval()
    source = BrightnessContexts(threshold=10.0)
    return cn_hf.set_inference(
        model, "average", source=source, plus_stats="batch", plus_scale="none", mean=(0.1,) * 3, std=(0.9,) * 3
    )


def test_everything_is_as_before_afterwards() -> None:
    model, baseline = _mixed_state_model(), _convnet().train()
    before, weights = _state(model), copy.deepcopy(model.state_dict())
    baseline_weights = copy.deepcopy(baseline.state_dict())
    random_state = torch.random.get_rng_state()
    _evaluate(model, _batches(_data()), baseline=baseline, source=BrightnessContexts(threshold=80.0))
    assert _state(model) == before
    assert all(module.training for module in baseline.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, baseline_weights[name]) for name, value in baseline.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails_at", [1, 4, 9, 14, 26])
def test_everything_is_as_before_after_an_exception(fails_at: int) -> None:
    model, baseline = _mixed_state_model(), _convnet().train()
    before, calls = _state(model), 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("out of memory")

    hook = model[5].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        _evaluate(model, _batches(_data(), 6), baseline=baseline)
    hook.remove()
    assert _state(model) == before
    assert all(module.training for module in baseline.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("broken", ["label", "context", "missing", "output"])
def test_everything_is_as_before_after_a_bad_batch(broken: str) -> None:
    model = _mixed_state_model()
    before, batches = _state(model), _batches(_data())
    if broken == "label":
        batches[-1]["labels"] = batches[-1]["labels"] + NUM_CLASSES
    elif broken == "context":
        batches[-1]["context_ids"] = batches[-1]["context_ids"] + 2
    elif broken == "missing":
        del batches[-1]["context_ids"]
    with pytest.raises(CnHfError):
        evaluate_protocols(model, batches, num_classes=NUM_CLASSES + (broken == "output"), progress=False)
    assert _state(model) == before


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_models() -> None:
    batches = _batches(_data(8))
    with pytest.raises(PatchError, match="not a patched model"):
        _evaluate(_convnet(), batches)
    with pytest.raises(PatchError, match="mode 'bn'"):
        _evaluate(cn_hf.patch_model(_convnet(), "bn", where="input"), batches)
    with pytest.raises(PatchError, match="without contexts"):
        _evaluate(_patched(), batches, baseline=_patched())
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        _evaluate("resnet18", batches)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        _evaluate(None, batches)
    model = _patched()
    with cn_hf.use_contexts(model, 0), pytest.raises(PatchError, match="use_contexts"):
        _evaluate(model, batches)
    with pytest.raises(InputTypeError, match=r"classifier of 7 classes .*\(8, 6\)"):
        evaluate_protocols(model, batches, num_classes=7, progress=False)
    with pytest.raises(InputTypeError, match="received str"):
        _evaluate(None, batches, baseline=_Words())


def test_an_empty_part_of_a_small_batch_is_skipped() -> None:
    model, batches = _patched(), _batches(_data(20))
    empty = {name: column[:0] for name, column in batches[0].items()}
    source = BrightnessContexts(threshold=80.0)
    assert _evaluate(model, [batches[0], empty, batches[1]], source=source) == _evaluate(model, batches, source=source)


class _NeedsNoGradients(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        return super().forward(images)


def test_networks_run_without_gradients_in_evaluation_mode() -> None:
    _evaluate(None, _batches(_data(8)), baseline=_NeedsNoGradients(*_convnet()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_a_gpu_with_batches_on_the_cpu() -> None:
    data, source = _data(), BrightnessContexts(threshold=80.0)
    counts = _counts(data["labels"], data["context_ids"])
    model = _patched()
    expected = _evaluate(model, _batches(data), class_counts=counts, baseline=_convnet(1), source=source)
    found = _evaluate(model.cuda(), _batches(data), class_counts=counts, baseline=_convnet(1), source=source)
    for row, other in zip(found, expected, strict=True):
        assert all(abs(row.correct[k] - other.correct[k]) <= 1 for k in row.correct), row.name


class _Words(nn.Module):
    def forward(self, images: Tensor) -> str:
        return "cat"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": ()}, ConfigError),
        ({"top_k": (0,)}, ConfigError),
        ({"top_k": (1, 2.5)}, ConfigError),
        ({"top_k": "15"}, ConfigError),
        ({"plus_settings": [("learn", "none")]}, ConfigError),
        ({"plus_settings": [("learned",)]}, ConfigError),
        ({"class_counts": torch.ones(3, NUM_CLASSES)}, DatasetError),
        ({"class_counts": torch.ones(NUM_CLASSES)}, DatasetError),
        ({"class_counts": torch.full((2, NUM_CLASSES), 0.5)}, DatasetError),
        ({"class_counts": -torch.ones(2, NUM_CLASSES)}, DatasetError),
        ({"class_counts": torch.zeros(2, NUM_CLASSES)}, DatasetError),
        ({"mean": (0.1, 0.2), "std": (1.0, 1.0), "source": BrightnessContexts(threshold=1.0)}, ConfigError),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception]) -> None:
    model = _patched()
    before = _state(model)
    with pytest.raises(error):
        _evaluate(model, _batches(_data(8)), **options)
    assert _state(model) == before


def test_bad_batches() -> None:
    model, good = _patched(), _batches(_data(8))
    with pytest.raises(DatasetError, match="no samples"):
        _evaluate(model, [])
    with pytest.raises(InputTypeError, match="more than once"):
        _evaluate(model, iter(good))
    with pytest.raises(InputTypeError, match="dict"):
        _evaluate(model, [(good[0]["pixel_values"], good[0]["labels"])])
    with pytest.raises(DatasetError, match="lacks 'labels'"):
        _evaluate(model, [{"pixel_values": torch.zeros(1)}])
    with pytest.raises(DatasetError, match=r"'labels' .*-1"):
        _evaluate(model, [good[0] | {"labels": good[0]["labels"] - good[0]["labels"].min() - 1}])
    with pytest.raises(DatasetError, match=r"\(8,\)"):
        _evaluate(model, [good[0] | {"labels": good[0]["labels"][:3]}])
    with pytest.raises(ContextIdError, match="float"):
        _evaluate(model, [good[0] | {"context_ids": torch.rand(8, 2)}])
    with pytest.raises(ContextIdError, match=r"0\.\.1"):
        _evaluate(model, [good[0] | {"context_ids": torch.full((8,), 2)}])
    with pytest.raises(InputTypeError, match="'labels' of a test batch must be a tensor"):
        _evaluate(model, [good[0] | {"labels": [0] * 8}])
    with pytest.raises(DatasetError, match="row 0 occurs twice"):
        _evaluate(model, good + good)
    with pytest.raises(DatasetError, match="only some test batches have 'index'"):
        _evaluate(model, [good[0], {name: column for name, column in good[0].items() if name != "index"}])


# ---------------------------------------------------------------------------------------------------- several processes

_WORKER = """
import json, sys
import torch
from accelerate import Accelerator
sys.path.insert(0, sys.argv[1])
from processes import leave
from test_protocols import _batches, _convnet, _counts, _data, _patched
from cn_hf.contexts import BrightnessContexts
from cn_hf.evaluation import evaluate_protocols

accelerator = Accelerator()
assert accelerator.num_processes == 2, accelerator.num_processes
data = _data(45)
# 29 samples in five batches against 19 in three, three rows met by both processes
share = torch.arange(0, 29) if accelerator.process_index == 0 else torch.arange(26, 45)
batches = _batches({name: column[share] for name, column in data.items()}, 7)
model = accelerator.prepare(_patched())
assert type(model).__name__ == "DistributedDataParallel"
report = evaluate_protocols(
    model, batches, num_classes=6, class_counts=_counts(data["labels"], data["context_ids"]), baseline=_convnet(1),
    source=BrightnessContexts(threshold=80.0), plus_settings=[("learned", "none")], top_k=(1, 3),
    accelerator=accelerator,
)
reports = [None, None]
torch.distributed.all_gather_object(reports, report.to_dict())
assert reports[0] == reports[1]
try:
    evaluate_protocols(model, _batches(data, without=("index",)), num_classes=6, accelerator=accelerator)
except ValueError as error:
    assert "'index'" in str(error), error
else:
    raise AssertionError("no error without index")
if accelerator.is_main_process:
    open(sys.argv[2], "w").write(json.dumps(report.to_dict()))
accelerator.end_training()
leave()
"""


def test_two_processes_with_uneven_and_repeated_shares_equal_one(tmp_path: Path) -> None:
    script, output = tmp_path / "worker.py", tmp_path / "report.json"
    script.write_text(_WORKER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
        str(Path(__file__).parent), str(output),
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    data = _data(45)
    alone = _evaluate(
        _patched(), _batches(data), class_counts=_counts(data["labels"], data["context_ids"]), baseline=_convnet(1),
        source=BrightnessContexts(threshold=80.0), plus_settings=[("learned", "none")], top_k=(1, 3),
    )  # fmt: skip
    assert json.loads(output.read_text()) == json.loads(json.dumps(alone.to_dict()))
    assert alone["predict"].available
