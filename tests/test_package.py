"""The package as a whole: what importing it costs, which way its imports point, and what it must not contain."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import cn_hf

PACKAGE = Path(cn_hf.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("timm", "transformers", "datasets", "accelerate", "kornia", "matplotlib", "sklearn", "torchvision", "evaluate")

# Floors of the house, lowest first; a unit may import those of the floors below its own. `models` stands alone, and
# hub and above import it. `devices`, `files`, `printing`, `processes` and `validation` are leaves beside `errors`;
# `registration` imports by name what a library that is being imported needs.
LEAVES = {"devices", "errors", "files", "printing", "processes", "registration", "validation"}
FLOORS: list[set[str]] = [
    {"norm"},
    {"reading", "patching"},
    {"contexts", "models"},
    {"hub", "data"},
    {"adaptation"},
    {"evaluation"},
    {"training"},
    {"recipes"},
    {"experiments"},
    {"app"},
    {"cli"},
]
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "devices": {"errors"},
    "files": {"errors"},
    "processes": {"errors"},
    "validation": {"errors"},
    "registration": set(),
    "printing": set(),
    **{unit: set().union(*FLOORS[:floor]) for floor, units in enumerate(FLOORS) for unit in units},
}
MAY_IMPORT["models"] = set()
MAY_IMPORT["contexts"] -= {"models"}
MAY_IMPORT["data"] -= {"models"}
MAY_IMPORT["__main__"] = {"cli"}
THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "norm": {"torch", "triton", "filelock"},  # torch needs them itself; triton on CUDA, filelock to compile
    "patching": {"torch", "tqdm", "timm", "PIL"},  # timm: a plain layer for folding; PIL: pictures to restyle
    "models": {"torch", "timm"},
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------ importing


@pytest.mark.slow
def test_importing_costs_little_more_than_torch() -> None:
    code = "import torch, time; t = time.process_time(); import cn_hf; print(time.process_time() - t)"
    assert statistics.median(float(run(code)) for _ in range(3)) <= 0.3


def test_importing_loads_none_of_the_heavy_libraries() -> None:
    check = f"print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(f"import sys, cn_hf; {check}") == "[]"
    names = "patch_model, ContextNorm, calibrate, fold_context, set_inference, use_contexts, CnHfError"
    assert run(f"import sys; from cn_hf import {names}; {check}") == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["cn_hf, timm, transformers", "timm, transformers, cn_hf"])
def test_both_orders_of_import_work(order: str) -> None:
    code = f"""
import {order}, torch
vit = timm.create_model("test_vit", img_size=32).eval()
hf = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, hidden_size=8,
    num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)).eval()
