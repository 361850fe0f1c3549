"""norm/domain.py: a batch norm for each context, against torch's own; in models, graphs and recomputed forwards."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cn_hf
from cn_hf.errors import ConfigError, ContextIdError, InputShapeError
from cn_hf.norm import DomainBatchNorm


@pytest.mark.parametrize("feature_dim", [1, -1])
@pytest.mark.parametrize("shape", [(7, 3, 4, 5), (7, 3, 1, 1), (7, 3)])
def test_domain_batch_norm_is_one_batch_norm_for_each_context(shape: tuple[int, ...], feature_dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64).movedim(1, feature_dim).requires_grad_()
    ids = torch.tensor([2, 0, 0, 2, 0, 2, 2])
    norm = DomainBatchNorm(3, 3, feature_dim=feature_dim, dtype=torch.float64)
    singles = [nn.BatchNorm1d(3).double() for _ in range(3)]
    with torch.no_grad():
        for context, single in enumerate(singles):
            for name in ("weight", "bias"):
                getattr(norm, name)[context] = torch.randn(3)
                getattr(single, name).copy_(getattr(norm, name)[context])
    upstream = torch.randn_like(x)

    def expected(training: bool) -> Tensor:
        moved, out = x.movedim(feature_dim, 1), torch.zeros_like(x.movedim(feature_dim, 1))
        for context in (0, 2):
            rows = ids == context
            flat = moved[rows].flatten(2) if moved.ndim > 2 else moved[rows]
            out[rows] = singles[context].train(training)(flat).view(moved[rows].shape)
        return out.movedim(1, feature_dim)

    for training in (True, False):
        out, want = norm.train(training)(x, ids), expected(training)
        torch.testing.assert_close(out, want)
        leaves = [x, norm.weight, norm.bias]
        got = torch.autograd.grad(out, leaves, upstream)
        theirs = torch.autograd.grad(want, [x, *(singles[c].weight for c in (0, 2))], upstream)
        torch.testing.assert_close(got[0], theirs[0])
        torch.testing.assert_close(got[1][[0, 2]], torch.stack(theirs[1:]))
        assert float(got[1][1].abs().max()) == 0
    for context, single in enumerate(singles):
        torch.testing.assert_close(norm.running_mean[context], single.running_mean)
        torch.testing.assert_close(norm.running_var[context], single.running_var)
    assert norm.num_batches_tracked.tolist() == [1, 0, 1]


@pytest.mark.parametrize("training", [True, False])
def test_domain_batch_norm_keeps_the_layout(training: bool) -> None:
    x, ids = torch.randn(5, 3, 4, 6), torch.tensor([0, 1, 1, 0, 1])
    norm = DomainBatchNorm(3, 2).train(training)
    last = x.to(memory_format=torch.channels_last)
    assert norm(x, ids).is_contiguous()
    assert norm(last, ids).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm(last, ids), norm(x, ids))
    of_tokens = DomainBatchNorm(3, 2, feature_dim=-1).train(training)
    for maps in (x, last):
        assert of_tokens(maps.movedim(1, -1), ids).stride() == maps.movedim(1, -1).stride()


def test_domain_batch_norm_in_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    model(torch.randn(8, 3, 8, 8))
    model.eval()
    x, plain = torch.randn(5, 3, 8, 8), copy.deepcopy(model)
    patched = cn_hf.patch_model(model, mode="dsbn", context_names=["day", "night"])
    assert [slot.new_class for slot in cn_hf.patch_report(patched)] == ["ContextBatchNorm2d"]
    ids = torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(patched(x, context_ids=ids), plain(x), atol=1e-6, rtol=1e-5)
    patched.train()(x, context_ids=ids)
    patched.eval()
    copied = copy.deepcopy(patched)
    copied.load_state_dict(patched.state_dict())
    for context in ("day", "night"):
        assert torch.equal(copied(x, context_ids=context), patched(x, context_ids=context))
    assert not torch.allclose(patched(x, context_ids="day"), patched(x, context_ids="night"))
    assert cn_hf.set_inference(copied, "average")(x).shape == (5, 2)
    torch.testing.assert_close(cn_hf.unpatch_model(patched)(x), plain(x))
    patched = cn_hf.patch_model(plain, mode="dsbn", num_contexts=2)
    with pytest.raises(ContextIdError, match="needs the context of each sample, received none"):
        patched(x)
    with pytest.raises(ContextIdError, match="received weights of several"):
        patched(x, context_ids=torch.full((5, 2), 0.5))
    with pytest.raises(ContextIdError, match="Training needs context_ids"):
        patched.train()(x)


def test_domain_batch_norm_of_nothing_and_of_half() -> None:
    norm = DomainBatchNorm(3, 2)
    assert norm.eval()(torch.randn(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 4, 4)
    assert norm.train()(torch.randn(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 4, 4)
    x = torch.randn(6, 3, 4, 4).bfloat16()
    for training in (True, False):
        assert norm.train(training)(x, torch.tensor([0, 1, 0, 1, 1, 0])).dtype == torch.bfloat16
    with pytest.raises(InputShapeError, match=r"more than one vector of a context .* one of \[1\]"):
        norm.train()(torch.randn(3, 3), torch.tensor([0, 0, 1]))
    assert norm.num_batches_tracked.tolist() == [1, 1], "as before"
    with pytest.raises(ConfigError, match="num_contexts must be at least 1"):
        DomainBatchNorm(3, 0)
    with pytest.raises(ConfigError, match="momentum must be a number"):
        DomainBatchNorm(3, 2, momentum=0)


# ------------------------------------------------------------------------------------------ what depends on values only


def small_net(num_contexts: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model(torch.randn(8, 3, 8, 8))
    return cn_hf.patch_model(model.eval(), mode="dsbn", num_contexts=num_contexts)


def saved(norm: nn.Module, x: Tensor, ids: Tensor) -> list[torch.Size]:
    """Shapes of the tensors that a forward saves for backward."""
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        norm(x, ids)
    return shapes


def test_what_is_saved_depends_neither_on_contexts_nor_on_statistics() -> None:
    norm, x = DomainBatchNorm(3, 4).train(), torch.randn(6, 3, 4, 4, requires_grad=True)
    expected = saved(norm, x, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert saved(norm, x, torch.zeros(6, dtype=torch.int64)) == expected
    norm.track_running_stats = False
    assert saved(norm, x, torch.tensor([3, 3, 1, 1, 3, 3])) == expected


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("ids", [[0, 1, 2, 1, 0, 2], [1] * 6, [2, 0, 0, 2, 2, 2]], ids=str)
def test_recomputed_forwards_give_the_same_step(ids: list[int], use_reentrant: bool) -> None:
    plain, recomputed = small_net().train(), small_net().train()
    x = torch.randn(6, 3, 8, 8, requires_grad=True)
    plain(x, context_ids=torch.tensor(ids)).square().sum().backward()
    leaf = x.detach().requires_grad_()
    out = checkpoint(lambda x: recomputed(x, context_ids=torch.tensor(ids)), leaf, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for (name, mine), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, mine), theirs in zip(recomputed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 3)], ids=str)
def test_exported_with_a_dynamic_batch(shape: tuple[int, ...], training: bool) -> None:
    norm = DomainBatchNorm(3, 2, affine=True).train(training)
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = {"x": {0: batch}, "context_ids": {0: batch}, "checked": None}
    ids = torch.tensor([0, 1, 1, 0, 0])
    arguments = {"context_ids": ids, "checked": False}
    graph = torch.export.export(norm, (torch.randn(shape),), arguments, dynamic_shapes=dynamic).module()
    x, ids = torch.randn(9, *shape[1:]), torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0])
    torch.testing.assert_close(graph(x, context_ids=ids, checked=False), norm(x, ids))


def test_onnx_does_not_fix_the_batch(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX needs pip install onnx onnxscript onnxruntime")
    import onnxruntime

    model, batch = small_net().eval(), torch.export.Dim("batch", min=1, max=64)
    path, ids = tmp_path / "model.onnx", torch.tensor([0, 1, 1, 0, 2])
    dynamic = {"input": {0: batch}, "context_ids": {0: batch}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(5, 3, 8, 8),), str(path), kwargs={"context_ids": ids}, dynamic_shapes=dynamic,
            dynamo=True, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path))
    for number in (1, 5, 7):
        x, ids = torch.randn(number, 3, 8, 8), torch.arange(number) % 3
        (out,) = session.run(None, {"input": x.numpy(), "context_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x, context_ids=ids).detach(), atol=1e-5, rtol=1e-5)


def test_compiled_training_is_one_graph() -> None:
    norm, x = DomainBatchNorm(3, 3).train(), torch.randn(6, 3, 4, 4)
    reference = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    for ids in (torch.tensor([0, 1, 2, 1, 0, 2]), torch.tensor([1, 1, 1, 1, 0, 0])):
        torch.testing.assert_close(compiled(x, ids), reference(x, ids))
    assert torch.equal(norm.num_batches_tracked, reference.num_batches_tracked)
    torch.testing.assert_close(norm.running_var, reference.running_var)


def test_moments_far_from_zero_keep_their_digits() -> None:
    """Of single precision: contexts whose means are ten thousand deviations apart."""
    x, ids = torch.randn(40, 3, 4, 4), torch.arange(40) % 2
    x[ids == 1] += 1e4
    out = DomainBatchNorm(3, 2).train()(x, ids)
    for context in range(2):
        mine = x[ids == context].double()
        expected = nn.functional.batch_norm(mine, None, None, training=True)
        assert (out[ids == context] - expected).abs().max() < (1e-5 if context == 0 else 5e-3)
