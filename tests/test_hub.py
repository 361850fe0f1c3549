"""Publishing and loading over the Hub's protocol, by the unmodified client: push in one process, load in another."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hub_server import READER, HubServer, run_python

MODELS = """
    import json, os, warnings
    import timm, torch
    import cn_hf
    from transformers import ViTConfig, ViTForImageClassification

    warnings.simplefilter("ignore")
    torch.manual_seed(0)

    def moved(model):
        with torch.no_grad():
            for parameter in cn_hf.context_parameters(model):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.eval()

    def native():
        config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                           image_size=32, patch_size=8, num_labels=5)
        return ViTForImageClassification(config)

    def logits(model, size, context):
        x = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
        with torch.no_grad():
            y = model(x, context_ids=context)
        return (y if isinstance(y, torch.Tensor) else y.logits).double().flatten().tolist()
"""

PUSH = (
    MODELS
    + """
    names = ["day", "night"]
    out = {}

    base = timm.create_model("test_vit", num_classes=5)
    timm.models.push_to_hf_hub(base, "tester/base")
    model = moved(cn_hf.patch_model(base, context_names=names))
    commit = cn_hf.push_to_hub(model, "tester/timm", private=True)
    cn_hf.push_to_hub(model, "tester/norms", norms_only=True, base_id="tester/base")
    out["timm"] = [logits(model, 160, name) for name in names]
    out["commit"] = commit.oid
    moved(model)
    cn_hf.push_to_hub(model, "tester/timm", revision="later")
    out["later"] = logits(model, 160, "night")

    model = moved(cn_hf.patch_model(native(), context_names=names))
    cn_hf.push_to_hub(model, "tester/native", max_shard_size="20KB")
    out["native"] = [logits(model, 32, name) for name in names]

    model = moved(cn_hf.patch_model(timm.create_model("test_resnet", num_classes=3), mode="cn-channels"))
    cn_hf.save_pretrained(model, "here/inner/deep", max_shard_size="300KB")
    from huggingface_hub import HfApi
    HfApi().create_repo("tester/nested")
    HfApi().upload_folder(repo_id="tester/nested", folder_path="here")
    out["nested"] = logits(model, 64, 1)
    print(json.dumps(out))
