"""The supervised loop against a hand-written one, on one process and two."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import cn_hf
from cn_hf.errors import ConfigError, ContextIdError, TrainingError
from cn_hf.training.config import TrainingConfig
from cn_hf.training.history import History
from cn_hf.training.objective import mean_loss_and_accuracy
from cn_hf.training.optimization import build_optimizer, learning_rate_at
from cn_hf.training.preparation import make_accelerator
from cn_hf.training.supervised import fit

CLASSES = 3


class TensorBatches:
    """The simplest training data: one tensor of images, shuffled by epoch, every process takes its stretch."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, *, contexts: Tensor | None = None, shuffle: bool = True
    ) -> None:
        self.images, self.labels, self.contexts = images, labels, contexts
        self.batch_size, self.shuffle = batch_size, shuffle
        self.num_samples = len(images)
        self.epoch = self.start = 0
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def fingerprint(self) -> str:
        return str(float(self.images.sum()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.arange(self.num_samples)
        if self.shuffle:
            order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.epoch))
        for start in range(self.start * self.batch_size, self.num_samples, self.batch_size):
            rows = order[start : start + self.batch_size].tensor_split(self.world)[self.rank]
            batch = {"pixel_values": self.images[rows], "labels": self.labels[rows], "index": rows}
            if self.contexts is not None:
                batch["context_ids"] = self.contexts[rows]
            yield batch


def small_network(*, batch_norm: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    norm: nn.Module = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    )


def small_data(count: int = 23, batch_size: int = 5, *, shuffle: bool = True) -> TensorBatches:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 7, 9, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    contexts = torch.randint(2, (count,), generator=generator)
    return TensorBatches(images, labels, batch_size, contexts=contexts, shuffle=shuffle)


def small_config(**options: object) -> TrainingConfig:
    defaults = {"model": "x", "epochs": 3, "progress": False, "learning_rate": 0.01, "keep_best": False}
    return TrainingConfig.from_dict({**defaults, **options})


def hand_written(model: nn.Module, batches: TensorBatches, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    model.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("name", "factory", "options"),
    [
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.99)}),
        ("adamw", torch.optim.AdamW, {}),
    ],
)
def test_weights_equal_a_hand_written_loop(name: str, factory: type[torch.optim.Optimizer], options: dict) -> None:
    model, expected = small_network(), small_network()
    args = {key: value for key, value in options.items() if key != "momentum"}
    config = small_config(optimizer=name, weight_decay=0.1, optimizer_args=args)
    history = fit(model, small_data(), None, config=config, accelerator=Accelerator())
    hand_written(
        expected, small_data(), factory(expected.parameters(), lr=0.01, weight_decay=0.1, **options), config.epochs
    )
    for (key, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6, msg=key)
    assert [record.step for record in history.epochs] == [5, 10, 15]


def with_contexts(model: nn.Module, **options: object) -> nn.Module:
    return cn_hf.patch_model(model, mode="cn-channels", num_contexts=2, where="norms", **options)


def test_contexts_reach_the_network() -> None:
    model, expected = (with_contexts(small_network(), init="random") for _ in range(2))
    expected.load_state_dict(model.state_dict())
    fit(model, small_data(), None, config=small_config(optimizer="adam", weight_decay=0.0), accelerator=Accelerator())
    expected.train()
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    batches = small_data()
    for epoch in range(3):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            logits = expected(batch["pixel_values"], context_ids=batch["context_ids"])
            F.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
    for (key, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6, msg=key)


def test_a_network_with_contexts_needs_them() -> None:
    batches = small_data()
    batches.contexts = None
    with pytest.raises(ContextIdError):
        fit(with_contexts(small_network()), batches, None, config=small_config(), accelerator=Accelerator())


