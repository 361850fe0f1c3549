"""Every section measures what it says, at tiny sizes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.benchmark import models, networks, ops, pipeline, scale
from scripts.benchmark.activations import Activations, Layout
from scripts.benchmark.pipeline import Plan, TimedBatches
from scripts.benchmark.sections import SECTIONS
from scripts.benchmark.settings import NetworkOptions, Settings

CPU = torch.device("cpu")


def smoke(**options: object) -> Settings:
    return Settings(**{"device": CPU, "size": "smoke", "rounds": 2, "progress": False, **options})


@pytest.mark.parametrize(
    "section", ["ops", "plus", "mixture", pytest.param("models", marks=pytest.mark.slow), "scale"]
)  # the others have tests of their own below
def test_every_trial_fills_its_rows(section: str) -> None:
    for trial in SECTIONS[section].trials(smoke()):
        rows = [*trial.measure()]
        assert len(rows) == len(trial.rows) > 0
        for row, planned in zip(rows, trial.rows, strict=True):
            assert (row.key, row.shape, row.dtype, row.limit) == (
                planned.key,
                planned.shape,
                planned.dtype,
                planned.limit,
            )
            if row.unit == " waits":
                assert row.value is None  # there is no device to wait for
                continue
            assert row.value is not None
            if row.rounds:
                assert row.rounds == 2
                assert row.low <= row.value <= row.high
                assert row.milliseconds > 0
                assert row.rival_milliseconds > 0
            if row.unit.startswith("×"):
                assert row.value > 0


@pytest.mark.gpu
@pytest.mark.parametrize("section", [*SECTIONS])
def test_every_trial_runs_on_a_gpu(section: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for trial in SECTIONS[section].trials(smoke(device=torch.device("cuda"))):
        assert all(row.value is not None for row in trial.measure()), trial.name


# ------------------------------------------------------------------------------------------------------------------ ops


@pytest.mark.parametrize("layout", [Layout("maps", (6, 4, 3, 3)), Layout("tokens", (6, 5, 4))])
def test_what_is_timed_computes_the_same(layout: Layout) -> None:
    found = ops._modules(layout, torch.float32, CPU)
    data = Activations(layout, torch.float32, CPU)
    x, _ = data.next()
    out = {name: call(x, data.context_ids) for name, (call, _) in found.items()}
    for name in (ops.OP, ops.REFERENCE, ops.LAYER):
        torch.testing.assert_close(out[name], x, rtol=1e-4, atol=1e-4)  # all begin as the identity
    if not layout.on_maps:
        for name in (ops.SLOT, f"{ops.SLOT}, {ops.REFERENCE}"):
            torch.testing.assert_close(out[name], out["nn.LayerNorm"])
    for name, (call, owned) in found.items():
        grads = ops._run_step(call, owned, data)
        assert grads[0].shape == x.shape
        assert all(grad is not None for grad in grads) or name == ops.LOOP


def test_more_contexts_than_samples() -> None:
    trial = ops._contexts(Layout("maps", (3, 4, 2, 2)), torch.float32, smoke())
    assert [row.what for row in trial.measure()] == [
        f"CN layer on maps, T = {count}, step" for count in ("10", "100", "1,000")
    ]


# --------------------------------------------------------------------------------------------------------------- models


def test_the_pair_differs_by_its_patch_alone() -> None:
    network = models.networks(smoke())[0]
    pair = models._pair(network, CPU)
    images, ids, _ = models._batch(network, CPU)
    plain, patched = (pair[name].eval() for name in (models.PLAIN, models.PATCHED))
    with torch.no_grad():
        torch.testing.assert_close(patched(images, context_ids=ids), plain(images), rtol=1e-4, atol=1e-4)
    assert patched.context_config.num_contexts == 20
    assert models.networks(smoke(size="quick"))[-1].name == "vit_small_patch16_224"


def test_unrouted_layers_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: dict[str, torch.Tensor] = {}

    def remembering(runs, settings, **options):  # type: ignore[no-untyped-def]
        model, _, _ = made[0]
        outputs["routed"] = runs["routed"]()
        hooked = model[1].register_forward_hook(lambda module, given, out: outputs.update(unrouted=out))
        runs["unrouted"]()
        hooked.remove()
        return {name: [1.0] for name in runs}

    made: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    original = models._tiny_model

    def tiny(device: torch.device) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        model, x, ids = original(device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()  # contexts that differ
        made.append((model, x, ids))
        return made[-1]

    monkeypatch.setattr(models, "_tiny_model", tiny)
    monkeypatch.setattr(models, "seconds_in_turn", remembering)
    models._routing(smoke()).measure()
    assert torch.equal(outputs["routed"], outputs["unrouted"])
    assert made[0][0].router.calls.innermost() is None


# ---------------------------------------------------------------------------------------------------------------- scale


def test_images_are_as_many_as_asked_and_differ() -> None:
    data = scale.png_dataset(7)
    assert len(data) == 7
    assert data[0]["image"].size == (32, 32)
    images = scale.drawn_images(50)
    assert images.shape == (50, 32, 32, 3)
    assert 20 < images.std() < 100
    assert images.min() < images.max()


def test_larger_data_sets_hold_the_same_images_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DIFFERENT", 5)
    data = scale.png_dataset(13)
    assert len(data) == 13
    assert data[0]["image"].tobytes() == data[5]["image"].tobytes() == data[10]["image"].tobytes()
    assert data[0]["image"].tobytes() != data[1]["image"].tobytes()


@pytest.mark.parametrize(("images", "words"), [(60, "extrapolated from 60"), (None, "extrapolated from 300")])
def test_what_is_extrapolated_says_so(images: int | None, words: str) -> None:
    (row,) = scale.trials(smoke(images=images))[0].measure()
    assert row.note.startswith(f"{words}; ")
    assert "images/s" in row.note
    count = int(words.split()[-1])
    assert row.value == pytest.approx(row.milliseconds / 60_000 * 1e6 / count)
    assert scale.trials(smoke(images=1_000_000))[0].rows[0].note == ""


# ------------------------------------------------------------------------------------------------------------- pipeline


def test_only_counted_steps_are_timed() -> None:
    plan = Plan(model="", side=1, batch=2, skipped=2, counted=3)
    batches = [{"labels": torch.tensor([number])} for number in range(10)]
    timed = TimedBatches(batches, plan, CPU)
    assert (len(timed), timed.num_samples) == (6, 12)
    met = []
    for batch in timed:
        met.append(int(batch["labels"]))
        assert len(timed._marks) == sum(number <= met[-1] for number in (2, 5))
        if len(met) == len(timed):
            break
    assert met == [*range(6)]
    assert timed.seconds == pytest.approx((timed._marks[1] - timed._marks[0]) / 3)


def test_the_pipeline_trains_on_real_and_fixed_batches() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = [row for trial in pipeline.trials(smoke(rounds=1)) for row in trial.measure()]
    assert [row.limit for row in rows] == [0.95, 0.95]
    assert all(row.value > 0 and row.rounds == 1 for row in rows)
    assert "images/s" in rows[0].note
    assert "workers" in rows[1].note


def test_jpegs_are_decoded_by_workers_while_they_are_used(tmp_path: Path) -> None:
    plan = dataclasses.replace(pipeline._jpeg_plan(smoke()), workers=1, skipped=1, counted=1)
    data = pipeline._jpegs(plan, smoke(), tmp_path)
    assert plan.images == (3 + 2) * 2
    assert len(list(tmp_path.glob("*.jpg"))) == plan.images
    assert data.train is not None
    assert data.train.num_workers == 1  # type: ignore[attr-defined]  # they are streamed
    assert next(iter(data.train))["pixel_values"].shape == (2, 3, 224, 224)


# ------------------------------------------------------------------------------------------------------------- networks


def test_every_variant_of_a_network_is_timed() -> None:
    options = NetworkOptions(network="convnet", batch_size=5, steps=1)
    (trial,) = networks.trials(smoke(networks=options, rounds=3))
    rows = trial.measure()
    assert [row.what for row in rows] == [f"convnet, step with {name}" for name in [*networks.VARIANTS["convnet"]][1:]]
    for row in rows:
        assert (row.rival, row.rounds, row.shape) == ("BN", 3, "(5, 3, 32, 32)")
        assert "images/s" in row.note
    assert len(networks.trials(smoke())) == 2


@pytest.mark.parametrize("network", [*networks.VARIANTS])
def test_a_step_trains_the_network_named(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cn_hf.recipes.classifier import network as classifier

    built: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    original = classifier.build_classifier

    def remembering(config, data):  # type: ignore[no-untyped-def]
        model = original(config, data)
        built.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        return model

    monkeypatch.setattr(classifier, "build_classifier", remembering)
    options = NetworkOptions(network=network, batch_size=4, steps=1, mixed_precision="bf16", channels_last=True)
    (trial,) = networks.trials(smoke(networks=options, rounds=1))
    assert {(row.dtype, row.note.split(";")[0]) for row in trial.measure()} == {("bfloat16", "channels-last")}
    modes = [getattr(model, "context_config", None) for model, _ in built]
    wanted = [variant["mode"] for variant in networks.VARIANTS[network].values()]
    assert [("none" if config is None else config.mode) for config in modes] == wanted
    for model, before in built:
        changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert len(changed) > 5
