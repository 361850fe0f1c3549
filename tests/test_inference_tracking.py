"""patching/tracking.py: contexts that follow the images that are given their id while a model predicts."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import difference, hf_vit, logits, seeded, settle, small_convnet, vit
from sklearn.datasets import load_digits
from torch import Tensor, nn

import cn_hf
from cn_hf import CnHfError, PatchError
from cn_hf.patching.calibrate import record_moments
from cn_hf.patching.measure import calibrated_slots, rows_of

NAMES = ["source", "fog", "night"]


def stream(count: int = 32, size: int = 16, seed: int = 3) -> Tensor:
    return 0.4 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) + 0.7


class OneNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def adapted(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = cn_hf.patch_model(settle(make()).eval(), context_names=NAMES[:1], **options)
    start = {"fog": stream(seed=1) - 1, "night": stream(seed=2) * 2}
    return cn_hf.add_contexts(model, start=start, reference={"source": stream(seed=4) - 0.5})


def rows(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: tuple(rows_of(slot)) for name, slot in calibrated_slots(model).items()}


def same(found: dict[str, tuple[Tensor, ...]], expected: dict[str, tuple[Tensor, ...]], tolerance: float = 0) -> bool:
    pairs = [(a, b) for name, pair in expected.items() for a, b in zip(found[name], pair, strict=True)]
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {}),
        (hf_vit, {}),
        (small_convnet, {}),
        (small_convnet, {"parametrization": "table"}),
        (small_convnet, {"variance_activation": "exp"}),
        (small_convnet, {"mode": "dsbn", "where": "norms"}),
    ],
)
def test_the_context_alone_moves_towards_what_is_measured(make: Callable[[], nn.Module], options: Any) -> None:
    model = adapted(make, **options)
    before = rows(model)
    cn_hf.set_inference(model, track=0.003, track_contexts=["fog"])
    x = stream()
    first = logits(model(x, context_ids="fog"))
    for _ in range(120):
        logits(model(x, context_ids="fog"))
    after = rows(model)
    goal = rows(cn_hf.calibrate(copy.deepcopy(model), {"fog": x}, reference="source"))
    for name, (mean, variance) in goal.items():
        for row in (0, 2):
            assert all(torch.equal(a[row], b[row]) for a, b in zip(after[name], before[name], strict=True))
        deviation = variance[1].sqrt()
        assert float(((after[name][0][1] - mean[1]) / deviation).abs().max()) < 0.3, name
        assert float((after[name][1][1] / variance[1]).log().abs().max()) < 0.3, name
    assert not torch.equal(first, logits(model(x, context_ids="fog")))


def test_an_image_counts_the_same_in_any_batch() -> None:
    x, ids = stream(24), torch.tensor([1, 0, 1, 2] * 6)
    found = []
    for size in (1, 5, 24):
        model = cn_hf.patch_model(OneNorm().eval(), context_names=NAMES)
        cn_hf.set_inference(model, track=0.05, track_contexts=["fog", "night"])
        for part, part_ids in zip(x.split(size), ids.split(size), strict=True):
            model(part, context_ids=part_ids)
        found.append(rows(model)["norm"])
    for mean, variance in found[1:]:
        torch.testing.assert_close(mean, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance, found[0][1], rtol=1e-5, atol=1e-6)
    mean, square = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for image in x[ids == 1].double():
        mean = 0.95 * mean + 0.05 * image.mean((1, 2))
        square = 0.95 * square + 0.05 * image.square().mean((1, 2))
    torch.testing.assert_close(found[0][0][1], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1][1], square - mean.square(), rtol=1e-4, atol=1e-4)


def test_outputs_are_those_of_the_rows_before_the_batch() -> None:
    model = adapted(small_convnet)
    expected = model(stream(), context_ids="fog")
    cn_hf.set_inference(model, track=0.5, track_contexts=["fog"])
    assert difference(model(stream(), context_ids="fog"), expected) <= 1e-5


@pytest.mark.parametrize("make", [vit, small_convnet])
def test_a_reference_may_be_tracked_itself(make: Callable[[], nn.Module]) -> None:
    model = adapted(make)
    kept = rows(model)
    cn_hf.set_inference(model, track=0.003, track_contexts=["source"])
    for _ in range(20):
        model(stream(seed=4) - 0.5, context_ids="source")  # its own images: it stays
    for name, (mean, variance) in rows(model).items():
        torch.testing.assert_close(mean[0], kept[name][0][0], rtol=0.05, atol=0.02)
        torch.testing.assert_close(variance[0], kept[name][1][0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("make", [vit, hf_vit, small_convnet], ids=lambda f: f.__name__)
def test_a_restart_from_a_checkpoint_gives_the_same(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = cn_hf.set_inference(adapted(make), track=0.05, track_contexts=["fog", "source"])
    parts = stream(24).split(8)
    model(parts[0], context_ids="fog")
    model(parts[1], context_ids="source")
    cn_hf.save_pretrained(model, tmp_path)
    again = cn_hf.from_pretrained(tmp_path, model=None if make is hf_vit else make()).eval()
    assert again.router.tracking.to_dict() == {"rate": 0.05, "contexts": [1, 0]}
    others = [again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    kept = rows(model)
    for one in others:
        assert one.router.tracking is not model.router.tracking
        logits(one(parts[2], context_ids=["fog", "source"] * 4))
    assert same(rows(model), kept)
    logits(model(parts[2], context_ids=["fog", "source"] * 4))
    assert not same(rows(model), kept)
    assert all(same(rows(one), rows(model), 1e-6) for one in others)


def test_refused_in_training_compiled_and_traced() -> None:
    model = cn_hf.set_inference(adapted(small_convnet), track=0.05, track_contexts=["fog"])
    x, ids, kept = stream(4), torch.ones(4, dtype=torch.int64), rows(model)
    with pytest.raises(PatchError, match="training mode"):
        model.train()(x, context_ids="fog")
    model.eval()
    with pytest.raises(PatchError, match="compiled"):
        torch.compile(model, backend="eager")(x, context_ids=ids)
    with pytest.raises(Exception, match=r"PatchError|compiled"):
        torch.compile(model, backend="eager", fullgraph=True)(x, context_ids=ids)
    with pytest.raises(Exception, match=r"PatchError|compiled"):
        torch.export.export(model, (x,), {"context_ids": ids})
    with pytest.raises(PatchError, match="traced"):
        torch.jit.trace(lambda y: model(y, context_ids=ids), x)
    assert same(rows(model), kept)
    model(x, context_ids=ids)
    assert not same(rows(model), kept)


def test_it_is_switched_off_and_left() -> None:
    model = cn_hf.set_inference(adapted(small_convnet), track=0.05, track_contexts=["fog"])
    cn_hf.set_inference(model, "cn")
    assert model.router.tracking.rate == 0.05
    cn_hf.set_inference(model, track=0.1)
    assert model.router.tracking.to_dict() == {"rate": 0.1, "contexts": [1]}
    for off in (None, 0):
        cn_hf.set_inference(model, track=0.1)
        cn_hf.set_inference(model, track=off)
        kept = rows(model)
        model(stream(), context_ids="fog")
        assert all(torch.equal(a, b) for n, pair in rows(model).items() for a, b in zip(pair, kept[n], strict=True))
    assert cn_hf.set_inference(model, track=0.1).router.tracking.contexts == (1, 2)


def test_only_hard_ids_move_contexts_and_measurements_none() -> None:
    model = cn_hf.set_inference(adapted(small_convnet), track=0.05, track_contexts=["fog"])
    kept = rows(model)
    model(stream(), context_ids=torch.tensor([[0.0, 1.0, 0.0]]).expand(32, 3))
    model(stream(), context_ids="night")
    model(stream())
    record_moments(model, {"fog": stream()})
    assert same(rows(model), kept)


def test_one_bad_image_does_not_ruin_a_context() -> None:
    model = cn_hf.set_inference(adapted(small_convnet), track=0.05, track_contexts=["fog"])
    model(torch.full((1, 3, 16, 16), float("nan")), context_ids="fog")
    model(torch.zeros(0, 3, 16, 16), context_ids="fog")
    assert bool(model(stream(), context_ids="fog").isfinite().all())


def test_contexts_that_share_a_dimension_are_parted_again() -> None:
    model = cn_hf.set_inference(adapted(small_convnet), track=0.05, track_contexts=["fog"])
    width = model.context_config.embedding_dim
    cn_hf.add_contexts(model, "rain", start="fog")
    kept = model(stream(), context_ids="rain")
    model(stream(), context_ids="fog")
    assert model.context_config.embedding_dim == width + 1
    assert torch.equal(model(stream(), context_ids="rain"), kept)
    cn_hf.remove_contexts(model, "source")
    assert model.router.tracking.contexts == (0,)


def test_calls_of_methods_blocks_and_threads_count_their_images() -> None:
    model, x = adapted(vit), stream(8)
    one = cn_hf.set_inference(copy.deepcopy(model), track=0.05, track_contexts=["fog"])
    one(x, context_ids=[1] * 8)
    expected = rows(one)
    in_block = cn_hf.set_inference(copy.deepcopy(model), track=0.05, track_contexts=["fog"])
    with cn_hf.use_contexts(in_block, "fog"):
        in_block(x)
    by_method = cn_hf.set_inference(copy.deepcopy(model), track=0.05, track_contexts=["fog"])
    by_method.forward_features(x, context_ids="fog")
    in_thread = cn_hf.set_inference(copy.deepcopy(model), track=0.05, track_contexts=["fog"])
    threads = [threading.Thread(target=in_thread, args=(x,), kwargs={"context_ids": c}) for c in ("fog", "night", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in (in_block, by_method, in_thread):
        for name, pair in rows(other).items():
            if "fc_norm" not in name:
                assert all(difference(a, b) <= 1e-6 for a, b in zip(pair, expected[name], strict=True)), name


@pytest.mark.parametrize(
    "options",
    [
        {"track": -0.1},
        {"track": 1.5},
        {"track": float("nan")},
        {"track": True},
        {"track": "fast"},
        {"track": 0.05, "track_contexts": ["rain"]},
        {"track": 0.05, "track_contexts": []},
        {"track": 0.05, "track_contexts": [1, "fog"]},
        {"track_contexts": ["fog"]},
    ],
)
def test_wrong_options_are_errors_and_change_nothing(options: dict[str, Any]) -> None:
    model = adapted(small_convnet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CnHfError):
        cn_hf.set_inference(model, **options)
    assert model.router.tracking is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_without_statistics_need_moments() -> None:
    model = cn_hf.patch_model(vit(), context_names=NAMES).eval()
    with pytest.raises(PatchError, match="stores no statistics"):
        cn_hf.set_inference(model, track=0.05, track_contexts=["fog"])


@seeded
def digits_network(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), norm(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda count: nn.GroupNorm(4, count)], ids=["batch", "group"])
def test_noise_that_grows_costs_a_tracked_context_less(norm: Callable[[int], nn.Module]) -> None:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[order, None], torch.tensor(digits.target)[order]
    x = (x - x.mean()) / x.std()
    model = digits_network(norm).train()
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(6):
        for batch in torch.randperm(1000, generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    cn_hf.adapt(model.eval(), {"camera": x[:64]}, reference=x[64:320])
    noise = torch.randn(600, 1, 8, 8, generator=generator).abs() * torch.linspace(0, 1.5, 600)[:, None, None, None]
    drifting, labels = x[1000:1600] + noise, y[1000:1600]
    tracked = cn_hf.set_inference(copy.deepcopy(model), track=0.02, track_contexts=["camera"])
    with torch.no_grad():
        right = [
            torch.cat([m(part, context_ids="camera") for part in drifting.split(8)]).argmax(1)[300:] == labels[300:]
            for m in (model, tracked)
        ]
    fixed, followed = (float(part.float().mean()) for part in right)
    assert followed > fixed + 0.05, (followed, fixed)
