"""The CUDA kernels: against float64 formulas, on a GPU or in Triton's interpreter; compiled for GPUs not there."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import HALF_ULP, INTERPRETED, MAPS, Case, arranged, draw
from torch import Tensor
from triton_cases import Recorder, run_in_the_interpreter, stack_bytes, triton

from cn_hf.errors import InputShapeError
from cn_hf.norm.fused import agreement, formulas, operators, triton_kernels

pytestmark = pytest.mark.usefixtures("poisoned")

TOKENS = {
    "tokens": Case((3, 50, 96), -1),
    "tokens-768": Case((2, 17, 768), -1),
    "tokens-segments": Case((2, 140, 97), -1),
    "tokens-many-samples": Case((40, 3, 40), -1),
    "tokens-3-features": Case((2, 70, 3), -1),
    "tokens-one-feature": Case((2, 5, 1), -1),
    "tokens-1500-features": Case((2, 3, 1500), -1),
    "tokens-8192-features": Case((2, 3, 8192), -1),
    "tokens-wider-than-registers": Case((1, 2, 9000), -1),
    "tokens-2d": Case((2, 5, 7, 24), -1),
    "tokens-channels-first": Case((2, 9, 9, 20), -1, "channels_first"),
    "tokens-strided": Case((2, 9, 20), -1, "strided"),
    "vectors": Case((6, 100), -1),
}

SOME_MAPS = [
    "map-7x7",
    "map-14x14",
    "map-row-longer-than-a-tile",
    "channels_last-3",
    "channels_last",
    "tokens-segments",
]
SOME_TOKENS = ["tokens", "tokens-segments", "tokens-1500-features"]
MAPS_AND_DTYPES = [(n, torch.float32) for n in MAPS] + [(n, torch.bfloat16) for n in SOME_MAPS]
TOKENS_AND_DTYPES = [(n, torch.float32) for n in TOKENS] + [(n, torch.bfloat16) for n in SOME_TOKENS]


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def coefficients(case: Case, dtype: torch.dtype, device: str, kind: str = "rows") -> tuple[Tensor, Tensor, Tensor]:
    """Center, scale and offset: a row a sample, one row, one row expanded, or rows of a wider table."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    samples, features = case.shape[0], case.shape[case.feature_dim]
    rows = 1 if kind in ("one", "expanded") else samples
    width = features + (5 if kind == "strided" else 0)
    center, scale, offset = torch.randn(3, rows, width, device=device, dtype=wide)[..., :features]
    if kind == "expanded":
        center, scale, offset = (table.expand(samples, features) for table in (center, scale, offset))
    return center, scale + 1.5, offset


def broadcast(rows: Tensor, case: Case) -> Tensor:
    shape = [1] * len(case.shape)
    shape[0], shape[case.feature_dim] = rows.shape
    return rows.double().reshape(shape)


def over_positions(values: Tensor, case: Case) -> Tensor:
    """Sum over the positions of each sample: ``(N, C)``."""
    return values.movedim(case.feature_dim, 1).flatten(2).sum(dim=2) if values.dim() > 2 else values


def check(actual: Tensor, expected: Tensor, terms: Tensor | None = None) -> None:
    """Within 1e-6 of the terms that went in, or of the largest result, and one rounding to the dtype.

    The interpreter cuts bfloat16 off where a GPU rounds to nearest.
    """
    assert actual.shape == expected.shape
    assert not actual.isnan().any(), "values that no program wrote"
    size = (expected if terms is None else terms).abs()
    ulps = HALF_ULP[actual.dtype] * (2 if INTERPRETED and actual.dtype == torch.bfloat16 else 1)
    precise = 1e-12 if actual.dtype == torch.float64 else 1e-6
    tolerance = precise * (size if terms is not None else size.amax()) + ulps * expected.abs() + 1e-30
    if actual.dtype == torch.float16:
        tolerance = tolerance + 2.0**-25  # half a step of its subnormal numbers
    error = (actual.double() - expected).abs()
    assert (error <= tolerance).all(), f"off by {float((error / tolerance).max()):.3g} times the tolerance"


