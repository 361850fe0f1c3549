"""adaptation/ and the measuring behind it: new domains from unlabelled images, relative to what the weights expect."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import timm
import torch
from models_for_tests import hf_vit, seeded, settle, small_convnet, tensors_of, vit
from sklearn.datasets import load_digits
from torch import Tensor, nn

import cn_hf
from cn_hf import CnHfError, ConfigError, ContextIdError, PatchError
from cn_hf.errors import DatasetError, DatasetFileError, InputTypeError
from cn_hf.patching import measure
from cn_hf.patching import moments as moments_module
from cn_hf.patching.batches import Batch
from cn_hf.patching.calibrate import record_moments
from cn_hf.patching.moments import Moments, Rows, relative_rows, shrunk_rows
from cn_hf.reading.images import to_array


def source(count: int = 24, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def fog(count: int = 24, size: int = 16) -> Tensor:
    tint = torch.tensor([0.9, 0.2, -0.4]).view(3, 1, 1)
    return 0.35 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(6)) + tint


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class GroupNormNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        return self.head(self.norm2(self.second(x)).relu().mean((2, 3)))


@seeded
def of_norm(norm: Callable[[int], nn.Module]) -> nn.Module:
    return settle(GroupNormNet(norm))


@seeded
def tokens_net(norm: Callable[[int], nn.Module]) -> nn.Module:
    return settle(nn.Sequential(nn.Flatten(2), nn.Linear(256, 12), norm(12), nn.GELU(), nn.Linear(12, 12), norm(12)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": small_convnet,
    "timm resnet": seeded(lambda: settle(timm.create_model("test_resnet"))),
    "timm efficientnet": seeded(lambda: settle(timm.create_model("test_efficientnet"))),  # BatchNormAct2d
    "timm vit": vit,
    "timm test_vit": seeded(lambda: settle(timm.create_model("test_vit", img_size=16))),
    "transformers vit": hf_vit,
    "group norm": lambda: of_norm(lambda c: nn.GroupNorm(2, c)),
    "LayerNorm2d": lambda: of_norm(timm.layers.LayerNorm2d),
    "BatchNormAct2d": lambda: of_norm(timm.layers.BatchNormAct2d),
    "layer norm": lambda: tokens_net(nn.LayerNorm),
    "rms norm": lambda: tokens_net(nn.RMSNorm),
}


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def inputs_of_slots(model: nn.Module, x: Tensor, context: Any) -> dict[str, Tensor]:
    """What each slot's normalizer makes of its input, before the affine map and activation, ``(vectors, C)``."""
    found: dict[str, Tensor] = {}
    names = {id(slot): name for name, slot in measure.calibrated_slots(model).items()}
    rows = {name: measure.rows_of(slot) for name, slot in measure.calibrated_slots(model).items()}
    index = model.context_config.context_names.index(context)

    class Watch(measure._Observer):
        def rows(self, name: str, slot: Any, x: Tensor, ids: Tensor) -> Rows:
            own = Rows(rows[name].mean[[index]], rows[name].variance[[index]])
            values = x.movedim(slot.normalizer.feature_dim, -1).flatten(0, -2).double()
            found.setdefault(name, (values - own.mean) / own.variance.sqrt())
            return own

    one = torch.zeros(1, model.context_config.num_contexts, dtype=torch.float64)
    one[0, index] = 1
    measure._pass(model, [(Batch((x,), {}, len(x)), torch.zeros(len(x), dtype=torch.int64))], Watch(model, one))
    assert set(found) <= set(names.values())
    return found


# ---------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("name", MODELS)
def test_each_slots_output_has_the_moments_of_the_reference(name: str) -> None:
    model = MODELS[name]()
    before = logits(model(source()))
    assert cn_hf.adapt(model, {"fog": fog()}, reference=source(), prior=0) is model
    assert model.context_config.context_names == ("source", "fog")
    assert torch.equal(logits(model(source(), context_ids="source")), before) or (
        (logits(model(source(), context_ids="source")) - before).abs().max() <= 1e-5 * before.abs().max()
    )
    of_reference, of_fog = (inputs_of_slots(model, x, c) for x, c in ((source(), "source"), (fog(), "fog")))
    assert of_fog.keys() == of_reference.keys()
    assert of_fog
    for slot, values in of_fog.items():
        expected = of_reference[slot]
        alive = (expected.var(0) > 1e-8) & (values.var(0) > 1e-8)
        assert alive.any()
        scale = expected.std(0).amax()
        assert ((values.mean(0) - expected.mean(0))[alive].abs() <= 2e-3 * scale).all(), slot
        torch.testing.assert_close(values.std(0)[alive], expected.std(0)[alive], rtol=5e-3, atol=1e-4, msg=slot)


