"""The CUDA kernels of mixtures: against float64 formulas, on a GPU or interpreted; compiled for GPUs not there."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, MAPS, Case, draw
from mixture_cases import (
    EPS,
    LAYOUTS,
    affine,
    check_mixture,
    close,
    combined,
    laid_out,
    log_posteriors,
    mixture,
    mixture_of,
    mixture_reference,
    statistics,
    vectors_of,
)
from torch import Tensor
from triton_cases import Recorder, run_in_the_interpreter, stack_bytes, triton

from cn_hf.norm import triton_combination, triton_mixture
from cn_hf.norm.combination import Combination
from cn_hf.norm.em import Densities, Mixture
from cn_hf.norm.functional import mixture_norm
from cn_hf.norm.kernels import use_kernels
from cn_hf.norm.mixture_kernels import fused_mixture_norm

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


# ----------------------------------------------------------------------------------------------------------------- CN+


def plus(
    x: Tensor, mean: Tensor, var: Tensor, factor: float, rows: tuple[Tensor | None, Tensor | None], case: Case
) -> Tensor | None:
    shift = mean.mean(dim=0)
    densities = Densities.of(mean, var + EPS)
    combination = Combination.of(mean - shift, var, EPS)
    return triton_combination.combine(x, densities, combination, factor, *rows, case.feature_dim)


def plus_reference(
    x: Tensor, mean: Tensor, var: Tensor, factor: float, rows: tuple[Tensor | None, Tensor | None], case: Case
) -> Tensor:
    vectors, mean, var = vectors_of(x.double(), case), mean.double(), var.double()
    prior = mean.new_full((len(mean),), 1 / len(mean))
    tau = log_posteriors(vectors, mean, var + EPS, prior).exp()
    out = combined(vectors, tau * factor, mean, var, EPS)
    weight, bias = rows
    out = out if weight is None else out * weight
    return laid_out(out if bias is None else out + bias, x, case)


def check_plus(case: Case, contexts: int, dtype: torch.dtype, device: str, *, scaled: bool, with_affine: bool) -> None:
    x, _ = draw(case, dtype, device)
    mean, var = statistics(case, contexts, device)
    rows = affine(case, device) if with_affine else (None, None)
    factor = math.sqrt(contexts) if scaled else 1.0
    y = plus(x, mean, var, factor, rows, case)
    assert y is not None
    assert y.dtype == x.dtype
    assert y.is_contiguous() or y.stride() == x.stride()
    close(y, plus_reference(x, mean, var, factor, rows, case), 3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_plus(name: str, device: str) -> None:
    check_plus(MAPS[name], 3, torch.float32, device, scaled=True, with_affine=True)


@pytest.mark.gpu
@pytest.mark.parametrize("contexts", [1, 2, 20, 30, 64])
@pytest.mark.parametrize("case", [Case((2, 9, 5, 5), 1), Case((2, 7, 19), -1)], ids=["map", "tokens"])
def test_plus_for_numbers_of_contexts(contexts: int, case: Case, device: str) -> None:
    check_plus(case, contexts, torch.float32, device, scaled=False, with_affine=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["map", "tokens"])
def test_plus_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    check_plus(MAPS[name], 5, dtype, device, scaled=True, with_affine=True)


@pytest.mark.gpu
def test_plus_of_many_features(device: str) -> None:
    check_plus(Case((1, 2, 1500), -1), 2, torch.float32, device, scaled=False, with_affine=False)


@pytest.mark.gpu
def test_plus_of_equal_contexts_is_exact(device: str) -> None:
    """What the contexts share stays out of the products, so ``T`` equal ones give what one gives."""
    case = Case((2, 5, 8), -1)
    x, _ = draw(case, torch.float32, device)
    mean, var = statistics(case, 1, device)
    one = plus(x, mean, var, 1.0, (None, None), case)
    four = plus(x, mean.expand(4, -1).contiguous(), var.expand(4, -1).contiguous(), 1.0, (None, None), case)
    torch.testing.assert_close(four, one, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["map-7x7", "tokens"])
def test_plus_keeps_a_vector_to_itself(name: str, device: str) -> None:
    case = MAPS[name]
    x, _ = draw(case, torch.float32, device)
    mean, var = statistics(case, 4, device)
    clean = plus(x, mean, var, 1.0, (None, None), case)
    assert clean is not None
    vectors = x.movedim(case.feature_dim, -1)  # a view
    vectors[(1,) + (2,) * (vectors.dim() - 2)][0] = math.nan
    vectors[(0,) * (vectors.dim() - 1)][1] = 1e30
    y = plus(x, mean, var, 1.0, (None, None), case)
    assert y is not None
    out, kept = y.movedim(case.feature_dim, -1), clean.movedim(case.feature_dim, -1)
    spoilt = vectors.isnan().any(dim=-1)
    far = (vectors == 1e30).any(dim=-1)
    assert out[spoilt].isnan().all()
    assert out[far].isfinite().all()
    assert torch.equal(out[~spoilt & ~far], kept[~spoilt & ~far])


@pytest.mark.gpu
def test_plus_far_from_zero(device: str) -> None:
    case = MAPS["map"]
    x, _ = draw(case, torch.float32, device, mean=1e3)
    mean, var = statistics(case, 4, device)
    mean = mean + 1e3
    y = plus(x, mean, var, 1.0, (None, None), case)
    assert y is not None
    close(y, plus_reference(x, mean, var, 1.0, (None, None), case), 3e-4)  # as the shift, rounded, is uncertain


def test_plus_of_nothing() -> None:
    for shape, feature_dim in (((0, 3, 4, 4), 1), ((2, 3, 0, 4), 1), ((2, 0, 3), -1)):
        case = Case(shape, feature_dim)
        y = plus(torch.empty(shape), *statistics(case, 2, "cpu"), 1.0, (None, None), case)
        assert y is not None
        assert y.shape == shape


def test_plus_leaves_what_it_does_not_know_to_others() -> None:
    case = Case((2, 3, 4), -1)
    x = torch.randn(case.shape)
    assert plus(x, *statistics(case, 65, "cpu"), 1.0, (None, None), case) is None
    assert plus(x.double(), *statistics(case, 2, "cpu", torch.float64), 1.0, (None, None), case) is None


# ------------------------------------------------------------------------------------------------------------------ MN


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_mixture(name: str, device: str) -> None:
    check_mixture(triton_mixture, MAPS[name], 3, torch.float64, device, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("components", [1, 2, 5, 8])
def test_mixture_for_numbers_of_components(components: int, device: str) -> None:
    check_mixture(triton_mixture, Case((3, 6, 7, 7), 1), components, torch.float64, device, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["map", "map-7x7", "channels_last", "tokens"])
def test_mixture_single_precision(name: str, device: str) -> None:
    check_mixture(triton_mixture, MAPS[name], 3, torch.float32, device, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixture_half_precision(dtype: torch.dtype, device: str) -> None:
    check_mixture(triton_mixture, MAPS["map"], 3, dtype, device, 2e-5)


@pytest.mark.gpu
def test_mixture_of_many_programs(device: str) -> None:
    """More tiles than one program takes, the last of them cut: partial sums are merged, and peaks differ."""
    check_mixture(triton_mixture, Case((5, 2, 40, 41), 1), 3, torch.float64, device, 1e-10)
    check_mixture(triton_mixture, Case((3, 20, 300), -1), 2, torch.float64, device, 1e-10)


@pytest.mark.gpu
def test_mixture_far_from_zero(device: str) -> None:
    check_mixture(triton_mixture, MAPS["map"], 3, torch.float32, device, 1e-3, mean=1e3)


@pytest.mark.gpu
def test_mixture_with_a_far_component(device: str) -> None:
    """Its posteriors are all zero in float32; its statistics are those of the vectors nearest to it, and finite."""
    case = MAPS["map"]
    x, grad = draw(case, torch.float32, device)
    mean, var, prior = mixture_of(case, 3, device, torch.float32)
    mean[2] += 200
    theta, ones = (mean, var, prior), torch.ones(mean.shape[1], device=device)
    actual = mixture(triton_mixture, x, theta, (None, None), case, (grad, None, None))
    assert all(part.isfinite().all() for part in actual)
    known = tuple(tensor.double() for tensor in theta)
    expected = mixture_reference(x.double(), known, ones.double(), 0 * ones, case)  # type: ignore[arg-type]
    for mine, part in zip(actual, expected, strict=False):
        close(mine, part, 1e-2)  # logarithms of the far one are in the thousands: their digits are few


@pytest.mark.gpu
def test_mixture_twice_is_equal_and_shares_nothing(device: str) -> None:
    case = MAPS["channels_last"]
    x, grad = draw(case, torch.float32, device)
    theta, rows = mixture_of(case, 3, device, torch.float32), affine(case, device)
    first, second = (mixture(triton_mixture, x, theta, rows, case, (grad, None, None)) for _ in "ab")
    assert all(map(torch.equal, first, second))
    storages = [part.untyped_storage().data_ptr() for part in (x, grad, *first)]
    assert len(set(storages)) == len(storages)


def test_mixture_says_what_it_is_for() -> None:
    for shape, components in (((0, 3), 2), ((2, 0), 2), ((2, 2049), 2), ((2, 3), 9), ((2**30 + 1, 1), 2)):
        assert not triton_mixture.handles_mixture_norm(torch.empty(shape, device="meta"), components, -1)
    assert triton_mixture.handles_mixture_norm(torch.empty(1, 2048), 8, -1)


@pytest.mark.gpu
@pytest.mark.parametrize("affine", [True, False])
def test_the_differentiable_function(affine: bool, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    rows = [torch.rand(5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)] if affine else []
    theta = torch.randn(3, 5, device=device).double(), torch.rand(3, 5, device=device).double() + 0.5
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, device=device)
    weight, bias = rows or (None, None)
    out, mean, var = fused_mixture_norm(x, weight, bias, Densities.of(*theta, prior), prior, EPS, 1)
    mixture = Mixture(*theta, prior, prior.new_zeros(()), 0)
    with use_kernels("reference"):
        expected, statistics = mixture_norm(x, mixture, eps=EPS, feature_dim=1, weight=weight, bias=bias)
    for actual, wanted in zip((out, mean, var), (expected, *statistics), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    grads = [torch.randn_like(part) for part in (out, mean, var)]
    leaves = [x, *rows]
    actual = torch.autograd.grad((out, mean, var), leaves, grads)
    for mine, theirs in zip(actual, torch.autograd.grad((expected, *statistics), leaves, grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------- launches, compilation


@pytest.mark.parametrize("samples", [1, 7, 256, 5000])
@pytest.mark.parametrize("features", [1, 3, 64, 65, 768, 2048])
@pytest.mark.parametrize("length", [1, 49, 3136])
@pytest.mark.parametrize("components", [1, 3, 8, 64])
def test_every_vector_is_in_one_tile(samples: int, features: int, length: int, components: int) -> None:
    vectors = samples * length
    for lanes in (1, 8, 16):
        launch = triton_combination._combine_launch(samples, features, length, components, lanes)
        _, _, parts, _, _, units, align, _, block, _ = launch.sizes
        assert parts * units * align == vectors
        assert (launch.grid[0] - 1) * block < vectors <= launch.grid[0] * block
        assert block * lanes % 128 == 0
    for in_rows in (True, False):
        plan = triton_mixture._tiles(samples, features, length, components, in_rows)
        _, parts, _, _, _, units, align, _, block_p, block_c = plan.sizes
        assert parts * units * align == vectors
        assert block_c >= features
        assert (plan.in_all - 1) * block_p < vectors <= plan.in_all * block_p
        assert (plan.programs - 1) * plan.tiles < plan.in_all <= plan.programs * plan.tiles
        assert plan.programs <= 512


class SomeSpecialized(Recorder):
    """Knows the arguments that the compiler must not look at, and packed tables."""

    types = Recorder.types | {torch.int64: "*i64"}

    def compile(self, *arguments: Any, **options: Any) -> None:
        hidden = [p.name for p in self.kernel.params if p.do_not_specialize]
        values = [
            17 if parameter.name in hidden else value
            for parameter, value in zip(self.kernel.params, arguments, strict=True)
        ]
        super().compile(*values, **options)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.float32), (90, torch.float32), (90, torch.bfloat16)], ids=str
)
def test_compiled(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No atomics, no tf32; registers are not spilled, but for a few once a token of CN+."""
    try:
        assert triton.knobs.nvidia.ptxas.path
        assert triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"this triton cannot compile for CUDA: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    merging = ["_pack_tables", "_merge_statistics", "_merge_sums"]
    passing = ["_combine", "_mixture_statistics", "_mixture_forward", "_mixture_sums", "_mixture_backward"]
    homes = {
        name: triton_combination if "_combine" in name or "_pack" in name else triton_mixture
        for name in merging + passing
    }
    recorders = {name: SomeSpecialized(getattr(home, name), capability) for name, home in homes.items()}
    for name, recorder in recorders.items():
        monkeypatch.setattr(homes[name], name, recorder)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def run(x: Tensor, feature_dim: int, contexts: int, components: int) -> None:
        features = x.shape[feature_dim]
        row, table = empty(features), empty(features, contexts)
        densities = Densities(row, table, table, empty(contexts), empty(), empty(contexts))
        triton_combination.combine(x, densities, Combination(row, row, table.T, table.T), 1.0, row, row, feature_dim)
        table, prior = empty(features, components), empty(components)
        densities = Densities(row, table, table, prior, empty(), prior)
        forward = triton_mixture.mixture_norm(x, densities, prior, EPS, feature_dim, row, row)
        triton_mixture.mixture_norm_backward(x, x, *forward[2:], densities, prior, feature_dim, row)

    x = torch.empty(256, 64, 56, 56, dtype=dtype, device="meta")
    run(x, 1, 20, 3)
    run(x.to(memory_format=torch.channels_last), 1, 20, 3)
    for name, recorder in recorders.items():
        assert len(recorder.compiled) == 2, name
        for place, kernel in enumerate(recorder.compiled):
            assert not re.search(r"^\s*(atom|red)\.|tf32", kernel.asm["ptx"], re.MULTILINE), name
            allowed = 32 if name == "_combine" and place == 1 else 0
            assert stack_bytes(kernel.asm["cubin"], tmp_path) <= allowed, (name, place)
            if name in passing and (name, place) != ("_combine", 1):
                wide = r"ld\.global\S*\.v[24]\.b32|cp\.async"
                assert re.search(wide, kernel.asm["ptx"]), name


# ---------------------------------------------------------------------------------------------------------- real sizes

REAL = {
    "maps": Case((256, 64, 56, 56), 1),
    "channels_last": Case((256, 64, 56, 56), 1, "channels_last"),
    "maps-small": Case((256, 128, 8, 8), 1),
    "maps-7x7": Case((256, 2048, 7, 7), 1),
    "tokens": Case((256, 197, 768), -1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_size(name: str, dtype: torch.dtype, cuda: str) -> None:
    case = REAL[name]
    x, _ = draw(case, dtype, cuda)
    mean, var = statistics(case, 20, cuda)
    y = plus(x, mean, var, 1.0, (None, None), case)
    assert y is not None
    for part in (slice(0, 2), slice(-2, None)):  # a vector is its own affair
        close(y[part], plus_reference(x[part], mean, var, 1.0, (None, None), case), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["maps", "channels_last", "maps-small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_size_mixture(name: str, dtype: torch.dtype, cuda: str) -> None:
    check_mixture(REAL[name], 3, dtype, cuda, 5e-5)
