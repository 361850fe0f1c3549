"""patching/config.py: a configuration checks itself and round-trips through JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest

from cn_hf import CnHfError, ConfigError, ContextNormConfig


def test_defaults_are_the_papers_and_the_librarys() -> None:
    config = ContextNormConfig()
    assert (config.mode, config.num_contexts, config.where) == ("cn-patches", 3, None)
    assert (config.parametrization, config.variance_activation, config.init) == ("embedder", "softplus", "identity")
    assert (config.inference, config.plus_stats, config.plus_scale) == ("cn+", "learned", "none")
    assert config.keep_statistics
    assert not config.affine
    assert config.eps is None
    assert config.embedding_dim is None


FULL = {
    "mode": "cn",
    "num_contexts": 2,
    "context_names": ["day", "night"],
    "where": ["norm1", r"blocks\.\d\.norm2"],
    "parametrization": "table",
    "embedding_dim": 5,
    "variance_activation": "exp",
    "init": "random",
    "eps": 1e-4,
    "affine": True,
    "sparse": True,
    "keep_statistics": False,
    "inference": "average",
    "plus_stats": "batch",
    "plus_scale": "sqrt_t",
    "plus_posterior": "sample",
    "view_order": "view",
    "momentum": 0.2,
    "em_iterations": 3,
    "em_vectors": 99,
}


def test_json_round_trip_keeps_every_field() -> None:
    assert set(FULL) == {field.name for field in dataclasses.fields(ContextNormConfig)}
    config = ContextNormConfig(**FULL)
    text = json.dumps(config.to_dict())
    again = ContextNormConfig.from_dict(json.loads(text))
    assert again == config
    assert json.loads(text) == FULL
    assert again.context_names == ("day", "night")
    assert isinstance(again.where, tuple)
    assert hash(again) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


@pytest.mark.parametrize("where", [None, "norms", "norm1", ["norm1"], ("a", "b")])
def test_every_form_of_where_round_trips(where: Any) -> None:
    config = ContextNormConfig(where=where)
    assert ContextNormConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_frozen_slotted_and_keyword_only() -> None:
    config = ContextNormConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "bn"  # type: ignore[misc]
    assert not hasattr(config, "__dict__")
    with pytest.raises(TypeError):
        ContextNormConfig("cn-patches")  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "cn-patch"},
        {"mode": None},
        {"mode": 3},
        {"inference": "cn++"},
        {"parametrization": "embeder"},
        {"parametrization": None},
        {"variance_activation": "relu"},
        {"init": "zeros"},
        {"plus_stats": "running"},
        {"plus_scale": "sqrt"},
        {"num_contexts": 0},
        {"num_contexts": -1},
        {"num_contexts": 2.0},
        {"num_contexts": True},
        {"num_contexts": "3"},
        {"num_contexts": None},
        {"em_iterations": 0},
        {"em_vectors": 0},
        {"embedding_dim": 0},
        {"embedding_dim": 1.5},
        {"context_names": ["a", "b"]},
        {"context_names": ["a", "a", "b"]},
        {"context_names": ["a", "b", 3]},
        {"context_names": "abc"},
        {"context_names": []},
        {"context_names": 5},
        {"where": []},
        {"where": ["norm", 3]},
        {"where": 5},
        {"where": {"norm": 1}},
        {"eps": 0.0},
        {"eps": -1e-5},
        {"eps": 1.0},
        {"eps": float("nan")},
        {"eps": "1e-5"},
        {"momentum": 0},
        {"momentum": 1.5},
        {"momentum": None},
        {"momentum": float("nan")},
        {"affine": "yes"},
        {"affine": None},
        {"keep_statistics": None},
        {"keep_statistics": 2},
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(CnHfError, match=next(iter(options))) as caught:
        ContextNormConfig(**options)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [("mode", "cn-patch", "cn-patches"), ("inference", "averag", "average"), ("init", "identiy", "identity")],
)
def test_the_nearest_valid_value_is_named(option: str, value: str, valid: str) -> None:
    with pytest.raises(ConfigError, match=f"{value!r}.*did you mean {valid!r}"):
        ContextNormConfig(**{option: value})


def test_unknown_options_are_named_with_the_nearest() -> None:
    for call in (lambda o: ContextNormConfig.from_dict(o), lambda o: ContextNormConfig().replace(**o)):
        with pytest.raises(ConfigError, match=r"'plus_stat'.*did you mean 'plus_stats'"):
            call({"plus_stat": "batch"})


def test_replace_checks_and_leaves_the_original() -> None:
    config = ContextNormConfig(context_names=["a", "b", "c"])
    assert config.replace(inference="cn").inference == "cn"
    assert config.inference == "cn+"
    with pytest.raises(ConfigError, match="context_names"):
        config.replace(num_contexts=4)