@seeded
def batch_norm_net() -> nn.Module:
    return of_norm(nn.BatchNorm2d)


@pytest.mark.parametrize("make", [batch_norm_net, MODELS["timm resnet"]])
def test_a_batch_norm_network_is_adapted_as_by_batch_norms_in_training(make: Callable[[], nn.Module]) -> None:
    model = make()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        expected = plain(fog())
    cn_hf.adapt(model, {"fog": fog()}, prior=0)
    torch.testing.assert_close(model(fog(), context_ids="fog"), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["timm resnet", "transformers vit", "LayerNorm2d"])
def test_several_passes_give_what_one_pass_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = [{"pixel_values": part} for part in torch.split(fog(), 7)]
    one = cn_hf.adapt(MODELS[name](), {"fog": loader}, reference=source())
    monkeypatch.setattr(measure, "ONE_PASS", 100)
    many = cn_hf.adapt(MODELS[name](), {"fog": loader}, reference=source())
    torch.testing.assert_close(
        logits(many(fog(), context_ids="fog")), logits(one(fog(), context_ids="fog")), rtol=1e-4, atol=1e-4
    )


def test_a_forward_that_does_not_fit_is_done_in_parts() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 32:
                raise torch.OutOfMemoryError
            return x

    x = fog(40)
    model = nn.Sequential(Narrow(), small_convnet()).eval()
    cn_hf.adapt(model, {"fog": x}, reference=source())
    expected = cn_hf.adapt(nn.Sequential(nn.Identity(), small_convnet()).eval(), {"fog": x}, reference=source())
    torch.testing.assert_close(
        model(x[:9], context_ids="fog"), expected(x[:9], context_ids="fog"), rtol=1e-4, atol=1e-4
    )


def test_the_prior_draws_towards_the_reference() -> None:
    x = fog(12)
    rows = {}
    for prior in (0, 4, 12):
        model = batch_norm_net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cn_hf.adapt(model, {"fog": x}, prior=prior)
        rows[prior] = model.norm1.normalizer.statistics()
    for part in range(2):
        reference, measured = rows[0][part]
        torch.testing.assert_close(rows[4][part][1], (4 * reference + 12 * measured) / 16, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows[12][part][1], (reference + measured) / 2, rtol=1e-4, atol=1e-5)


