"""``set_inference(unknown=...)``: samples that a context source knows no context of, beside those it knows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_for_tests import difference, hf_vit, images, logits, small_convnet, tell_apart, vit, vit_with_every_slot
from torch import Tensor, nn

import cn_hf
from cn_hf import CnHfError, ConfigError, ContextIdError
from cn_hf.contexts import StatisticsContexts

IDS = torch.tensor([0, -1, 2, 1, -1, 0])


class Source:
    num_contexts = 3

    def __init__(self, ids: Tensor = IDS) -> None:
        self.ids = ids

    def predict(self, pixels: Tensor) -> Tensor:
        return self.ids[: len(pixels)]


def patched(make: Callable[[], nn.Module], names: list[str] | None = None, **options: str) -> nn.Module:
    torch.manual_seed(0)
    return tell_apart(cn_hf.patch_model(make(), num_contexts=3, context_names=names, **options)).eval()


def of_each(model: nn.Module, unknown: Tensor) -> Tensor:
    """What known samples give by their ids, and unknown ones as ``unknown``."""
    return torch.where((IDS < 0)[:, None], unknown, logits(model(images(6), context_ids=IDS.clamp_min(0))))


@pytest.mark.parametrize("make", [vit, hf_vit, small_convnet, vit_with_every_slot], ids=lambda f: f.__name__)
def test_unknown_samples_run_as_a_context_or_by_cn_plus(make: Callable[[], nn.Module]) -> None:
    model, x = patched(make, ["fog", "source", "night"]), images(6)
    plus = logits(model(x))
    cn_hf.set_inference(model, "predict", source=Source())
    assert difference(logits(model(x)), of_each(model, logits(model(x, context_ids="source")))) <= 1e-6
    cn_hf.set_inference(model, unknown="night")
    assert difference(logits(model(x)), of_each(model, logits(model(x, context_ids="night")))) <= 1e-6
    cn_hf.set_inference(model, unknown="cn+")
    assert difference(logits(model(x)), of_each(model, plus)) <= 1e-6
    with torch.no_grad():
        alone = torch.cat([logits(cn_hf.set_inference(model, source=Source(IDS[i:]))(x[i : i + 1])) for i in range(6)])
    assert difference(alone, of_each(model, plus)) <= 1e-5
    with pytest.raises(ContextIdError, match=r"0\.\.2"):
        model(x, context_ids=IDS)


def test_without_a_context_called_source_they_run_by_cn_plus() -> None:
    for names in (None, ["fog", "day", "night"]):
        model = patched(small_convnet, names)
        plus = model(images(6))
        cn_hf.set_inference(model, "predict", source=Source())
        assert difference(model(images(6)), of_each(model, plus)) <= 1e-6


def test_the_paper_s_cn_plus_sees_the_unknown_samples_alone() -> None:
    model = patched(small_convnet, plus_stats="batch", plus_posterior="vector")
    plus = torch.zeros(6, 5)
    with torch.no_grad():
        plus[IDS < 0] = model(images(6)[IDS < 0])
        cn_hf.set_inference(model, "predict", source=Source())
        assert difference(model(images(6)), of_each(model, plus)) <= 1e-6


def test_gradients_reach_the_input_of_known_and_unknown_samples() -> None:
    model, x = patched(vit), images(6).requires_grad_()
    cn_hf.set_inference(model, "predict", source=Source())
    logits(model(x)).sum().backward()
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("unknown", ["rain", 3, -1, 0.5])
def test_an_unknown_name_is_an_error_and_changes_nothing(unknown: object) -> None:
    model = patched(small_convnet, ["fog", "source", "night"])
    with pytest.raises(CnHfError):
        cn_hf.set_inference(model, "predict", source=Source(), unknown=unknown)
    assert (model.context_config.inference, model.router.source, model.router.unknown) == ("cn+", None, None)


def test_dsbn_has_no_cn_plus() -> None:
    model = cn_hf.patch_model(small_convnet(), "dsbn", where="norms", num_contexts=3).eval()
    with pytest.raises(ConfigError, match="dsbn"):
        cn_hf.set_inference(model, "predict", source=Source(), unknown="cn+")
    cn_hf.set_inference(model, "predict", source=Source())
    with pytest.raises(ContextIdError, match="unknown="):
        model(images(6))
    cn_hf.set_inference(model, unknown=2)
    assert torch.equal(model(images(6)), model(images(6), context_ids=IDS.remainder(3)))


@pytest.mark.parametrize("below", [-2, 3])
def test_other_ids_of_a_source_are_errors(below: int) -> None:
    model = patched(small_convnet, ["fog", "source", "night"])
    cn_hf.set_inference(model, "predict", source=Source(torch.tensor([0, -1, below])))
    with pytest.raises(ContextIdError, match=r"0\.\.2"):
        model(images(3))


@pytest.mark.parametrize("unknown", ["night", "cn+", None])
@pytest.mark.parametrize("make", [vit, hf_vit], ids=lambda f: f.__name__)
def test_it_is_copied_and_saved(make: Callable[[], nn.Module], unknown: str | None, tmp_path: Path) -> None:
    names = ["fog", "day", "night"]
    model = cn_hf.set_inference(patched(make, names), "predict", source=Source(), unknown=unknown)
    expected = logits(model(images(6)))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied(images(6))), expected)
    domains = {name: torch.randint(0, 255, (20, 3, 16, 16)).to(torch.uint8) for name in names}
    model.router.source = StatisticsContexts("pixels").fit(domains)
    cn_hf.save_pretrained(model, tmp_path)
    loaded = cn_hf.from_pretrained(tmp_path, model=None if make is hf_vit else make()).eval()
    assert loaded.router.unknown == model.router.unknown
    cn_hf.set_inference(loaded, source=Source())
    assert difference(logits(loaded(images(6))), expected) <= 1e-6


def test_it_follows_its_context_when_others_are_removed() -> None:
    model = cn_hf.set_inference(patched(vit), unknown=2)
    cn_hf.remove_contexts(model, [0])
    assert model.router.unknown == 1
    cn_hf.remove_contexts(model, [1])
    assert model.router.unknown is None
