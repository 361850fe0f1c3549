"""Compiled kernels are used once they agreed with the formulas: each broken on purpose; and the folder they lie in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cn_hf.norm.functional import context_norm_plus
from cn_hf.norm.fused import agreement, cache, formulas, native
from cn_hf.norm.fused.operators import norm_shift_scale, shift_scale

CPU = torch.device("cpu")


def forget() -> None:
    """As in a process that has just started."""
    for cached in (native.library, native._mark, native._version):
        cached.cache_clear()
    agreement.allow_kernels(None)


@pytest.fixture
def kernels_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache's folder, empty, and a compiler that need not hurry."""
    if native.library() is None:
        pytest.skip("no C++ compiler with OpenMP here, so there are no CPU kernels to test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_FLAGS", ["-O0" if flag == "-O3" else flag for flag in native._FLAGS])
    forget()
    yield tmp_path / "cache" / "cn_hf" / "kernels"
    forget()


@pytest.fixture
def compiler_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the compiler was called to make a library."""
    command = native.compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    counting = tmp_path / "counting"
    counting.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo x >> {tmp_path}/calls; sleep 0.3;; esac\nexec {command[0]} "$@"\n'
    )
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    return lambda: (tmp_path / "calls").read_text().count("x") if (tmp_path / "calls").exists() else 0


# ------------------------------------------------------------------------------------------------------------ agreement

BREAKS = {
    "one": (
        {
            "* scale + offset);": "* scale - offset);",
            "block_sum[c] += value;": "block_sum[c] += 0.99f * value;",
            "shared = centered ? shared / C : 0;": "shared = 0;",
        },
        {"rows", "vectors_backward", "norm_backward"},
    ),
    "two": (
        {
            "sum += block_sum;": "sum = block_sum;",
            "unit - center[c])": "unit + center[c])",
            "store(y + at, values[c][lane])": "store(y + at, 1.01f * values[c][lane])",
        },
        {"rows_backward", "vectors", "norm", "combine"},
    ),
}


def break_sources(folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: dict[str, str]) -> None:
    copies = [Path(shutil.copy(path, folder / path.name)) for path in [*native.SOURCES, native.HEADER]]
    texts = {path: path.read_text() for path in copies}
    for old, new in replaced.items():
        assert any(old in text for text in texts.values()), old
        texts = {path: text.replace(old, new) for path, text in texts.items()}
    for path, text in texts.items():
        path.write_text(text)
    monkeypatch.setattr(native, "SOURCES", copies[:-1])
    monkeypatch.setattr(native, "HEADER", copies[-1])
    forget()


@pytest.mark.parametrize("which", BREAKS)
def test_a_broken_kernel_is_not_used(
    which: str, kernels_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are; results are right all the same, and one warning a kernel names it, the device and versions."""
    replaced, broken = BREAKS[which]
    break_sources(tmp_path, monkeypatch, replaced)
    maps, tokens = torch.randn(3, 4, 9, 9, requires_grad=True), torch.randn(3, 70, 8, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for x, axis in ((maps, 1), (tokens, -1)):
                rows = [(torch.rand(3, x.shape[axis]) + 0.5).requires_grad_() for _ in range(3)]
                pairs = [(shift_scale(x, *rows, axis), formulas.shift_scale(x, *rows, axis))]
                if axis == -1:
                    pairs.append((norm_shift_scale(x, *rows, 1e-5, True), formulas.composed(x, *rows, 1e-5, True)))
                for found, expected in pairs:
                    torch.testing.assert_close(found, expected)
                    grad = torch.randn(x.shape)
                    gradients = (torch.autograd.grad(out, [x, *rows], grad) for out in (found, expected))
                    for mine, theirs in zip(*gradients, strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            mean, var = torch.randn(3, 8), torch.rand(3, 8) + 0.5
            found = context_norm_plus(tokens.detach(), mean, var)
            torch.testing.assert_close(found, context_norm_plus(tokens.detach().double(), mean, var).float())
    told = [str(warning.message) for warning in caught if "context normalization" in str(warning.message)]
    assert {message.split()[1] for message in told} == broken
    assert len(told) == len(broken)
    for message in told:
        assert "not used on cpu" in message
        assert torch.__version__ in message
    assert {name for name in agreement.EXAMPLES if not agreement.trusted(name, CPU, torch.float32)} == broken


def test_numbers_of_two_bytes_read_wrongly(
    kernels_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_sources(tmp_path, monkeypatch, {"uint32_t(value.bits) << 16": "uint32_t(value.bits) << 15"})
    with pytest.warns(UserWarning, match="bfloat16 kernel"):
        assert not any(agreement.trusted(name, CPU, torch.bfloat16) for name in agreement.EXAMPLES)
    assert all(agreement.trusted(name, CPU, torch.float32) for name in agreement.EXAMPLES)


def test_what_agreed_is_remembered_on_disk(kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreement.trusted("rows", CPU, torch.float32)
    forget()
    asked = []
    monkeypatch.setattr(agreement, "difference", lambda *arguments: asked.append(arguments[1]))
    assert agreement.trusted("rows", CPU, torch.float32)
    assert asked == []
    assert agreement.trusted("rows", CPU, torch.bfloat16)
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-DOTHER"])  # another library has to prove itself
    forget()
    assert agreement.trusted("rows", CPU, torch.float32)
    assert asked == ["rows", "rows"]


def test_kernels_of_a_run() -> None:
    """Those that all processes have; the rest are torch's operators, until another run begins."""
    usable = agreement.usable_kernels(CPU, [torch.float32, torch.float64])
    if native.library() is not None:
        assert usable == {f"{name} float32" for name in agreement.EXAMPLES}
    try:
        agreement.allow_kernels(usable - {"rows float32"})
        assert agreement.usable_kernels(CPU, [torch.float32]) == usable - {"rows float32"}
        assert not agreement.trusted("rows", CPU, torch.float32)
        assert not agreement.trusted("vectors", CPU, torch.bfloat16)
    finally:
        agreement.allow_kernels(None)
    assert agreement.usable_kernels(CPU, [torch.float32]) == usable


# ----------------------------------------------------------------------------------------------------------- the folder


def library_in(folder: Path) -> Path:
    [found] = folder.glob("*.so")
    return found


def test_the_folder_is_private_and_holds_nothing_half_made(kernels_folder: Path) -> None:
    kernels_folder.mkdir(parents=True, mode=0o755)
    leftover = kernels_folder / f".{'0' * 20}.so.{'a' * 32}.tmp"
    leftover.write_bytes(b"killed")
    assert native.library() is not None
    assert kernels_folder.stat().st_mode & 0o777 == 0o700
    path = library_in(kernels_folder)
    assert {file.name for file in kernels_folder.iterdir()} == {path.name, f"{path.stem}.sha256", "lock"}


@pytest.mark.parametrize("damage", ["truncated", "no checksum", "a link"])
def test_a_damaged_library_is_compiled_again(
    damage: str, kernels_folder: Path, compiler_calls: Callable[[], int], tmp_path: Path
) -> None:
    assert native.library() is not None
    path = library_in(kernels_folder)
    whole = path.read_bytes()
    path.unlink()  # the process has it mapped
    if damage == "a link":
        (tmp_path / "elsewhere").write_bytes(whole)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else whole)
    checksum = path.with_suffix(".sha256")
    if damage == "no checksum":
        checksum.unlink()
    forget()
    assert native.library() is not None
    assert compiler_calls() == 2
    assert cache.intact(path)


def test_a_library_without_the_functions_is_compiled_again(
    kernels_folder: Path, compiler_calls: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: what the compiler makes then is as good as it gets, and torch's operators do the rest."""
    (tmp_path / "other.cpp").write_text('extern "C" int other() { return 1; }\n')
    command = native.compiler()
    assert command is not None
    other = [*command, "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(tmp_path / "other.so")]
    subprocess.run(other, check=True)
    path = shutil.copy(tmp_path / "other.so", cache.private_folder() / f"{native._mark(tuple(command))}.so")
    cache.write_checksum(path)
    forget()
    calls = compiler_calls()
    assert native.library() is not None
    assert compiler_calls() == calls + 1
    monkeypatch.setattr(native, "SOURCES", [tmp_path / "other.cpp"])
    forget()
    with pytest.warns(UserWarning, match="are not used"):
        assert native.library() is None
    assert compiler_calls() == calls + 2


def test_one_process_compiles_while_others_wait(
    kernels_folder: Path, compiler_calls: Callable[[], int], tmp_path: Path
) -> None:
    code = "from cn_hf.norm.fused import native; native._FLAGS[1] = '-O0'; print(native.library() is not None)"
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["True"] * 2
    assert compiler_calls() == 1


def refused(match: str) -> None:
    forget()
    with pytest.warns(UserWarning, match=match):
        assert native.library() is None
    assert not agreement.trusted("rows", CPU, torch.float32)


@pytest.mark.parametrize("name", ["cn_hf", "kernels"])
def test_a_link_in_place_of_the_folder_is_refused(name: str, kernels_folder: Path, tmp_path: Path) -> None:
    place = kernels_folder if name == "kernels" else kernels_folder.parent
    place.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    refused("Expected .* to be a folder of this user")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_every_user_may_change_is_refused(kernels_folder: Path) -> None:
    cache_home = kernels_folder.parents[1]
    cache_home.mkdir()
    cache_home.chmod(0o777)
    refused("Every user may replace what is in")
    cache_home.chmod(0o1777)  # as /tmp is
    forget()
    assert native.library() is not None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("of_other", ["the folder", "a file in it"])
def test_another_users_library_is_not_loaded(
    of_other: str, kernels_folder: Path, compiler_calls: Callable[[], int]
) -> None:
    assert native.library() is not None
    path = library_in(kernels_folder)
    if of_other == "the folder":
        os.chown(kernels_folder, 12345, 12345)
        refused("another user's")
    else:
        for file in (path, path.with_suffix(".sha256")):
            os.chown(file, 12345, 12345)
        kernels_folder.chmod(0o777)
        forget()
        assert native.library() is not None
        assert compiler_calls() == 2
        assert path.stat().st_uid == 0
        assert kernels_folder.stat().st_mode & 0o777 == 0o700


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("caches", "./caches", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache.private_folder() == (tmp_path / "home/.cache/cn_hf/kernels").resolve()
    assert not (tmp_path / "caches").exists()


def test_a_compiler_that_speaks_no_utf8(kernels_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking = tmp_path / "speaking"
    speaking.write_bytes(b"#!/bin/sh\nprintf 'fr\\351d\\351ric \\377'\nprintf 'erreur \\351' >&2\nexit 1\n")
    speaking.chmod(0o755)
    monkeypatch.setenv("CXX", str(speaking))
    refused("erreur")


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "cn_hf").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        refused("cn_hf")
    finally:
        forget()


def test_names_are_remembered_by_all_who_add() -> None:
    nowhere = cache.Remembered(None)
    nowhere.add("rows float32")
    assert "rows float32" not in nowhere


def test_damaged_memory_is_as_good_as_none(tmp_path: Path) -> None:
    memory = cache.Remembered(tmp_path / "agreed")
    assert "rows float32" not in memory
    memory.add("rows float32")
    cache.Remembered(tmp_path / "agreed").add("norm float32")
    assert "rows float32" in memory
    assert "norm float32" in memory
    assert "rows float" not in memory
    (tmp_path / "agreed").write_bytes(b"\x00\xff\nrows flo")
    assert "rows float32" not in memory