def test_a_trained_reference_is_what_the_weights_expect() -> None:
    """The context that training moved, not whitening, is what a new one is brought to."""
    for name in ("group norm", "batch norm"):
        model = cn_hf.patch_model(MODELS[name](), context_names=["day", "night"])
        with torch.no_grad():
            for parameter in cn_hf.context_parameters(model):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        cn_hf.adapt(model, {"fog": fog()}, reference={"night": source()}, prior=0)
        of_night, of_fog = (inputs_of_slots(model, x, c) for x, c in ((source(), "night"), (fog(), "fog")))
        for slot, values in of_fog.items():
            torch.testing.assert_close(values.mean(0), of_night[slot].mean(0), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(values.std(0), of_night[slot].std(0), rtol=1e-2, atol=1e-3)


def test_moments_are_kept_so_that_no_reference_is_needed_again() -> None:
    model = cn_hf.adapt(vit(), {"fog": fog()}, reference=source())
    again = copy.deepcopy(model)
    cn_hf.adapt(model, {"night": fog() * 0.5})
    cn_hf.adapt(again, {"night": fog() * 0.5}, reference=source())
    torch.testing.assert_close(
        model(fog(), context_ids="night"), again(fog(), context_ids="night"), rtol=1e-4, atol=1e-4
    )
    cn_hf.remove_contexts(model, "fog")
    assert model.context_config.context_names == ("source", "night")
    cn_hf.adapt(model, {"fog": fog()}, reference="night")
    with pytest.raises(PatchError, match="reference images"):
        cn_hf.adapt(cn_hf.patch_model(vit(), context_names=["source"]), {"fog": fog()})


def test_recorded_moments_are_those_of_the_inputs() -> None:
    model = cn_hf.patch_model(vit(), context_names=["day", "night"])
    again = copy.deepcopy(model)
    record_moments(model, {"day": source(), "night": [fog(), fog() + 1]})
    cn_hf.adapt(model, {"rain": fog() * 2}, reference="night")
    cn_hf.adapt(again, {"rain": fog() * 2}, reference={"night": torch.cat([fog(), fog() + 1])})
    for context in ("day", "rain"):
        assert_near(model(fog(), context_ids=context), again(fog(), context_ids=context), 1e-5)
    with pytest.raises(ContextIdError, match="one context a sample"):
        record_moments(model, [(fog(2), torch.full((2, 3), 1 / 3))])


def resaved(model: nn.Module, folder: Path, norms_only: bool) -> nn.Module:
    cn_hf.save_pretrained(model, folder, norms_only=norms_only)
    base = copy.deepcopy(model)
    return cn_hf.from_pretrained(folder, model=cn_hf.unpatch_model(base) if norms_only else None).eval()


@pytest.mark.parametrize("norms_only", [False, True])
@pytest.mark.parametrize("name", ["timm test_vit", "transformers vit", "timm resnet"])
def test_moments_travel_with_a_checkpoint(name: str, norms_only: bool, tmp_path: Path) -> None:
    model = cn_hf.adapt(MODELS[name](), {"fog": fog()}, reference=source())
    loaded = resaved(model, tmp_path, norms_only)
    for domains in ({"night": fog() * 0.5}, {"rain": fog() - 1}):
        cn_hf.adapt(model, domains)
        cn_hf.adapt(loaded, domains)
    for context in ("source", "fog", "night", "rain"):
        assert_near(logits(loaded(fog(), context_ids=context)), logits(model(fog(), context_ids=context)), 1e-5)
    plain = cn_hf.patch_model(MODELS[name](), context_names=["source"])
    cn_hf.save_pretrained(plain, tmp_path)  # over the other
    assert not (tmp_path / "context_moments.safetensors").exists()
    assert cn_hf.from_pretrained(tmp_path).router.moments == {}


@pytest.mark.parametrize("damage", [b"", b"more"])
def test_damaged_moments_are_an_error(damage: bytes, tmp_path: Path) -> None:
    cn_hf.save_pretrained(cn_hf.adapt(MODELS["timm resnet"](), {"fog": fog()}), tmp_path)
    file = tmp_path / "context_moments.safetensors"
    file.write_bytes(file.read_bytes() + damage if damage else b"")
    with pytest.raises(CnHfError, match=r"context_moments\.safetensors"):
        cn_hf.from_pretrained(tmp_path)


def test_what_the_model_had_stays_bit_for_bit() -> None:
    model = cn_hf.adapt(MODELS["timm resnet"](), {"fog": fog()})
    before = {name: model(source(), context_ids=name) for name in ("source", "fog")}
    cn_hf.adapt(model, {"night": fog() - 1, "rain": fog() * 0.1})
    for name, output in before.items():
        assert torch.equal(model(source(), context_ids=name), output), name
    assert model.context_config.context_names == ("source", "fog", "night", "rain")


def test_contexts_are_measured_as_if_alone() -> None:
    both = cn_hf.adapt(small_convnet(), {"fog": fog(), "night": fog() - 1}, reference=source())
    alone = cn_hf.adapt(small_convnet(), {"night": fog() - 1}, reference=source())
    torch.testing.assert_close(
        both(fog(), context_ids="night"), alone(fog(), context_ids="night"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["batch norm", "timm vit"])
def test_half_precision(name: str) -> None:
    model = MODELS[name]().bfloat16()
    cn_hf.adapt(model, {"fog": fog().bfloat16()}, reference=source().bfloat16())
    output = model(fog().bfloat16(), context_ids="fog")
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_domain_specific_batch_norm_is_a_rival() -> None:
    model = cn_hf.patch_model(batch_norm_net(), "dsbn", where="norms", context_names=["source"])
    cn = cn_hf.adapt(batch_norm_net(), {"fog": fog()}, prior=0)
    cn_hf.adapt(model, {"fog": fog()}, prior=0)
    assert_near(model(fog(), context_ids="fog"), cn(fog(), context_ids="fog"))
    folded = cn_hf.fold_context(model, "fog")
    assert_near(folded(fog()), model(fog(), context_ids="fog"))


def test_a_context_that_is_there_is_measured_anew() -> None:
    model = cn_hf.adapt(batch_norm_net(), {"fog": source(), "night": fog() - 1}, prior=0)
    night = model(fog(), context_ids="night")
    cn_hf.calibrate(model, {"fog": fog()}, only=["fog"])
    expected = cn_hf.adapt(batch_norm_net(), {"fog": fog()}, prior=0)
    torch.testing.assert_close(
        model(fog(), context_ids="fog"), expected(fog(), context_ids="fog"), rtol=1e-4, atol=1e-4
    )
    assert_near(model(fog(), context_ids="night"), night)


def test_only_some_contexts_of_batches_with_ids() -> None:
    model = cn_hf.patch_model(batch_norm_net(), context_names=["day", "night"])
    before = model.norm1.normalizer.statistics()
    cn_hf.calibrate(model, [(torch.cat([source(8), fog(8)]), ["day"] * 8 + ["night"] * 8)], only=["night"])
    mean, _ = model.norm1.normalizer.statistics()
    assert_near(mean[0], before[0][0], 1e-5)
    assert_near(mean[1], model.first(fog(8)).mean((0, 2, 3)))


def test_many_contexts_of_one_image() -> None:
    model = MODELS["timm resnet"]()
    with pytest.warns(UserWarning, match="fewer than 16 images"):
        cn_hf.adapt(model, {f"camera {number}": fog(1) + 0.01 * number for number in range(60)})
    assert model.context_config.num_contexts == 61
    assert model(fog(2), context_ids=["camera 3", "camera 59"]).isfinite().all()


# ------------------------------------------------------------------------------------------------- forms of the images


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, list[PIL.Image.Image]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(20):
        pixels = torch.randint(0, 120, (20, 24, 3), generator=generator, dtype=torch.uint8)
        made.append(PIL.Image.fromarray(pixels.numpy()))
        folder = tmp_path / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        made[-1].save(folder / f"{number:02}.PNG")
    (tmp_path / "Thumbs.db").write_bytes(b"no image")
    return tmp_path, made


def test_every_form_of_images_gives_the_same(pictures: tuple[Path, list[PIL.Image.Image]]) -> None:
    folder, _ = pictures
    files = sorted(folder.rglob("*.PNG"))
    table = datasets.Dataset.from_dict({"photo": [str(file) for file in files]}).cast_column("photo", datasets.Image())
    model = MODELS["timm resnet"]()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
    pixels = torch.stack([transform(PIL.Image.open(file).convert("RGB")) for file in files])
    forms: dict[str, Any] = {
        "float tensor": pixels,
        "folder": folder,
        "folder as text": str(folder),
        "files": files,
        "pictures": [PIL.Image.open(file) for file in files],
        "iterator of pictures": (PIL.Image.open(file) for file in files),
        "data set": table,
        "stream": table.to_iterable_dataset(),
        "column": table["photo"],
        "uint8": torch.stack([torch.from_numpy(to_array(PIL.Image.open(f))) for f in files]).permute(0, 3, 1, 2),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, torch.arange(20)), batch_size=7),
        "mappings": [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in torch.split(pixels, 6)],
    }
    expected: Tensor | None = None
    for name, form in forms.items():
        model = cn_hf.adapt(MODELS["timm resnet"](), {"dark": form})
        output = model(pixels, context_ids="dark")
        expected = output if expected is None else expected
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_pictures_for_a_model_in_half_precision(pictures: tuple[Path, list[PIL.Image.Image]]) -> None:
    model = cn_hf.adapt(MODELS["timm resnet"]().bfloat16(), {"dark": pictures[0]})
    assert model(fog(2).bfloat16(), context_ids="dark").isfinite().all()


