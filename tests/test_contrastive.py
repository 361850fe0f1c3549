"""Contrastive loss, pairs and verification, each against a slow and obvious version; the loop's seam for objectives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from data_for_tests import assert_same, pixels, together
from sklearn.metrics import roc_curve
from torch import Tensor, nn
from training_runs import batches, network

import cn_hf
from cn_hf.data import DeviceBatches, build_augmentation
from cn_hf.errors import ConfigError, DatasetError, InputShapeError, TrainingError
from cn_hf.recipes.siamese.objective import Contrastive, contrastive_loss, embed, held_out_distances
from cn_hf.recipes.siamese.pairs import PairBatches, draw_pairs
from cn_hf.recipes.siamese.verification import (
    best_threshold,
    context_groups,
    equal_error_rate,
    evaluation_pairs,
    pair_distances,
    verify,
)
from cn_hf.training.config import TrainingConfig
from cn_hf.training.objective import Batch, CrossEntropy, StepInfo, StepLoss
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.supervised import fit

IDENTITIES = torch.tensor([3, 1, 1, 0, 3, 3, 1, 7, 0, 3, 1, 0])


def identity_images(**options: object) -> DeviceBatches:
    contexts = torch.arange(12) % 2
    settings = {"batch_size": 5, "seed": 4, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), **options}
    return DeviceBatches(pixels(12), IDENTITIES, contexts, rows=torch.arange(12) + 100, **settings)


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_the_loss_is_that_of_the_formula(margin: float) -> None:
    distances = torch.tensor([0.0, 0.2, 0.5, 1.0, 2.9, 4.0], dtype=torch.float64)
    for different in (0, 1):
        expected = [(1 - different) / 2 * d**2 + different / 2 * max(0.0, margin - d) ** 2 for d in distances.tolist()]
        labels = torch.full((6,), different)
        torch.testing.assert_close(contrastive_loss(distances, labels, margin), torch.tensor(expected).double())


def test_gradients_are_those_of_hadsell_eqs_5_and_6() -> None:
    points = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[3, 1] = points[3, 0]  # a distance of 0
    points.requires_grad_()
    different, margin = torch.tensor([0, 1, 0, 1]), 2.5
    distances = torch.linalg.vector_norm(points[:, 0] - points[:, 1], dim=1)
    contrastive_loss(distances, different, margin).sum().backward()
    apart = (points[:, 0] - points[:, 1]).detach()
    for row in range(4):
        d = float(distances[row].detach())
        pull = apart[row] if different[row] == 0 else (-max(0.0, margin - d) / d * apart[row] if d else 0 * apart[row])
        torch.testing.assert_close(points.grad[row], torch.stack([pull, -pull]))


def test_wrong_margins_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="margin must be positive, got 0"):
        contrastive_loss(torch.ones(2), torch.ones(2), 0)
    with pytest.raises(ConfigError, match="margin must be positive, got -1"):
        Contrastive(-1)
    with pytest.raises(InputShapeError, match=r"\(2,\) distances and \(3,\) labels"):
        contrastive_loss(torch.ones(2), torch.ones(3))


def test_the_objective_runs_both_images_through_the_network_with_their_contexts() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=6)
    cn_hf.patch_model(model, "cn-channels", where="input", context_names=["day", "night"], init="random")
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randn(5, 3, 32, 32, generator=generator) for name in ("pixel_values", "other_pixel_values")}
    batch |= {"context_ids": torch.tensor([0, 1, 0, 1, 1]), "other_context_ids": torch.tensor([1, 1, 0, 0, 1])}
    batch["labels"] = torch.tensor([0, 1, 0, 1, 1])
    model.eval()
    step = Contrastive(1.5)(model, batch, StepInfo(0, 1, torch.tensor(5.0)))
    loss, correct = 0.0, 0
    for row in range(5):
        a = model(batch["pixel_values"][row : row + 1], context_ids=batch["context_ids"][row : row + 1])
        b = model(batch["other_pixel_values"][row : row + 1], context_ids=batch["other_context_ids"][row : row + 1])
        d, y = float((a - b).detach().norm()), int(batch["labels"][row])
        loss += (1 - y) / 2 * d**2 + y / 2 * max(0.0, 1.5 - d) ** 2
        correct += (d > 0.75) == bool(y)
    assert step.loss.item() == pytest.approx(loss, rel=1e-4)
    assert int(step.correct) == correct
    empty = {name: value[:0] for name, value in batch.items()}
    nothing = Contrastive(1.5)(model.train(), empty, StepInfo(0, 1, torch.tensor(5.0)))
    nothing.loss.backward()
    assert nothing.loss.item() == 0


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_of_the_kind_they_are_labelled() -> None:
    met: set[tuple[int, int]] = set()
    for epoch in range(40):
        first, second, different = draw_pairs(IDENTITIES, seed=2, epoch=epoch)
        assert sorted(first.tolist()) == list(range(12))
        assert bool(((IDENTITIES[first] != IDENTITIES[second]) == different).all())
        assert not bool((first == second).any())
        alone = IDENTITIES[first] == 7  # the only one of its kind
        assert bool(different[alone].all())
        assert bool(different[1::2].all())
        assert not bool(different[0::2][~alone[0::2]].any())
        met |= set(zip(first.tolist(), second.tolist(), strict=True))
    possible = set(itertools.permutations(range(12), 2))
    same = {(a, b) for a, b in possible if IDENTITIES[a] == IDENTITIES[b]}
    assert same <= met
    assert len(met & (possible - same)) > 80


def test_partners_are_drawn_evenly() -> None:
    counts = np.zeros((12, 12))
    for epoch in range(2000):
        first, second, _ = draw_pairs(IDENTITIES, seed=0, epoch=epoch)
        counts[first, second] += 1
    same = counts[0, [4, 5, 9]]  # about 333 each
    other = counts[0, [1, 2, 3, 6, 7, 8, 10, 11]]  # about 125 each
    assert same.min() > 260
    assert same.max() < 410
    assert other.min() > 75
    assert other.max() < 180


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    draws = [draw_pairs(IDENTITIES, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draw_pairs(IDENTITIES, seed=0, epoch=0), strict=True))
    assert not torch.equal(draws[0].first, draws[1].first)
    assert not torch.equal(draws[0].second, draws[2].second)


def test_views_are_pairs_of_an_image_with_itself() -> None:
    first, second, different = draw_pairs(torch.arange(9), seed=0, epoch=0, views=True)
    assert torch.equal(first == second, ~different)
    assert int(different.sum()) == 4


def test_one_identity_makes_no_pairs() -> None:
    with pytest.raises(DatasetError, match="all 6 images are of one"):
        draw_pairs(torch.zeros(6, dtype=torch.int64), seed=0, epoch=0)


def test_batches_hold_both_images_with_their_contexts_and_rows() -> None:
    images = identity_images()
    pairs = PairBatches(images)
    assert (len(pairs), pairs.num_samples) == (3, 12)
    pairs.set_epoch(3)
    drawn = draw_pairs(IDENTITIES, seed=4, epoch=3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    everything = together(list(pairs))
    assert torch.equal(everything["labels"], drawn.different.long())
    for prefix, chosen in (("", drawn.first), ("other_", drawn.second)):
        assert torch.equal(everything[f"{prefix}index"], chosen + 100)
        assert torch.equal(everything[f"{prefix}context_ids"], chosen % 2)
        expected = (pixels(12)[chosen] / 255 - mean) / std
        torch.testing.assert_close(everything[f"{prefix}pixel_values"], expected)


def test_processes_share_a_batch_and_augment_as_one() -> None:
    augment = build_augmentation(("flip", "zoom", "rotation"))
    whole = list(PairBatches(identity_images(augment=augment)))
    parts = [
        list(PairBatches(identity_images(augment=augment, num_processes=3, process_index=rank))) for rank in range(3)
    ]
    assert_same(whole, [together(list(step)) for step in zip(*parts, strict=True)], atol=1e-6)
    again = PairBatches(identity_images(augment=augment))
    again.set_epoch(0, start=2)
    assert_same(whole[2:], again)


def test_two_views_differ() -> None:
    pairs = PairBatches(identity_images(augment=build_augmentation(("flip", "zoom", "rotation"))), views=True)
    batch = together(list(pairs))
    same = batch["labels"] == 0
    assert torch.equal(batch["index"][same], batch["other_index"][same])
    apart = (batch["pixel_values"][same] - batch["other_pixel_values"][same]).abs().amax((1, 2, 3))
    assert bool((apart > 0.1).all())
    with pytest.raises(ConfigError, match="two views of an image need augmentation"):
        PairBatches(identity_images(), views=True)


# -------------------------------------------------------------------------------------------------------- verification


def test_the_threshold_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2, 7, 40):
        distances = torch.randint(0, 9, (count,), generator=generator) / 4
        different = torch.rand(count, generator=generator) < distances / 2
        right = [int(((distances > t) == different).sum()) for t in [-1.0, *(distances + 0.125).tolist()]]
        chosen = best_threshold(distances, different)
        assert int(((distances > chosen) == different).sum()) == max(right)


def test_the_equal_error_rate_is_where_both_errors_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    different = torch.rand(4000, generator=generator) < 0.3
    distances = torch.randn(4000, generator=generator) + 1.5 * different
    rate = equal_error_rate(distances, different)
    thresholds = distances.sort().values
    gaps = [
        (abs(float((distances[~different] > t).float().mean()) - float((distances[different] <= t).float().mean())), t)
        for t in thresholds[::7]
    ]
    crossing = min(gaps)[1]
    assert rate == pytest.approx(float((distances[~different] > crossing).float().mean()), abs=0.005)
    assert equal_error_rate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True])) == 0
    assert equal_error_rate(torch.tensor([3.0, 1.0]), torch.tensor([False, True])) == 1
    false_rate, true_rate, _ = roc_curve([0, 1, 0, 1], [1, 2, 3, 4], drop_intermediate=False)
    assert equal_error_rate(torch.tensor([1.0, 2, 3, 4]), torch.tensor([False, True, False, True])) == 0.5
    assert (false_rate.tolist(), true_rate.tolist()) == ([0, 0, 0.5, 0.5, 1], [0, 0.5, 0.5, 1, 1])


def test_verification_counts_and_its_errors() -> None:
    distances = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.7, 0.2])
    different = torch.tensor([False, True, False, True, False, True])
    pairs = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3], [4, 5], [1, 5]])
    result = verify(distances, different, 0.5, pairs=pairs, bootstraps=50)
    assert (result.pairs, result.same, result.correct) == (6, 3, 4)
    assert result.accuracy_error == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    right_order = sum(b > a for a in (0.1, 0.4, 0.7) for b in (0.9, 0.8, 0.2))
    assert result.roc_auc == pytest.approx(right_order / 9)
    assert result.roc_auc_error is not None
    assert 0 < result.roc_auc_error < 0.5
    one_kind = verify(distances[:1], different[:1], 0.5)
    assert (one_kind.accuracy, one_kind.roc_auc, one_kind.equal_error_rate) == (1.0, None, None)
    with pytest.raises(ConfigError, match="must be finite"):
        verify(torch.tensor([float("nan")]), torch.tensor([True]), 0.5)
    with pytest.raises(InputShapeError, match=r"shapes \(6,\) and \(5,\)"):
        verify(distances, different[:5], 0.5)


def test_evaluation_pairs_are_fixed_and_even() -> None:
    pairs = evaluation_pairs(IDENTITIES, seed=1)
    same = IDENTITIES[pairs[:, 0]] == IDENTITIES[pairs[:, 1]]
    assert (int(same.sum()), int((~same).sum())) == (6 + 6 + 3, 15)
    assert len({tuple(pair) for pair in pairs.tolist()}) == 30
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    assert torch.equal(pairs, evaluation_pairs(IDENTITIES, seed=1))
    assert not torch.equal(pairs, evaluation_pairs(IDENTITIES, seed=2))
    assert len(evaluation_pairs(IDENTITIES, most=4)) == 8
    views = evaluation_pairs(torch.arange(5), views=True)
    assert views[:5].tolist() == [[i, i] for i in range(5)]
    with pytest.raises(DatasetError, match="12 images of 1 identities make no pair of different objects"):
        evaluation_pairs(torch.zeros(12, dtype=torch.int64))
    with pytest.raises(DatasetError, match="no pair of the same object"):
        evaluation_pairs(torch.arange(5))


@pytest.mark.parametrize("most_images", [512, 3])
def test_evaluation_pairs_of_more_images_than_can_be_listed(monkeypatch: pytest.MonkeyPatch, most_images: int) -> None:
    identities = torch.arange(300) % 20
    everything = evaluation_pairs(identities, most=10**6)
    monkeypatch.setattr("cn_hf.recipes.siamese.verification._MOST_PAIRS", 2000)
    monkeypatch.setattr("cn_hf.recipes.siamese.verification._MOST_IMAGES", most_images)
    pairs = evaluation_pairs(identities, most=50)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == 100
    assert {tuple(pair) for pair in pairs.tolist()} <= {(a, b) for a in range(300) for b in range(a + 1, 300)}
    assert (identities[pairs[:, 0]] == identities[pairs[:, 1]]).tolist() == [True] * 50 + [False] * 50
    assert torch.equal(pairs, evaluation_pairs(identities, most=50))
    assert int((identities[everything[:, 0]] == identities[everything[:, 1]]).sum()) == 20 * 15 * 14 // 2


def test_perfect_accuracy_is_not_certain() -> None:
    found = verify(torch.tensor([0.0, 0.1, 2.0, 3.0]), torch.tensor([False, False, True, True]), 1.0)
    assert (found.accuracy, found.accuracy_error) == (1.0, pytest.approx((5 / 6 * 1 / 6 / 4) ** 0.5))


def test_distances_and_groups_by_context() -> None:
    outputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    pairs = evaluation_pairs(IDENTITIES)
    expected = [float((outputs[a].double() - outputs[b].double()).norm()) for a, b in pairs.tolist()]
    torch.testing.assert_close(pair_distances(outputs, pairs), torch.tensor(expected).double())
    contexts = torch.arange(12) % 2
    groups = context_groups(contexts[pairs[:, 0]], contexts[pairs[:, 1]], ("day", "night"))
    assert list(groups) == ["day-day", "day-night", "night-night"]
    assert bool((torch.stack(list(groups.values())).sum(0) == 1).all())
    assert context_groups(torch.tensor([1]), torch.tensor([1]), ("day", "night")).keys() == {"night-night"}


class Flat(nn.Module):
    """Outputs are the image's channel means, which tests can compute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3))