def check_shift_scale(case: Case, x: Tensor, grad: Tensor, tables: tuple[Tensor, Tensor, Tensor | None]) -> None:
    center, scale, offset = tables
    y = triton_kernels.shift_scale(x, center, scale, offset, case.feature_dim)
    outputs = triton_kernels.shift_scale_backward(grad, x, center, scale, case.feature_dim, True)
    wide, slope = x.double() - broadcast(center, case), broadcast(scale, case)
    check(y, wide * slope + (0 if offset is None else broadcast(offset, case)))
    check(outputs[0], grad.double() * slope)
    terms = grad.double(), grad.double() * wide
    for actual, term in zip(outputs[1:], terms, strict=True):
        assert actual.dtype == center.dtype
        check(actual, over_positions(term, case), over_positions(term.abs(), case))
    for out in (y, outputs[0]):
        assert out.dtype == x.dtype
        assert case.layout in ("strided", "transposed") or out.stride() == x.stride()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), MAPS_AND_DTYPES, ids=str)
def test_shift_scale(name: str, dtype: torch.dtype, device: str) -> None:
    case = MAPS[name]
    check_shift_scale(case, *draw(case, dtype, device), coefficients(case, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in agreement.EXAMPLES if name != "combine"])
def test_kernels_agree_with_the_formulas(kernel: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert agreement.difference(triton_kernels, kernel, torch.device(device), dtype) is None


class Broken:
    """Stands in for a kernel: one of its results is off, or it cannot be built."""

    def __init__(self, kernel: Any, result: int | None) -> None:
        self.kernel, self.result = kernel, result

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            if self.result is None:
                raise RuntimeError("PassManager::run failed")
            self.kernel[grid](*arguments, **options)
            arguments[self.result].mul_(1.01)

        return launch


BREAKS = [
    ("rows", "_rows_forward", 1),
    ("rows_backward", "_rows_backward", 3),
    ("vectors", "_columns_forward", 1),
    ("vectors_backward", "_columns_backward", 4),
    ("norm", "_norm_forward", 3),
    ("norm_backward", "_norm_backward", 3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(("kernel", "function", "result"), BREAKS)
def test_a_broken_kernel_is_not_used(
    kernel: str, function: str, result: int, built: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one that cannot be built; the operators are right all the same, and one warning names it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(agreement, "module_for", lambda device_type: triton_kernels)
    monkeypatch.setattr(operators, "module_for", lambda device_type: triton_kernels)
    monkeypatch.setattr(triton_kernels, function, Broken(getattr(triton_kernels, function), result if built else None))
    agreement.allow_kernels(None)
    case = TOKENS["vectors"] if kernel.startswith("norm") else MAPS["tokens-one" if kernel[0] == "v" else "map-7x7"]
    x, grad = draw(case, torch.float32, device)
    tables = coefficients(case, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in (x, *tables)]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                if kernel.startswith("norm"):
                    y, expected = (
                        operators.norm_shift_scale(*leaves, 1e-5, True),
                        formulas.composed(*leaves, 1e-5, True),
                    )
                else:
                    y = operators.shift_scale(*leaves, case.feature_dim)
                    expected = formulas.shift_scale(*leaves, case.feature_dim)
                check(y, expected.double())
                for pair in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, expected)), strict=True):
                    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
            assert not agreement.trusted(kernel, x.device, torch.float32)
    finally:
        agreement.allow_kernels(None)
    told = [str(warning.message) for warning in caught if "context normalization" in str(warning.message)]
    assert len(told) == 1
    for part in (f"The {kernel} float32 kernel", "off by" if built else "PassManager", f"triton {triton.__version__}"):
        assert part in told[0]


@pytest.mark.gpu
def test_many_long_rows(device: str) -> None:
    case = Case((1, 256, 1, 4100), 1)
    check_shift_scale(case, *draw(case, torch.float32, device), coefficients(case, torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["map-7x7", "channels_last-3", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_shift_scale_other_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    case = MAPS[name]
    check_shift_scale(case, *draw(case, dtype, device), coefficients(case, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["map-7x7", "channels_last", "tokens", "vectors"])
@pytest.mark.parametrize("kind", ["one", "expanded", "strided"])
def test_shift_scale_rows(name: str, kind: str, device: str) -> None:
    case = MAPS[name]
    tables = coefficients(case, torch.float32, device, kind)
    check_shift_scale(case, *draw(case, torch.float32, device), tables)
    check_shift_scale(case, *draw(case, torch.float32, device), (*tables[:2], None))


@pytest.mark.gpu
def test_coefficients_of_any_strides(device: str) -> None:
    case = MAPS["tokens"]
    tables = tuple(table.T.contiguous().T for table in coefficients(case, torch.float32, device))
    assert tables[0].stride(1) != 1
    check_shift_scale(case, *draw(case, torch.float32, device), tables)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["map", "channels_last", "tokens"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "other", "expanded"])
def test_gradient_of_another_format(name: str, layout: str, device: str) -> None:
    case = MAPS[name]
    x, grad = draw(case, torch.float32, device)
    other = {"map": "channels_last", "channels_last": "contiguous", "tokens": "channels_first"}[name]
    if layout == "expanded":
        grad = torch.randn(case.shape[-1], device=device).expand(case.shape)
    else:
        grad = arranged(grad, other if layout == "other" else layout)
    check_shift_scale(case, x, grad, coefficients(case, torch.float32, device))
    if name == "tokens":
        check_norm(case, x, grad, coefficients(case, torch.float32, device), centered=True)


def norm_reference(x: Tensor, eps: float, centered: bool) -> Tensor:
    centered_x = x - x.mean(dim=-1, keepdim=True) if centered else x
    return centered_x * torch.rsqrt(centered_x.square().mean(dim=-1, keepdim=True) + eps)


def check_norm(
    case: Case, x: Tensor, grad: Tensor, tables: tuple[Tensor, Tensor, Tensor | None], *, centered: bool
) -> None:
    center, scale, offset = tables
    y, mean, rstd = triton_kernels.norm_shift_scale(x, center, scale, offset, 1e-5, centered)
    outputs = triton_kernels.norm_shift_scale_backward(grad, x, mean, rstd, center, scale, True, centered)
    wide = x.double().requires_grad_()
    xhat = norm_reference(wide, 1e-5, centered)
    moved, slope = xhat - broadcast(center, case), broadcast(scale, case)
    expected = moved * slope + (0 if offset is None else broadcast(offset, case))
    check(y, expected.detach())
    assert mean.dtype == rstd.dtype == center.dtype
    if centered:
        check(mean, x.double().mean(dim=-1), x.double().abs().mean(dim=-1))
        check(rstd, torch.rsqrt(x.double().var(dim=-1, correction=0) + 1e-5))
    else:
        assert mean.numel() == 0
        check(rstd, torch.rsqrt(x.double().square().mean(dim=-1) + 1e-5))
    terms = grad.double(), grad.double() * moved.detach()
    for actual, term in zip(outputs[1:], terms, strict=True):
        check(actual, over_positions(term, case), over_positions(term.abs() + grad.double().abs(), case))
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    pushes = (grad.double() * slope * rstd.double()[..., None]).abs()  # which may cancel but for their rounding
    check(outputs[0], expected_grad, pushes.amax(dim=-1, keepdim=True))
    assert y.dtype == outputs[0].dtype == x.dtype
    assert y.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), TOKENS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_norm_shift_scale(name: str, dtype: torch.dtype, centered: bool, device: str) -> None:
    case = TOKENS[name]
    check_norm(case, *draw(case, dtype, device), coefficients(case, dtype, device), centered=centered)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_norm_other_dtypes(dtype: torch.dtype, device: str) -> None:
    case = TOKENS["tokens"]
    tables = coefficients(case, dtype, device)
    x, grad = draw(case, dtype, device)
    if dtype == torch.float16:
        check_norm(case, x, grad, tables, centered=True)
        return
    y, mean, rstd = triton_kernels.norm_shift_scale(x, *tables, 1e-5, True)  # eps itself is float32 in a kernel
    expected = (norm_reference(x, 1e-5, True) - broadcast(tables[0], case)) * broadcast(tables[1], case)
    torch.testing.assert_close(y, expected + broadcast(tables[2], case), rtol=1e-12, atol=1e-12)
    assert mean.dtype == rstd.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["one", "expanded", "strided"])
def test_norm_rows(kind: str, device: str) -> None:
    case = TOKENS["tokens"]
    tables = coefficients(case, torch.float32, device, kind)
    check_norm(case, *draw(case, torch.float32, device), tables, centered=True)
    check_norm(case, *draw(case, torch.float32, device), (*tables[:2], None), centered=True)


@pytest.mark.gpu
def test_far_from_zero_keeps_precision(device: str) -> None:
    """Subtracted first, and a token's mean to more digits than float32 has, a mean of 1e4 costs forward nothing."""
    for name, case in {"map": MAPS["map"], **TOKENS}.items():
        if case.shape[case.feature_dim] < 20 and case.feature_dim == -1:
            continue  # what standardizes a handful of features is as uncertain as their variance
        x, grad = draw(case, torch.float32, device, mean=1e4)
        center, scale, offset = coefficients(case, torch.float32, device)
        if name == "map":
            check_shift_scale(case, x, grad, (center + 1e4, scale, offset))
        else:
            y, mean, _ = triton_kernels.norm_shift_scale(x, center, scale, offset, 1e-5, True)
            moved = norm_reference(x.double(), 1e-5, True) - broadcast(center, case)
            check(y, moved * broadcast(scale, case) + broadcast(offset, case))
            check(mean, x.double().mean(dim=-1))


@pytest.mark.gpu
def test_nan_and_infinity_stay_where_they_are(device: str) -> None:
    for case in (MAPS["map-7x7"], MAPS["channels_last-3"], MAPS["tokens"]):
        x, _ = draw(case, torch.float32, device)
        x[1, 2, 1], x[0, 0, 0] = math.nan, math.inf
        center, scale, offset = coefficients(case, torch.float32, device)
        y = triton_kernels.shift_scale(x, center, scale, offset, case.feature_dim)
        expected = (x.double() - broadcast(center, case)) * broadcast(scale, case) + broadcast(offset, case)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        sums, dots = triton_kernels.shift_scale_backward(x, x, center, scale, case.feature_dim, False)[1:]
        assert torch.equal(sums.isfinite(), over_positions(x, case).isfinite())
        assert torch.equal(dots.isfinite(), sums.isfinite())
    x, _ = draw(TOKENS["tokens"], torch.float32, device)
    x[1, 2, 1] = math.nan
    y, mean, rstd = triton_kernels.norm_shift_scale(x, *coefficients(TOKENS["tokens"], x.dtype, device), 1e-5, True)
    spoilt = x.isnan().any(dim=-1)
    for actual in (y.isnan().any(dim=-1), y.isnan().all(dim=-1), mean.isnan(), rstd.isnan()):
        assert torch.equal(actual, spoilt)


@pytest.mark.gpu
def test_constant_tokens_have_no_deviation(device: str) -> None:
    """The variance of a constant token is zero, however large its value: no NaN, and ``y`` is what the center gives."""
    x = torch.full((2, 3, 100), 1e8 / 3, device=device)
    center, scale, offset = coefficients(Case((2, 3, 100), -1), torch.float32, device)
    y, _, rstd = triton_kernels.norm_shift_scale(x, center, scale, offset, 1e-5, True)
    expected = (offset - center * scale)[:, None].expand_as(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-3)  # the mean may be off by a rounding of its correction
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("need_x", [True, False])
def test_two_runs_are_equal(need_x: bool, device: str) -> None:
    for case in (MAPS["map-row-longer-than-a-tile"], MAPS["tokens-segments"]):
        x, grad = draw(case, torch.float32, device)
        center, scale, offset = coefficients(case, torch.float32, device)
        outputs = [triton_kernels.shift_scale_backward(grad, x, center, scale, case.feature_dim, need_x) for _ in "ab"]
        if case.feature_dim == -1:
            forward = [triton_kernels.norm_shift_scale(x, center, scale, offset, 1e-5, True) for _ in "ab"]
            assert all(map(torch.equal, *forward))
            arguments = grad, x, *forward[0][1:], center, scale, need_x, True
            outputs += [triton_kernels.norm_shift_scale_backward(*arguments) for _ in "ab"]
        for first, second in zip(outputs[::2], outputs[1::2], strict=True):
            assert (first[0] is not None) == need_x
            assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    center, scale, offset = torch.ones(3, shape[0], 3)
    assert triton_kernels.shift_scale(x, center, scale, offset, 1).shape == shape
    grad_x, sums, dots = triton_kernels.shift_scale_backward(x, x, center, scale, 1, True)
    assert grad_x.shape == shape
    tokens = x.movedim(1, -1)
    y, mean, rstd = triton_kernels.norm_shift_scale(tokens, center, scale, offset, 1e-5, True)
    assert y.shape == tokens.shape
    assert mean.shape == rstd.shape == tokens.shape[:-1]
    last = triton_kernels.norm_shift_scale_backward(y, tokens, mean, rstd, center, scale, False, True)
    assert last[0] is None
    for total in (sums, dots, *last[1:]):
        assert torch.equal(total, torch.zeros(shape[0], 3))


def test_endless_sample() -> None:
    x = torch.empty(1, 1, 2**30 + 1, device="meta", dtype=torch.bfloat16)
    rows = torch.empty(1, 1, device="meta")
    with pytest.raises(InputShapeError, match="in parts"):
        triton_kernels.shift_scale(x, rows, rows, None, 1)


@pytest.mark.parametrize("samples", [1, 7, 256, 5000])
@pytest.mark.parametrize("features", [1, 3, 64, 65, 197, 768, 8192])
@pytest.mark.parametrize("length", [1, 7, 64, 197, 3136, 1_000_000])
def test_every_value_is_in_one_tile(samples: int, features: int, length: int) -> None:
    for values in (2048, 4096):
        column = triton_kernels._column_launch(
            samples, features, length, wanted=2048, values=values, warps=8, bytes_each=8
        )
        _, blocks, segments, tiles, units, align, block_l, block_c, _ = column.sizes
        assert units * align == features
        assert (blocks - 1) * block_c < features <= blocks * block_c
        assert ((segments - 1) * tiles) * block_l < length <= segments * tiles * block_l
        assert tiles <= 64
        assert column.grid == (samples * blocks * segments,)
        norm = triton_kernels._norm_launch(samples, features, length, wanted=2048, values=values // 128, bytes_each=8)
        _, segments, tiles, units, align, block_l, block_c, _ = norm.sizes
        assert ((segments - 1) * tiles) * block_l < length <= segments * tiles * block_l
        assert tiles <= 64
        assert features <= block_c
        assert norm.grid == (samples * segments,)
    row = triton_kernels._row_launch(samples, features, length)
    rows, _, segments, units, align, block_r, block_l = row.sizes
    assert units * align == length
    assert (segments - 1) * block_l < length <= segments * block_l
    assert block_r == 1 or block_l >= length
    assert row.grid == (-(-rows // block_r) * segments,)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loads and stores of 16 bytes, no spilled registers, no atomics."""
    try:
        assert triton.knobs.nvidia.ptxas.path
        assert triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"this triton cannot compile for CUDA: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    names = [f"_{view}_{way}" for view in ("rows", "columns", "norm") for way in ("forward", "backward")]
    recorders = [Recorder(getattr(triton_kernels, name), capability) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(triton_kernels, name, recorder)
    x = torch.empty(256, 64, 56, 56, dtype=dtype, device="meta")
    rows = torch.empty(256, 64, device="meta")
    for maps in (x, x.to(memory_format=torch.channels_last)):
        triton_kernels.shift_scale(maps, rows, rows, rows, 1)
        triton_kernels.shift_scale_backward(maps, maps, rows, rows, 1, True)
    tokens, rows = torch.empty(256, 197, 768, dtype=dtype, device="meta"), torch.empty(256, 768, device="meta")
    _, mean, rstd = triton_kernels.norm_shift_scale(tokens, rows, rows, rows, 1e-5, True)
    triton_kernels.norm_shift_scale_backward(tokens, tokens, mean, rstd, rows, rows, True, True)
    for name, recorder in zip(names, recorders, strict=True):
        (kernel,) = recorder.compiled
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", kernel.asm["ptx"]), name
        assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"]), name
        assert not re.search(r"^\s*(atom|red)\.", kernel.asm["ptx"], re.MULTILINE), name
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, name


REAL = {
    "maps": Case((256, 64, 56, 56), 1),
    "channels_last": Case((256, 64, 56, 56), 1, "channels_last"),
    "maps-small": Case((256, 128, 8, 8), 1),
    "maps-7x7": Case((256, 2048, 7, 7), 1),
    "image": Case((2, 3, 224, 224), 1),
    "image-channels_last": Case((2, 3, 224, 224), 1, "channels_last"),
    "tokens": Case((256, 197, 768), -1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_size(name: str, dtype: torch.dtype, cuda: str) -> None:
    case = REAL[name]
    x, grad = draw(case, dtype, cuda)
    tables = coefficients(case, dtype, cuda)
    check_shift_scale(case, x, grad, tables)
    if case.feature_dim == -1:
        check_norm(case, x, grad, tables, centered=True)
        check_norm(case, x, grad, tables, centered=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["maps", "channels_last", "tokens"])
def test_real_size_offsets(name: str, cuda: str) -> None:
    """More than 2**31 values: the last samples are as right as the first."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # memory is too dear to be filled twice
    whole = Case((33_000, 1024, 64), -1) if name == "tokens" else Case((33_000, 64, 32, 32), 1, name)
    layout = {"memory_format": torch.channels_last} if name == "channels_last" else {}
    x = torch.empty(whole.shape, dtype=torch.bfloat16, device=cuda, **layout).normal_()
    assert x.numel() > 2**31
    tables = coefficients(whole, x.dtype, cuda)
    y = triton_kernels.shift_scale(x, *tables, whole.feature_dim)
    grad_x, sums, dots = triton_kernels.shift_scale_backward(x, x, *tables[:2], whole.feature_dim, True)
    outputs = [y, grad_x, sums, dots]
    if name == "tokens":
        y, mean, rstd = triton_kernels.norm_shift_scale(x, *tables, 1e-5, True)
        outputs += triton_kernels.norm_shift_scale_backward(x, x, mean, rstd, *tables[:2], True, True)
        outputs += [y, mean, rstd]
    for part in (slice(0, 4), slice(-4, None)):  # the same samples alone, which the other tests hold to the formulas
        few, rows = x[part], tuple(table[part] for table in tables)
        alone = [triton_kernels.shift_scale(few, *rows, whole.feature_dim)]
        alone += triton_kernels.shift_scale_backward(few, few, *rows[:2], whole.feature_dim, True)
        if name == "tokens":
            y, mean, rstd = triton_kernels.norm_shift_scale(few, *rows, 1e-5, True)
            alone += triton_kernels.norm_shift_scale_backward(few, few, mean, rstd, *rows[:2], True, True)
            alone += [y, mean, rstd]
        for actual, expected in zip(outputs, alone, strict=True):
            torch.testing.assert_close(actual[part], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
def test_real_size_second_device(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    check_shift_scale(
        MAPS["map"], *draw(MAPS["map"], torch.float32, "cuda:1"), coefficients(MAPS["map"], torch.float32, "cuda:1")
    )