def test_of_many_images_some_are_taken_evenly(pictures: tuple[Path, list[PIL.Image.Image]]) -> None:
    folder, _ = pictures
    files = sorted(folder.rglob("*.PNG"))
    few = cn_hf.adapt(MODELS["timm resnet"](), {"dark": folder}, max_images=10)
    same = cn_hf.adapt(MODELS["timm resnet"](), {"dark": files[::2]})
    assert torch.equal(few(fog(2), context_ids="dark"), same(fog(2), context_ids="dark"))


def test_a_loader_that_gives_its_batches_once() -> None:
    batches = iter([fog(8), fog(8) + 1])
    model = cn_hf.adapt(small_convnet(), {"fog": batches}, reference=iter([source()]))
    expected = cn_hf.adapt(small_convnet(), {"fog": torch.cat([fog(8), fog(8) + 1])}, reference=source())
    torch.testing.assert_close(
        model(fog(), context_ids="fog"), expected(fog(), context_ids="fog"), rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------------------------------------------------ bad input


def endless_text() -> Iterator[str]:
    while True:
        yield "text"


@pytest.mark.parametrize(
    ("given", "options", "error", "words"),
    [
        ({}, {}, PatchError, "empty mapping"),
        (fog(2), {}, InputTypeError, "name: images"),
        ({"pixel_values": fog(2)}, {}, InputTypeError, "in a list"),
        ({"fog": {"pixel_values": fog(2), "context_ids": 1}, "x": 1}, {}, (InputTypeError, TypeError), ""),
        ({"source": fog()}, {}, ConfigError, "already: 'source'"),
        ({"fog": []}, {}, DatasetError, "received none"),
        ({"fog": fog(0)}, {}, DatasetError, "received none"),
        ({"fog": fog() / 0}, {}, DatasetError, "NaN or infinite"),
        ({"fog": 5}, {}, InputTypeError, "received int"),
        ({"fog": "no such folder"}, {}, DatasetFileError, "not found"),
        ({"fog": endless_text()}, {}, DatasetFileError, "text"),
        ({"fog": fog()}, {"prior": -1}, ConfigError, "prior"),
        ({"fog": fog()}, {"prior": float("inf")}, ConfigError, "prior"),
        ({"fog": fog()}, {"max_images": 0}, ConfigError, "max_images"),
        ({"fog": fog()}, {"reference": "dusk"}, ContextIdError, "'dusk'"),
        ({"fog": fog()}, {"reference": []}, DatasetError, "of the reference"),
        ({"fog": fog()[:, :2]}, {}, RuntimeError, ""),
        ({"fog": torch.zeros(4, 5)}, {}, RuntimeError, ""),
        ({"fog": fog(3)[0, 0, 0]}, {}, InputTypeError, r"\(N, \.\.\.\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_leaves_the_model_as_it_was(given: Any, options: Any, error: Any, words: str) -> None:
    for model in (MODELS["timm resnet"](), cn_hf.adapt(MODELS["timm resnet"](), {"night": fog()})):
        model.train()
        before, kind = tensors_of(model), type(model)
        with pytest.raises(error, match=words):
            cn_hf.adapt(model, given, **options)
        assert type(model) is kind
        assert model.training
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_plain_transformer_needs_reference_images() -> None:
    model = vit()
    with pytest.raises(PatchError, match=r"reference=images") as caught:
        cn_hf.adapt(model, {"fog": fog()})
    assert isinstance(caught.value, ValueError)
    assert type(model).__name__ == "VisionTransformer"
    with pytest.raises(CnHfError):
        cn_hf.patch_report(model)


def test_few_images_and_pixels_are_noticed() -> None:
    with pytest.warns(UserWarning, match=r"'fog' \(3\).*prior=4"):
        cn_hf.adapt(batch_norm_net(), {"fog": fog(3)})
    with pytest.warns(UserWarning, match=r"give more images, or prior=4"):
        cn_hf.adapt(batch_norm_net(), {"fog": fog(1)}, prior=0)
    with pytest.warns(UserWarning, match=r"pixels of 0\.\.255"):
        cn_hf.adapt(batch_norm_net(), {"fog": (fog() + 2) * 60})
    with pytest.warns(UserWarning, match="All pixels"):
        model = cn_hf.adapt(batch_norm_net(), {"fog": torch.zeros(16, 3, 16, 16)})
    assert model(fog(), context_ids="fog").isfinite().all()


def test_labels_of_a_loader_are_not_taken_for_contexts() -> None:
    model = cn_hf.patch_model(batch_norm_net(), context_names=["day", "night"])
    pairs = [(fog(4), torch.tensor([0, 1, 1, 0]))]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pairs[0]), batch_size=2)
    with pytest.warns(UserWarning, match="context or its class label") as caught:
        cn_hf.calibrate(model, pairs * 3)
    assert len([w for w in caught if "class label" in str(w.message)]) == 1
    with pytest.raises(InputTypeError, match='contexts="pair"'):
        cn_hf.calibrate(model, loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cn_hf.calibrate(model, loader, contexts="pair")
        cn_hf.calibrate(model, [(fog(4), ["day", "night", "night", "day"])])
        cn_hf.calibrate(model, [(fog(4), torch.eye(2)[[0, 1, 1, 0]])])
        cn_hf.calibrate(model, [(fog(4), 0), (fog(4), 1)])


# ------------------------------------------------------------------------------------------------------------ the maths


@pytest.mark.parametrize("feature_dim", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_of_contexts(feature_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "_BLOCK", 50)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(11, 4, 3, 5, generator=generator) * 3 + 100).to(dtype).movedim(1, feature_dim)
    ids = torch.arange(11) % 3
    weights = torch.rand(11, 3, generator=generator).softmax(1)
    hard, soft = Moments(3, 4, x.device), Moments(3, 4, x.device)
    for part, part_ids, part_weights in zip(x.split(4), ids.split(4), weights.split(4), strict=True):
        hard.add(part, part_ids, feature_dim)
        soft.add(part, part_weights, feature_dim)
    vectors = x.movedim(feature_dim, -1).flatten(1, 2).double()
    for context in range(3):
        mine = vectors[ids == context].flatten(0, 1)
        torch.testing.assert_close(hard.rows().mean[context], mine.mean(0), rtol=1e-6, atol=1e-5)
        assert_near(hard.rows().variance[context], mine.var(0, correction=0))
        share = (weights[:, context] / weights[:, context].sum()).double()[:, None, None] / vectors.shape[1]
        mean = (vectors * share).sum((0, 1))
        torch.testing.assert_close(soft.rows().mean[context], mean, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            soft.rows().variance[context], ((vectors - mean).square() * share).sum((0, 1)), rtol=1e-4, atol=1e-4
        )


def test_relative_rows() -> None:
    def rows(*values: float) -> Rows:
        return Rows(torch.tensor([[values[0]]]).double(), torch.tensor([[values[1]]]).double())

    measured, row, reference = rows(5, 8), rows(1, 3), rows(2, 2)
    mean, variance = relative_rows(measured, row, reference)
    assert variance.item() == pytest.approx(3 * 8 / 2)
    assert mean.item() == pytest.approx(5 + (1 - 2) * 2)
    for x in (-1.0, 4.0):  # a reference input, and where the context has the same place in its own distribution
        moved = 5 + (x - 2) * (8 / 2) ** 0.5
        assert (moved - mean.item()) / variance.item() ** 0.5 == pytest.approx((x - 1) / 3**0.5)
    assert relative_rows(measured, row, None).mean.item() == 5
    assert relative_rows(measured, row, None).variance.item() == pytest.approx(8)
    assert relative_rows(reference, row, reference).mean.item() == 1
    constant = relative_rows(rows(5, 0), row, reference)
    assert (constant.mean.item(), constant.variance.item()) == (5 - 1, 3)
    shrunk = shrunk_rows(measured, row, torch.tensor([6.0]), 2)
    assert shrunk.mean.item() == pytest.approx((2 * 1 + 6 * 5) / 8)
    assert shrunk.variance.item() == pytest.approx((2 * 3 + 6 * 8) / 8)


# --------------------------------------------------------------------------------------------------------- a real shift


@seeded
def digits_net(norm: Callable[[int], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on scikit-learn's digits for seconds, and the test images."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), norm(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, stride=2), norm(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), norm(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(300):
        rows = torch.randint(0, 1200, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval(), x, y


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(4, c)], ids=["batch norm", "group norm"])
def test_accuracy_in_a_mixed_stream_of_real_digits(norm: Callable[[int], nn.Module]) -> None:
    model, x, y = digits_net(norm)
    train, test, labels = x[:1200], x[1200:], y[1200:]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    shifted = {"dark": 0.3 * x - 0.7 + 0.1 * noise, "noisy": x + 0.9 * noise}

    def accuracy(images: Tensor, **ids: Any) -> float:
        with torch.no_grad():
            return float((model(images, **ids).argmax(1) == labels).float().mean())

    clean = accuracy(test)
    before = {name: accuracy(images[1200:]) for name, images in shifted.items()}
    cn_hf.adapt(model, {name: images[:64] for name, images in shifted.items()}, reference=train[:256])
    names = [("dark", "noisy")[row % 2] for row in range(len(test))]
    mixed = torch.where((torch.arange(len(test)) % 2 == 0)[:, None, None, None], *(s[1200:] for s in shifted.values()))
    after = accuracy(mixed, context_ids=names)
    assert clean > 0.9
    assert accuracy(test, context_ids="source") == clean
    assert after > sum(before.values()) / 2 + 0.1
    wrong = accuracy(mixed, context_ids=list(reversed(names)) if len(names) % 2 == 0 else names[1:] + names[:1])
    assert wrong < after
