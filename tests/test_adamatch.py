"""AdaMatch term by term against numpy, its batches, and RandAugment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from adamatch_runs import CLASSES, CONFIG, batches
from torch import Tensor, nn

from cn_hf.errors import ConfigError, InputShapeError, TrainingError
from cn_hf.recipes.adamatch.config import AdaMatchConfig
from cn_hf.recipes.adamatch.data import ImageStandardization, TwoViewBatches
from cn_hf.recipes.adamatch.neighbours import Neighbours
from cn_hf.recipes.adamatch.objective import AdaMatch, align, interpolate, kept_statistics, relative_threshold, warm_up
from cn_hf.recipes.adamatch.randaugment import OPERATIONS, RandAugment
from cn_hf.training.objective import StepInfo
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.supervised import fit

K, LABELLED, UNLABELLED, FEATURES = 4, 5, 9, 6
EPS = 1e-5


# ------------------------------------------------------------------------------------------------ a slow reference


def softmax(z: np.ndarray) -> np.ndarray:
    rows = []
    for row in z:
        exponentials = [math.exp(value - max(row)) for value in row]
        rows.append([value / sum(exponentials) for value in exponentials])
    return np.array(rows)


def entropy(target: np.ndarray, logits: np.ndarray) -> np.ndarray:
    probabilities = softmax(logits)
    return np.array([-sum(t * math.log(p) for t, p in zip(*pair, strict=True)) for pair in zip(target, probabilities, strict=True)])  # fmt: skip  # noqa: E501


def network(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A batch norm over the rows given, then a linear layer."""
    normalised = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + EPS)
    return normalised @ weight.T + bias