def test_embeddings_come_in_the_order_of_rows() -> None:
    accelerator = make_accelerator(TrainingConfig(model="x"))
    shuffled = identity_images(shuffle=True)
    embeddings = embed(Flat(), shuffled, accelerator)
    assert torch.equal(embeddings.identities, IDENTITIES)
    assert embeddings.contexts is not None
    assert torch.equal(embeddings.contexts, torch.arange(12) % 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (shuffled.mean, shuffled.std))
    torch.testing.assert_close(embeddings.outputs, ((pixels(12) / 255 - mean) / std).mean((2, 3)))
    with pytest.raises(TrainingError, match="no images to verify"):
        embed(Flat(), [], accelerator)


def test_views_are_judged_on_two_augmented_images() -> None:
    accelerator = make_accelerator(TrainingConfig(model="x"))
    images = identity_images(augment=build_augmentation(("zoom",)))
    found = held_out_distances(Flat(), images, accelerator, views=True)
    assert len(found.distances) == 24
    assert bool((found.distances[:12] > 0).all())
    assert images.epoch == 0
    again = held_out_distances(Flat(), images, accelerator, views=True)
    assert torch.equal(found.distances, again.distances)


def test_validation_gives_loss_and_accuracy_of_fixed_pairs() -> None:
    accelerator = make_accelerator(TrainingConfig(model="x"))
    loss, accuracy = Contrastive(2.0).validate(Flat(), identity_images(), accelerator)
    found = held_out_distances(Flat(), identity_images(), accelerator)
    assert loss == pytest.approx(float(contrastive_loss(found.distances, found.different, 2.0).mean()))
    threshold = best_threshold(found.distances, found.different)
    assert accuracy == float(((found.distances > threshold) == found.different).double().mean())
    assert 0.5 <= accuracy <= 1