x = torch.randn(2, 3, 32, 32)
before = vit(x)
cn_hf.patch_model(vit); cn_hf.patch_model(hf)
print(bool((vit(x, context_ids=1) - before).abs().max() < 1e-4), hf(x[..., :16, :16], context_ids=2).logits.shape[0])
"""
    assert run(code) == "True 2"


def test_the_documented_names_are_there() -> None:
    layers = {"ContextNorm", "MixtureNorm", "ContextNormConfig"}
    calls = {"patch_model", "unpatch_model", "patch_report", "calibrate", "fold_context", "use_contexts"}
    assert layers | calls | {"set_inference", "context_parameters", "__version__"} <= set(cn_hf.__all__)
    for name in sorted(layers | calls | {"set_inference", "context_parameters"}):
        assert getattr(cn_hf, name).__module__.startswith("cn_hf."), name
    assert set(cn_hf.__all__) <= set(dir(cn_hf))
    with pytest.raises(AttributeError, match="no attribute 'patch_modl'"):
        cn_hf.patch_modl  # noqa: B018


# ---------------------------------------------------------------------------------------------------- import directions


def imported_names(path: Path, package: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by absolute name; names made for ``importlib`` included."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    here = parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.add(str(first.value))
    return found


def unit_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "cn_hf" and len(parts) > 1 else None


def broken_directions(package: Path) -> list[str]:
    """Imports that point the wrong way, as ``file -> unit``."""
    broken = []
    units = {path.stem if path.is_file() else path.name for path in package.iterdir()}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        unit = relative.parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        if unit not in MAY_IMPORT:
            broken.append(f"{relative}: {unit} has no place in the architecture")
            continue
        allowed = MAY_IMPORT[unit] | {unit} | (LEAVES if unit not in LEAVES else set())
        for name in sorted(imported_names(path, package)):
            target = unit_of(name)
            if target in units and target not in allowed:
                broken.append(f"{relative} -> {name}")
            top = name.split(".")[0]
            third_party = top != "cn_hf" and top not in sys.stdlib_module_names
            if unit in THIRD_PARTY and third_party and top not in THIRD_PARTY[unit]:
                broken.append(f"{relative} -> {name}")
    return broken


def test_imports_point_one_way() -> None:
    assert broken_directions(PACKAGE) == []


def file_graph(package: Path) -> dict[str, set[str]]:
    """The files of the package by module name, each with those that it imports, anywhere in it."""
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    # A name taken from a package's __init__ comes lazily from the file that defines it: such an edge is no circle.
    files = {name for name, path in modules.items() if path.name != "__init__.py"}
    return {name: (imported_names(modules[name], package) & files) - {name} for name in files}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that reach each other (strongly connected components of more than one file)."""
    reach = {name: {name} for name in graph}
    for name, found in reach.items():
        waiting = [name]
        while waiting:
            fresh = graph[waiting.pop()] - found
            found |= fresh
            waiting += fresh
    groups = {frozenset(other for other in found if name in reach[other]) for name, found in reach.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(file_graph(PACKAGE)) == []


def test_a_circle_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "cn_hf"
    (package / "hub").mkdir(parents=True)
    (package / "hub" / "a.py").write_text("from cn_hf.hub.b import f\n")
    (package / "hub" / "b.py").write_text("def f():\n    from cn_hf.hub import c\n")
    (package / "hub" / "c.py").write_text("import math\n")
    assert circles(file_graph(package)) == []
    (package / "hub" / "c.py").write_text("def f():\n    import cn_hf.hub.a\n")
    assert circles(file_graph(package)) == [["cn_hf.hub.a", "cn_hf.hub.b", "cn_hf.hub.c"]]


def test_every_part_of_the_house_is_seen() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    directions = {
        (path.relative_to(PACKAGE).parts[0], unit_of(name)) for path in files for name in imported_names(path, PACKAGE)
    }
    assert {("patching", "norm"), ("norm", "errors"), ("patching", "errors")} <= directions


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("norm/layers.py", "from cn_hf.patching import patch_model"),
        ("norm/layers.py", "import timm"),
        ("norm/layers.py", "def f():\n    import cn_hf.contexts"),
        ("norm/layers.py", "from cn_hf import data"),
        ("norm/layers.py", "from .. import data"),
        ("norm/layers.py", "from ..patching import patch"),
        ("norm/layers.py", "import importlib\n\ndef f():\n    return importlib.import_module('cn_hf.hub')"),
        ("norm/layers.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cn_hf.training import fit"),
        ("patching/patch.py", "from cn_hf.contexts import ColumnContexts"),
        ("patching/patch.py", "def f():\n    from transformers import ViTModel"),
        ("contexts/base.py", "from cn_hf.data import batches"),
        ("models/convnet.py", "import cn_hf.norm"),
        ("models/convnet.py", "import transformers"),
        ("data/batches.py", "from cn_hf.training import fit"),
        ("evaluation/metrics.py", "def f():\n    from cn_hf.training import fit"),
        ("hub/save.py", "from cn_hf import evaluation"),
        ("errors.py", "import torch"),
        ("errors.py", "from cn_hf.norm import ContextNorm"),
        ("novelty/thing.py", "import math"),
    ],
)
def test_a_broken_direction_is_seen(tmp_path: Path, file: str, line: str) -> None:
    package = tmp_path / "cn_hf"
    for unit in (*MAY_IMPORT, "novelty"):
        folder = package / unit
        if unit in ("errors", "cli", "files"):
            folder = folder.with_suffix(".py")
            folder.parent.mkdir(exist_ok=True)
            folder.write_text("")
        elif unit != "novelty" or file.startswith("novelty"):
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text("")
    if not file.startswith("novelty"):
        (package / file).write_text("import math\n")
        assert broken_directions(package) == []
    (package / file).write_text(line + "\n")
    assert any(entry.startswith(file) for entry in broken_directions(package))


# ------------------------------------------------------------------------------------------------------- what is inside


def test_no_machine_paths_in_the_repository() -> None:
    machine = ["/" + folder + "/" for folder in ("root", "home", "work", "Users", "mnt")] + ["/" + "tmp/v", "C:" + "\\"]
    folders = [REPOSITORY / name for name in ("cn_hf", "scripts", "tests", "model_cards")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".md", ".json")
    ]
    files += [REPOSITORY / name for name in ("README.md", "pyproject.toml", ".ci/run") if (REPOSITORY / name).exists()]
    assert len(files) > 30
    found = [(path.name, word) for path in files for word in machine if word in path.read_text()]
    assert found == []