"""
)

LOAD = (
    MODELS
    + """
    import sys
    commit = sys.argv[1]
    names = ["day", "night"]
    load = cn_hf.from_pretrained
    out = {"timm": [logits(load("tester/timm"), 160, name) for name in names]}
    out["commit"] = logits(load("tester/timm", revision=commit), 160, "night")
    out["later"] = logits(load("tester/timm", revision="later"), 160, "night")
    out["cached"] = logits(load("tester/timm", local_files_only=True), 160, "night")
    out["elsewhere"] = logits(load("tester/timm", cache_dir="my-cache", token=os.environ["HF_TOKEN"]), 160, "night")
    out["native"] = [logits(load("tester/native", device_map="cpu"), 32, name) for name in names]
    out["nested"] = logits(load("tester/nested", subfolder="inner/deep", device_map={"": "cpu"}), 64, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out["norms"] = [logits(load("tester/norms"), 160, name) for name in names]
        out["base differs"] = [str(w.message) for w in caught if "context norms" in str(w.message)]
        tuned = timm.create_model("hf-hub:tester/base", pretrained=True)
        with torch.no_grad():
            tuned.head.bias += 1
        out["tuned"] = logits(load("tester/norms", model=tuned), 160, "day")
        out["tuned differs"] = [str(w.message) for w in caught if "context norms" in str(w.message)]
    half = load("tester/timm", dtype="bfloat16", device="cpu")
    out["dtypes"] = sorted({str(p.dtype) for p in half.parameters()})
    out["added"] = sorted({str(p.dtype) for p in cn_hf.context_parameters(half)})
    print(json.dumps(out))
"""
)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict:
    return run_python(PUSH, hub, tmp_path_factory.mktemp("pusher")).result


@pytest.mark.slow
def test_what_one_process_pushes_another_loads_bit_equal(hub, pushed, tmp_path):
    hub.requests.clear()
    loaded = run_python(LOAD, hub, tmp_path / "loader", pushed["commit"]).result
    for name in ("timm", "native", "nested", "later"):
        assert loaded[name] == pushed[name], name
    assert loaded["norms"] == pushed["timm"]
    assert loaded["commit"] == loaded["cached"] == loaded["elsewhere"] == pushed["timm"][1]
    assert pushed["timm"][0] != pushed["timm"][1] != pushed["later"]

    assert loaded["base differs"] == []
    assert len(loaded["tuned differs"]) == 1
    assert "tester/base" in loaded["tuned differs"][0]
    assert loaded["tuned"] == pytest.approx([value + 1 for value in pushed["timm"][0]], abs=1e-5)

    assert loaded["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert loaded["added"] == ["torch.float32"]
    assert (tmp_path / "loader" / "my-cache").is_dir()


@pytest.mark.slow
def test_what_is_published(hub, pushed):
    files = hub.files("tester/timm")
    assert {"README.md", "config.json", "context_norm.json", "model.safetensors"} <= set(files)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    card = files["README.md"].decode()
    assert 'cn_hf.from_pretrained("tester/timm")' in card
    assert "`day`, `night`" in card
    norms = hub.files("tester/norms")
    assert "model.safetensors" not in norms
    assert len(norms["context_norm.safetensors"]) < 100_000
    described = json.loads(norms["context_norm.json"])
    assert described["base"]["id"] == "tester/base"
    shards = [name for name in hub.files("tester/native") if name.startswith("model-")]
    assert len(shards) > 1
    assert set(json.loads(hub.files("tester/native")["context_norm.json"])["weights"]) == set(shards)


AGAIN = (
    MODELS
    + """
    model = moved(cn_hf.patch_model(native(), context_names=["a", "b"]))
    cn_hf.push_to_hub(model, "tester/again", max_shard_size="20KB")
    from huggingface_hub import HfApi
    HfApi().upload_file(repo_id="tester/again", path_in_repo="README.md", path_or_fileobj=b"# mine")
    HfApi().upload_file(repo_id="tester/again", path_in_repo="onnx/model.safetensors", path_or_fileobj=b"other")
    cn_hf.push_to_hub(model, "tester/again")
    print("{}")
"""
)


@pytest.mark.slow
def test_pushing_again_replaces_the_checkpoint_and_nothing_else(hub, tmp_path):
    run_python(AGAIN, hub, tmp_path / "again")
    files = hub.files("tester/again")
    assert files["README.md"] == b"# mine"
    assert files["onnx/model.safetensors"] == b"other"
    assert "model.safetensors" in files
    assert not [name for name in files if name.startswith("model-") or name.endswith("index.json")]


ERRORS = (
    MODELS
    + """
    import sys
    from cn_hf.errors import CnHfError

    def said(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except CnHfError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    load = cn_hf.from_pretrained
    out = {name: said(load, f"tester/{name}") for name in sys.argv[1].split(",")}
    out["missing"] = said(load, "tester/nowhere")
    out["revision"] = said(load, "tester/good", revision="v9")
    out["subfolder"] = said(load, "tester/good", subfolder="deep")
    out["outside"] = said(load, "tester/good", subfolder="../other")
    out["id"] = said(load, "not/an/id")
    out["token"] = said(load, "tester/good", token="hf_wrong", force_download=True)
    out["not cached"] = said(load, "tester/private", local_files_only=True)
    model = cn_hf.patch_model(native())
    out["read only"] = said(cn_hf.push_to_hub, model, "tester/new", token=sys.argv[2])
    out["other model"] = said(load, "tester/good", model=native())
    out["plain again"] = type(load("tester/good")).__name__
    print(json.dumps(out))
"""
)


def broken(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """A checkpoint's files with fields of its description changed."""
    described = json.loads(files["context_norm.json"])
    described.update(changes)
    return {**files, "context_norm.json": json.dumps(described).encode()}


@pytest.mark.slow
def test_each_failure_is_one_clear_error_and_the_cache_stays_usable(hub, pushed, tmp_path):
    good = {name: content for name, content in hub.files("tester/timm").items() if not name.startswith(".")}
    weights = good["model.safetensors"]
    described = json.loads(good["context_norm.json"])
    cases = {
        "good": good,
        "private": good,
        "plain": {"config.json": b"{}", "model.safetensors": weights},
        "pickle": {"context_norm.json": good["context_norm.json"], "pytorch_model.bin": b"pickle"},
        "newer": broken(good, format=99),
        "flipped": {**good, "model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])},
        "short": {**good, "model.safetensors": weights[: len(weights) // 2]},
        "leads-out": broken(good, weights={"../../model.safetensors": "0" * 64}),
        "index": broken(
            {
                "context_norm.json": good["context_norm.json"],
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../model.safetensors"}}).encode(),
            },
            weights={"model-00001-of-00001.safetensors": "0" * 64},
        ),
        "architecture": broken(good, base={**described["base"], "architecture": "vit_of_tomorrow"}),
        "contexts": broken(good, config={**described["config"], "num_contexts": 5, "context_names": None}),
        "nonsense": broken(good, config={"mode": "cn-pixels"}),
        "no-json": {**good, "context_norm.json": b"{"},
    }
    for name, files in cases.items():
        hub.push(f"tester/{name}", files)
    listed = ",".join(name for name in cases if name != "private")
    found = run_python(ERRORS, hub, tmp_path / "errors", listed, READER).result
    expected = {
        "plain": "no context_norm.json",
        "pickle": "pickle",
        "newer": "update cn_hf",
        "flipped": "truncated, changed",
        "short": "truncated, changed",
        "leads-out": "no safetensors file of",
        "index": "weights are missing",
        "architecture": "vit_of_tomorrow",
        "contexts": "do not fit",
        "nonsense": "cn-pixels",
        "no-json": "truncated or no JSON",
        "missing": "no such repository",
        "revision": "no revision 'v9'",
        "subfolder": "folder 'deep' of it",
        "outside": "must lie inside",
        "id": "no id of a repository",
        "token": "hf_wrong",
        "not cached": "may not be asked",
        "read only": "write access",
        "other model": "architecture",
    }
    for name, words in expected.items():
        if name != "token":
            assert words in found[name], (name, found[name])
        assert found[name].startswith(("CheckpointError", "ConfigError")), (name, found[name])
        assert "\n" not in found[name], name
    assert "hf_wrong" not in found["token"]  # secrets stay out of messages
    assert "token" in found["token"]
    assert found["good"] == "no error"
    assert found["plain again"] == "VisionTransformer"


OFFLINE = (
    MODELS
    + """
    try:
        cn_hf.from_pretrained("tester/good")
        print(json.dumps("loaded"))
    except cn_hf.CnHfError as error:
        print(json.dumps(str(error)))
"""
)


@pytest.mark.slow
def test_interrupted_downloads(hub, pushed, tmp_path):
    good = {name: content for name, content in hub.files("tester/timm").items() if not name.startswith(".")}
    hub.push("tester/good", good)
    home = tmp_path / "home"
    assert "may not be asked" in run_python(OFFLINE, hub, home, HF_HUB_OFFLINE="1").result
    hub.fail_next("truncate", path="*model.safetensors")
    first = run_python(OFFLINE, hub, home).result
    assert "run it again" in first or first == "loaded"
    hub.faults.clear()
    hub.fail_next("drop", path="*model.safetensors")
    hub.fail_next(500, path="*context_norm.json", method="HEAD")
    assert run_python(OFFLINE, hub, home).result == "loaded"
    hub.faults.clear()
    assert run_python(OFFLINE, hub, home, HF_HUB_OFFLINE="1").result == "loaded"