class Reference:
    """One step, image by image, from the publication's formulas."""

    def __init__(self, x: dict[str, np.ndarray], labels: np.ndarray, weights: np.ndarray, tau: float, how: str) -> None:
        self.x, self.labels, self.weights, self.tau, self.how = x, np.eye(K)[labels], weights, tau, how

    def logits(self, weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        x = self.x
        joint = network(np.concatenate([x["lw"], x["ls"], x["uw"], x["us"]]), weight, bias)
        alone = network(np.concatenate([x["lw"], x["ls"]]), weight, bias)
        n, z = LABELLED, {}
        for name, part, view in (("lw", slice(0, n), 0), ("ls", slice(n, 2 * n), 1)):
            w = self.weights[:, view]
            z[name] = w * joint[part] + (1 - w) * alone[part]
        z["uw"], z["us"] = joint[2 * n : 2 * n + UNLABELLED], joint[2 * n + UNLABELLED :]
        return z

    def pseudo_labels(self, z: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
        known, predicted = softmax(z["lw"]), softmax(z["uw"])
        expected, met = known.mean(axis=0), predicted.mean(axis=0)
        if self.how == "overall":
            expected, met = known.mean(), predicted.mean()
        aligned = np.array([row * (expected + 1e-6) / (met + 1e-6) for row in predicted])
        aligned = np.array([row / row.sum() for row in aligned])
        threshold = self.tau * np.mean([max(row) for row in known])
        return aligned, np.array([float(max(row) >= threshold) for row in aligned]), float(threshold)

    def terms(self, z: dict[str, np.ndarray], target: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
        known = entropy(self.labels, z["lw"]).mean() + entropy(self.labels, z["ls"]).mean()
        return float(known), float((entropy(target, z["us"]) * mask).mean())


class Net(nn.Module):
    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(FEATURES, eps=EPS, affine=False).double()
        self.linear = nn.Linear(FEATURES, K).double()
        self.linear.weight.data, self.linear.bias.data = torch.tensor(weight), torch.tensor(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).flatten(1))


@pytest.mark.parametrize("how", ["per class", "overall"])
def test_a_step_is_the_references_term_by_term(how: str) -> None:
    generator = np.random.default_rng(0)
    sizes = {"lw": LABELLED, "ls": LABELLED, "uw": UNLABELLED, "us": UNLABELLED}
    x = {name: generator.normal(size=(size, FEATURES)) for name, size in sizes.items()}
    weight, bias = generator.normal(size=(K, FEATURES)), generator.normal(size=K)
    labels, mixing = generator.integers(K, size=LABELLED), generator.uniform(size=(LABELLED, 2, K))
    reference = Reference(x, labels, mixing, 0.9, how)
    logits = reference.logits(weight, bias)
    target, mask, threshold = reference.pseudo_labels(logits)
    assert 0 < mask.sum() < UNLABELLED  # else the mask would not be tested
    known, unknown = reference.terms(logits, target, mask)
    step, steps = 30, 100
    mu = 0.5 - math.cos(min(math.pi, 2 * math.pi * step / steps)) / 2

    def loss_at(weight: np.ndarray, bias: np.ndarray) -> float:
        first, second = reference.terms(reference.logits(weight, bias), target, mask)
        return first + mu * second

    net = Net(weight, bias)
    batch = {
        "pixel_values": torch.tensor(np.concatenate([x["lw"], x["uw"]])).view(-1, FEATURES, 1, 1),
        "strong_pixel_values": torch.tensor(np.concatenate([x["ls"], x["us"]])).view(-1, FEATURES, 1, 1),
        "labels": torch.tensor(labels),
        "interpolation": torch.tensor(mixing),
    }
    objective = AdaMatch(Accelerator(cpu=True), tau=0.9, alignment=how)
    result = objective(net, batch, StepInfo(step, steps, torch.tensor(float(LABELLED))))
    assert result.further is not None
    measured = dict(zip(objective.metrics, (result.further / LABELLED).tolist(), strict=True))
    assert measured == pytest.approx(
        {"labelled_loss": known, "unlabelled_loss": unknown, "confident": mask.mean(), "threshold": threshold}, rel=1e-9
    )
    assert float(result.loss.detach()) / LABELLED == pytest.approx(known + mu * unknown, rel=1e-9)
    assert int(result.correct) == int((logits["lw"].argmax(axis=1) == labels).sum())

    (result.loss / LABELLED).backward()
    for parameter, values in ((net.linear.weight, weight), (net.linear.bias, bias)):
        expected = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            changed = [values.copy(), values.copy()]
            changed[0][place] += 1e-6
            changed[1][place] -= 1e-6
            pair = [loss_at(c, bias) if values is weight else loss_at(weight, c) for c in changed]
            expected[place] = (pair[0] - pair[1]) / 2e-6
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-6, atol=1e-8)

    alone = Net(weight, bias)  # the forward of the labelled images alone has left no trace
    alone(torch.cat([torch.tensor(x[name]).view(-1, FEATURES, 1, 1) for name in ("lw", "ls", "uw", "us")]))
    assert torch.equal(net.norm.running_mean, alone.norm.running_mean)
    assert torch.equal(net.norm.running_var, alone.norm.running_var)
    assert int(net.norm.num_batches_tracked) == 1


def test_alignment() -> None:
    predictions = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.5, 0.0]], dtype=torch.float64)
    same = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(align(predictions, same, same), predictions)
    torch.testing.assert_close(align(predictions, same, same.flip(0), "overall"), predictions)  # as in that code: no-op
    aligned = align(predictions, same, same.flip(0))
    torch.testing.assert_close(aligned[0], torch.tensor([0.24, 0.3, 0.25], dtype=torch.float64) / 0.79, atol=1e-5, rtol=0)  # fmt: skip  # noqa: E501
    never = align(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    assert bool(never.isfinite().all())  # a class that nothing is predicted as


def test_warm_up_threshold_and_interpolation() -> None:
    assert [warm_up(step, 100) for step in (0, 25, 50, 99)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert float(relative_threshold(torch.tensor(0.5), 0.9)) == pytest.approx(0.45)
    joint, alone = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert interpolate(joint, alone, torch.tensor([1.0, 0.25])).tolist() == [1.0, 5.0]


def test_kept_statistics_are_moved_again_afterwards() -> None:
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), kept_statistics(nn.Sequential(norm)):
        nn.Sequential(norm, nn.Linear(5, 1))(x)
    assert torch.equal(norm.running_mean, before)
    assert int(norm.num_batches_tracked) == 0
    norm(x)
    assert int(norm.num_batches_tracked) == 1


# ----------------------------------------------------------------------------------------------------------- batches


def test_batches_hold_labelled_images_first_in_two_views() -> None:
    data = batches(CONFIG)
    assert (len(data), data.num_samples, data.num_rows) == (3, 15, 50)
    batch = next(iter(data))
    assert batch["pixel_values"].shape == batch["strong_pixel_values"].shape == (15, 3, 9, 9)
    assert batch["labels"].shape == (5,)
    assert batch["interpolation"].shape == (5, 2, CLASSES)
    assert batch["context_ids"].tolist() == [0] * 5 + [1] * 10
    assert torch.equal(batch["labels"], data.labelled.labels[batch["index"][:5]])
    assert not torch.equal(batch["pixel_values"], batch["strong_pixel_values"])
    assert 0 <= float(batch["interpolation"].min()) < float(batch["interpolation"].max()) <= 1


def test_every_image_is_met_equally_often() -> None:
    data = batches(CONFIG)
    met: list[list[int]] = [[], []]
    for epoch in range(11):  # 33 steps: 165 labelled images of 17, 330 unlabelled of 33
        data.set_epoch(epoch)
        for batch in data:
            met[0] += batch["index"][:5].tolist()
            met[1] += batch["index"][5:].tolist()
    for numbers, count in zip(met, (17, 33), strict=True):
        for turn in range(len(numbers) // count):
            assert sorted(numbers[turn * count : (turn + 1) * count]) == list(range(count))


def test_a_pass_can_begin_anywhere_and_be_shared() -> None:
    whole = batches(CONFIG)
    whole.set_epoch(2)
    expected = list(whole)
    late = batches(CONFIG)
    late.set_epoch(2, start=1)
    for got, want in zip(late, expected[1:], strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)
    parts = [batches(CONFIG, rank, 2) for rank in (0, 1)]
    for part in parts:
        part.set_epoch(2)
    for *got, want in zip(*parts, expected, strict=True):
        counts = [len(part["labels"]) for part in got]
        assert sum(counts) == 5
        for name in ("pixel_values", "strong_pixel_values", "index", "context_ids"):
            labelled = [part[name][:count] for part, count in zip(got, counts, strict=True)]
            others = [part[name][count:] for part, count in zip(got, counts, strict=True)]
            torch.testing.assert_close(torch.cat(labelled + others), want[name])
        assert torch.equal(torch.cat([part["interpolation"] for part in got]), want["interpolation"])


def test_few_labelled_images_are_repeated() -> None:
    data = batches(CONFIG.replace(batch_size=20))
    batch = next(iter(data))
    assert len(batch["labels"]) == 20
    assert set(batch["index"][:20].tolist()) == set(range(17))


def test_more_processes_than_labelled_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 5 leaves some of 6 processes without labelled images; use 6"):
        batches(CONFIG, 0, 6)


def test_fingerprint_tells_data_apart() -> None:
    data, other = batches(CONFIG), batches(CONFIG)
    assert data.fingerprint() == other.fingerprint()
    other.unlabelled.images[3, 0, 0, 0] += 1
    assert data.fingerprint() != other.fingerprint()


def test_images_standardised_one_by_one() -> None:
    images = torch.rand(3, 3, 5, 5)
    images[1, 2] = 0.7
    out = ImageStandardization()(images, seed=0, places=torch.arange(3), total=3)
    torch.testing.assert_close(out.mean((-2, -1)), torch.zeros(3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[0].std((-2, -1), correction=0), torch.ones(3))
    assert float(out[1, 2].abs().max()) < 1e-3


def test_training_batches_are_standardised_like_test_images() -> None:
    data = batches(CONFIG)
    alike = TwoViewBatches(
        data.labelled, data.unlabelled, unlabelled_ratio=2, strong=RandAugment(0), num_classes=CLASSES, per_image=True
    )
    views = next(iter(alike))["pixel_values"]
    torch.testing.assert_close(views.mean((-2, -1)), torch.zeros(15, 3), atol=1e-5, rtol=0)


def test_labelled_images_alone_get_neighbours_and_in_both_views() -> None:
    data = batches(CONFIG)
    black = torch.zeros(1, 3, 9, 9)
    beside = TwoViewBatches(
        data.labelled, data.unlabelled, unlabelled_ratio=2, strong=RandAugment(0), num_classes=CLASSES,
        neighbours=Neighbours(black, 1.0),
    )  # fmt: skip
    plain = TwoViewBatches(
        data.labelled, data.unlabelled, unlabelled_ratio=2, strong=RandAugment(0), num_classes=CLASSES
    )
    batch, expected = next(iter(beside)), next(iter(plain))
    for name in ("pixel_values", "strong_pixel_values"):
        assert torch.equal(batch[name][5:], expected[name][5:])
        darker = batch[name][:5].mean((1, 2, 3)) < expected[name][:5].mean((1, 2, 3))
        assert darker.sum() >= 4


# -------------------------------------------------------------------------------------------------------- RandAugment


def test_randaugment_is_the_same_for_a_seed_and_a_part() -> None:
    images = torch.rand(12, 3, 8, 8)
    augment = RandAugment(2, 0.7)
    whole = augment(images, seed=5)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    assert torch.equal(whole, augment(images, seed=5))
    assert not torch.equal(whole, augment(images, seed=6))
    part = augment(images[4:9], seed=5, places=torch.arange(4, 9), total=12)
    torch.testing.assert_close(part, whole[4:9])
    assert len(augment(images[:0], seed=5, places=torch.arange(0), total=12)) == 0


def test_every_operation_is_drawn_and_changes_images_as_far_as_it_is_told() -> None:
    images = (torch.rand(2, 3, 16, 16) * 0.6 + 0.2).mul(255).round().div(255)
    for name, operation in OPERATIONS.items():
        unchanged = operation(images, torch.zeros(2))
        if name not in ("autocontrast", "equalize"):
            torch.testing.assert_close(unchanged, images, atol=2e-6, rtol=0, msg=name)
        changed = operation(images, torch.ones(2))
        assert torch.equal(changed, images) == (name == "identity"), name
        assert changed.shape == images.shape
    generator = torch.Generator().manual_seed(3)
    assert set(torch.randint(len(OPERATIONS), (400, 2), generator=generator).flatten().tolist()) == set(range(14))


def test_randaugment_takes_gray_images_and_refuses_nonsense() -> None:
    assert RandAugment(3, 1.0)(torch.rand(9, 1, 7, 11), seed=1).shape == (9, 1, 7, 11)
    with pytest.raises(ConfigError, match=r"magnitude is a part of the largest one, in \[0, 1\]; got 2"):
        RandAugment(2, 2.0)
    with pytest.raises(ConfigError, match="num_operations must be 0 or more; got -1"):
        RandAugment(-1)
    with pytest.raises(InputShapeError, match=r"images must be \(N, C, H, W\); got \(3, 8\)"):
        RandAugment()(torch.rand(3, 8), seed=1)


def test_a_step_too_large_is_told_in_images_and_without_parts() -> None:
    class Full(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} images")

    data, accelerator = batches(CONFIG), make_accelerator(CONFIG)
    objective = AdaMatch(accelerator, tau=0.9)
    with pytest.raises(
        TrainingError, match="batch_size is 5, so 30 images at once in a process; try a smaller"
    ) as told:
        fit(
            Full(np.zeros((K, FEATURES)), np.zeros(K)),
            data,
            None,
            config=CONFIG,
            accelerator=accelerator,
            objective=objective,
        )
    assert "accumulation_steps" not in str(told.value)


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": "uad"}, "unknown setting 'uad'; did you mean 'uda'"),
        ({"alignment": "per clas"}, "unknown alignment 'per clas'; did you mean 'per class'"),
        ({"standardize": "images"}, "unknown standardize 'images'; did you mean 'image'"),
        ({"dataset": ["a"]}, r"setting 'uda' takes two datasets, the source and then the target; got \['a'\]"),
        ({"labels_per_class": 4}, "setting 'uda' takes no labels_per_class; got 4"),
        ({"setting": "ssda"}, "setting 'ssda' needs labels_per_class, e.g. 4; got None"),
        ({"setting": "ssl", "labels_per_class": 4}, "setting 'ssl' takes contexts none, or of another kind"),
        ({"setting": "ssl", "labels_per_class": 4, "contexts": "none", "dataset": ["a", "b"]}, "takes one dataset"),
        ({"contexts": "none"}, "setting 'uda' takes contexts origin or origin:NAME,NAME; got 'none'"),
        ({"share_labels": False}, "source and target must share their classes"),
        ({"mode": "mn"}, "mode 'mn' has no forward that leaves its mixture as it is"),
        ({"accumulation_steps": 2}, "accumulation_steps must be 1 for AdaMatch"),
        ({"mixup": 0.2}, "mixup must be 0.0 for AdaMatch"),
        ({"tau": 1.5}, r"tau must be in \[0, 1\], got 1.5"),
        ({"strong_convolution": -0.5}, r"strong_convolution must be in \[0, 1\], got -0.5"),
        ({"labelled_neighbours": 2.0}, r"labelled_neighbours must be in \[0, 1\], got 2.0"),
        ({"unlabelled_ratio": 0}, "unlabelled_ratio must be at least 1, got 0"),
        ({"labels_per_clas": 3}, "unknown option 'labels_per_clas'; did you mean 'labels_per_class'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaMatchConfig.from_dict({"model": "cn_wrn28_2", **options})


def test_configs_differ_where_they_learn_something_else() -> None:
    config = AdaMatchConfig(model="cn_wrn28_2")
    other = config.replace(tau=0.8, alignment="overall", output_dir="elsewhere")
    assert other.differences(config.to_dict()) == {"tau": (0.9, 0.8), "alignment": ("per class", "overall")}
    assert AdaMatchConfig.from_yaml(other.to_yaml()) == other
