"""The benchmark times what it says it does: all variants in turn, real training steps, ratios within a round."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from cn_hf.errors import CheckpointError, ConfigError
from cn_hf.experiments import benchmark as module
from cn_hf.experiments.benchmark import VARIANTS, benchmark, benchmark_table, run_benchmark

SMALL = {"network": "convnet", "batch_size": 6, "rounds": 3, "progress": False}


def test_every_variant_is_timed_in_every_round() -> None:
    timings = benchmark(**SMALL)
    assert [timing.name for timing in timings] == list(VARIANTS["convnet"])
    base = timings[0].seconds
    for timing in timings:
        assert len(timing.seconds) == 3
        assert all(seconds > 0 for seconds in timing.seconds)
        assert timing.ratios == tuple(own / other for own, other in zip(timing.seconds, base, strict=True))
        assert timing.ratio == statistics.median(timing.ratios)
        assert timing.images_per_second == pytest.approx(6 / statistics.median(timing.seconds))
    assert timings[0].ratio == 1


def test_a_step_trains_the_network_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[torch.nn.Module, dict[str, torch.Tensor]]] = []
    original = module.build_classifier

    def remembering(config, data):  # type: ignore[no-untyped-def]
        model = original(config, data)
        built.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        return model

    monkeypatch.setattr(module, "build_classifier", remembering)
    benchmark(**{**SMALL, "rounds": 1})
    assert len(built) == len(VARIANTS["convnet"])
    for model, before in built:
        changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        assert len(changed) > 5
    mode = [getattr(model, "context_config", None) for model, _ in built]
    assert [None if config is None else config.mode for config in mode] == [None, "cn-channels", "cn-channels", "mn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "convne"}, "did you mean 'convnet'"),
        ({"mixed_precision": "fp61"}, "unknown mixed_precision 'fp61'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"device": "gpu"}, "device 'gpu' cannot be had"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark(**{**SMALL, **options})


def test_what_was_measured_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = {**SMALL, "device": "cpu", "rounds": 1}
    run_benchmark(options, threads=1, output=tmp_path / "deep" / "bench.json")
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "| MN in conv3's place" in printed
    assert "1 threads" in printed
    written = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert written["options"]["batch_size"] == 6
    assert written["options"]["threads"] == 1
    assert [timing["name"] for timing in written["timings"]] == list(VARIANTS["convnet"])
    assert written["environment"]["versions"]["torch"] == torch.__version__
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run_benchmark(options, output=tmp_path / "file" / "bench.json")


def test_the_table_names_what_the_others_are_measured_against() -> None:
    table = benchmark_table(benchmark(**{**SMALL, "rounds": 1}), title="here")
    assert table.startswith("### here")
    assert "time / BN's" in table