# ------------------------------------------------------------------------------------------------- the seam of the loop


class Counting(CrossEntropy):
    """Cross entropy that also measures two things, and remembers when it was asked."""

    metrics = ("twice", "brightness")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[StepInfo] = []

    def __call__(self, model: nn.Module, batch: Batch, info: StepInfo) -> StepLoss:
        step = super().__call__(model, batch, info)
        self.seen.append(info)
        brightness = batch["pixel_values"].mean((1, 2, 3)).sum()
        return step._replace(further=torch.stack([2 * step.loss, brightness]))

    def validate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, float]:
        return 0.25, 0.75


def test_further_metrics_reach_the_history_and_the_moment_the_objective(tmp_path: Path) -> None:
    config = TrainingConfig(model="m", epochs=2, batch_size=20, accumulation_steps=2, progress=False)
    train = batches(config, 0, 1, training=True)
    objective = Counting()
    history = fit(
        network("bn"), train, train, config=config, accelerator=make_accelerator(config),
        objective=objective, output_dir=tmp_path,
    )  # fmt: skip
    assert history.curve("twice") == pytest.approx([2 * loss for loss in history.curve("train_loss")], rel=1e-5)
    assert len(history.curve("brightness")) == 2
    assert history.curve("validation_accuracy") == [0.75, 0.75]
    assert [info.step for info in objective.seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert {info.steps for info in objective.seen} == {6}
    assert [int(info.images) for info in objective.seen[::2]] == [20, 20, 6] * 2
    assert type(history).from_dict(history.to_dict()).curve("twice") == history.curve("twice")