@pytest.mark.parametrize("decay_contexts", [False, True])
@pytest.mark.parametrize("decay_one_dimensional", [False, True])
def test_weight_decay_spares_what_it_should(decay_contexts: bool, decay_one_dimensional: bool) -> None:
    model = with_contexts(small_network())
    model[0].weight.requires_grad_(False)
    config = small_config(
        weight_decay=0.5, decay_context_parameters=decay_contexts, decay_one_dimensional=decay_one_dimensional
    )
    optimizer = build_optimizer(model, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    added = {id(p) for p in cn_hf.context_parameters(model)}
    assert added
    assert len(decay) == sum(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay
        elif id(parameter) in added:
            assert decay[id(parameter)] == (0.5 if decay_contexts else 0.0), name
        else:
            spared = parameter.ndim == 1 and not decay_one_dimensional
            assert decay[id(parameter)] == (0.0 if spared else 0.5), name


def test_context_parameters_do_not_shrink_where_gradients_vanish() -> None:
    model = with_contexts(small_network())
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = small_data()
    data.labels = torch.zeros_like(data.labels)
    with torch.no_grad():
        model[5].weight.zero_()  # no gradient reaches the layers before
        model[5].bias.copy_(torch.tensor([40.0, 0.0, 0.0]))
    before |= {name: value.clone() for name, value in model.named_parameters() if name.startswith("5.")}
    config = small_config(optimizer="sgd", momentum=0.0, weight_decay=0.5, epochs=1)
    fit(model, data, None, config=config, accelerator=Accelerator())
    added = {id(p) for p in cn_hf.context_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in added:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-7, msg=name)
    assert model[0].weight.norm() < 0.99 * before["0.weight"].norm()


def test_unknown_optimizer_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'beta'.*did you mean 'betas'"):
        build_optimizer(small_network(), small_config(optimizer="adam", optimizer_args={"beta": 1}))
    with pytest.raises(ConfigError, match="refuses"):
        build_optimizer(small_network(), small_config(optimizer="adam", optimizer_args={"betas": 3}))


def test_history_holds_the_losses_and_rates_of_the_whole_set() -> None:
    model = small_network(batch_norm=False)
    before = copy.deepcopy(model)
    train, validation = small_data(), small_data(11, 4, shuffle=False)
    config = small_config(epochs=1, learning_rate=1e-12, optimizer="sgd")
    history = fit(model, train, validation, config=config, accelerator=Accelerator())
    with torch.no_grad():
        logits = before(train.images)
        validation_logits = before(validation.images)
    record = history.epochs[0]
    assert record.train_loss == pytest.approx(F.cross_entropy(logits, train.labels).item(), abs=1e-6)
    assert record.train_accuracy == pytest.approx((logits.argmax(1) == train.labels).float().mean().item())
    expected = F.cross_entropy(validation_logits, validation.labels).item()
    assert record.validation_loss == pytest.approx(expected, abs=1e-6)
    correct = (validation_logits.argmax(1) == validation.labels).float().mean().item()
    assert record.validation_accuracy == pytest.approx(correct)
    assert record.images_per_second > 0


def test_history_round_trips_and_is_written_while_training(tmp_path: Path) -> None:
    history = fit(
        small_network(), small_data(), small_data(), config=small_config(), accelerator=Accelerator(),
        output_dir=tmp_path / "run",
    )  # fmt: skip
    written = json.loads((tmp_path / "run" / "history.json").read_text())
    assert History.from_dict(written) == history
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["checkpoints", "history.json"]


def test_runs_with_one_config_meet_the_same_dropout_and_order() -> None:
    networks = [nn.Sequential(nn.Dropout(0.5), small_network()) for _ in range(2)]
    for network in networks:
        torch.rand(torch.randint(9, ()))  # the seeds are fit's own business
        fit(network, small_data(), None, config=small_config(), accelerator=Accelerator())
    for one, two in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_label_smoothing_reaches_the_loss() -> None:
    model, train = small_network(batch_norm=False), small_data()
    with torch.no_grad():
        expected = F.cross_entropy(model(train.images), train.labels, label_smoothing=0.3).item()
    config = small_config(epochs=1, learning_rate=1e-12, optimizer="sgd", label_smoothing=0.3)
    history = fit(model, train, None, config=config, accelerator=Accelerator())
    assert history.epochs[0].train_loss == pytest.approx(expected, abs=1e-6)


def test_early_stopping_keeps_the_best_weights() -> None:
    model = small_network()
    config = small_config(epochs=30, learning_rate=0.3, optimizer="sgd", momentum=0.0, patience=2, keep_best=True)
    validation = small_data(40, 40, shuffle=False)
    history = fit(model, small_data(), validation, config=config, accelerator=Accelerator())
    accuracies = history.curve("validation_accuracy")
    assert history.best_epoch == 1 + accuracies.index(max(accuracies))
    assert history.stopped_early
    assert len(accuracies) == history.best_epoch + 2 < 30
    _, accuracy = mean_loss_and_accuracy(model, validation, Accelerator())
    assert accuracy == max(accuracies)


def test_validation_leaves_the_training_flags_alone() -> None:
    model = small_network()
    model.train()
    model[1].eval()  # a user's frozen norm
    mean_loss_and_accuracy(model, small_data(), Accelerator())
    assert model.training
    assert not model[1].training


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_weights() -> None:
    model, data = small_network(batch_norm=False), small_data(20, 5, shuffle=False)
    data.images[12] = float("nan")
    expected = small_network(batch_norm=False)
    good = TensorBatches(data.images[:10], data.labels[:10], 5, shuffle=False)
    hand_written(expected, good, torch.optim.SGD(expected.parameters(), lr=0.01), 1)
    config = small_config(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    with pytest.raises(TrainingError, match="at step 3"):
        fit(model, data, None, config=config, accelerator=Accelerator())
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_nothing_to_train_is_an_error() -> None:
    frozen = small_network().requires_grad_(False)
    with pytest.raises(TrainingError, match="requires_grad"):
        fit(frozen, small_data(), None, config=small_config(), accelerator=Accelerator())
    with pytest.raises(TrainingError, match="no images"):
        fit(small_network(), small_data(0), None, config=small_config(), accelerator=Accelerator())
    with pytest.raises(TrainingError, match="no images"):
        fit(small_network(), small_data(), small_data(0), config=small_config(), accelerator=Accelerator())


@pytest.fixture
def _fresh_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate_state")
def test_mixed_precision_leaves_the_model_as_it_was() -> None:
    model = small_network()
    config = small_config(mixed_precision="bf16")
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    fit(model, small_data(), small_data(), config=config, accelerator=make_accelerator(config))
    assert set(seen) == {torch.bfloat16}
    assert "forward" not in vars(model)
    assert "_original_forward" not in vars(model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.eval()(torch.randn(2, 3, 7, 9)).dtype == torch.float32


@pytest.mark.usefixtures("_fresh_accelerate_state")
def test_a_precision_that_cannot_be_had_is_a_clear_error() -> None:
    make_accelerator(small_config())
    with pytest.raises(TrainingError, match=r"mixed_precision 'bf16'.*another process"):
        make_accelerator(small_config(mixed_precision="bf16"))


def two_process_run() -> tuple[nn.Module, History]:
    """20 steps; in each epoch batches are split 3 to 2, and the last has one image, so none for one process."""
    torch.manual_seed(2)
    model = cn_hf.patch_model(small_network(batch_norm=False), mode="cn-channels", num_contexts=2, where="input")
    config = small_config(epochs=4, weight_decay=0.1)
    history = fit(model, small_data(21), small_data(11, 4), config=config, accelerator=Accelerator())
    return model, history


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    finished = launch(2, __file__, str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    model, history = two_process_run()
    for rank in range(2):
        weights = torch.load(tmp_path / f"weights{rank}.pt")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5, msg=key)
        found = History.from_dict(json.loads((tmp_path / f"history{rank}.json").read_text()))
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
            assert found.curve(name) == pytest.approx(history.curve(name), abs=1e-5), name


def test_schedules() -> None:
    def rates(**options: object) -> list[float]:
        config = small_config(epochs=10, learning_rate=1.0, **options)
        return [learning_rate_at(step, 10, config) for step in range(100)]

    assert rates() == [1.0] * 100
    warm = rates(warmup_epochs=0.5)
    assert warm[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    steps = rates(schedule="step", step_epochs=(2, 5), step_factor=0.1)
    assert [steps[at] for at in (19, 20, 49, 50, 99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates(schedule="cosine", warmup_epochs=2, minimum_learning_rate=0.1)
    assert cosine[20] == pytest.approx(1.0)
    assert cosine[60] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1, abs=1e-3)
    assert cosine[20:] == sorted(cosine[20:], reverse=True)


if __name__ == "__main__":  # one process of test_two_processes_equal_one
    trained, records = two_process_run()
    torch.save(trained.state_dict(), Path(sys.argv[1]) / f"weights{os.environ['RANK']}.pt")
    (Path(sys.argv[1]) / f"history{os.environ['RANK']}.json").write_text(json.dumps(records.to_dict()))
