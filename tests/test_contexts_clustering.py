"""Clusters of vectors against scikit-learn, in chunks, from any start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from cn_hf.contexts.clustering import (
    Clustering,
    assign,
    fit_gaussians,
    fit_k_means,
    principal_components,
    project,
)
from cn_hf.norm.em import fit_mixture, seed_mixture

OPTIONS = {"seed": 0, "n_init": 4, "max_iterations": 300}


def blobs(count=3000, features=7, components=3, seed=0, apart=4.0):
    """Vectors float32, and the Gaussian that each is from."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(0, apart, (components, features))
    scales = generator.uniform(0.3, 2, (components, features))
    kinds = generator.integers(0, components, count)
    return torch.from_numpy(centers[kinds] + generator.normal(size=(count, features)) * scales[kinds]).float(), kinds


@pytest.mark.parametrize("count", [300, 1500, 20_000])  # starts on all vectors, on a part, and a stage between
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mixture_is_as_likely_as_the_best_of_scikit_learn(count, seed):
    x, kinds = blobs(count, seed=seed)
    found = fit_gaussians(x, 3, **OPTIONS | {"seed": seed}, tol=1e-5, reg_covar=1e-6)
    reference = GaussianMixture(3, covariance_type="diag", n_init=5, random_state=0, tol=1e-6, max_iter=500).fit(x)
    assert found.objective == pytest.approx(reference.score(x), abs=1e-3)
    ids = assign(x, found)
    assert adjusted_rand_score(reference.predict(x.numpy()), ids) > 0.99
    assert adjusted_rand_score(kinds, ids) > 0.97


def test_em_in_chunks_is_em_of_all_vectors_at_once():
    x, _ = blobs(1000)
    start = seed_mixture(x, 3, seed=1, reg_covar=1e-3)
    whole = fit_mixture(x, *start[:3], num_iterations=20, tol=None)
    for rows in (1, 7, 999, 1000, 5000):
        chunked = fit_mixture(x, *start[:3], num_iterations=20, tol=None, chunk_rows=rows)
        torch.testing.assert_close(chunked.mean, whole.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(chunked.log_likelihood, whole.log_likelihood, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing_and_are_put_back(monkeypatch, threads):
    x, _ = blobs(1000)
    expected = fit_gaussians(x, 3, **OPTIONS, tol=1e-3, reg_covar=1e-3)
    monkeypatch.setattr("cn_hf.contexts.clustering._CHUNK_ELEMENTS", 7 * 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = fit_gaussians(x, 3, **OPTIONS, tol=1e-3, reg_covar=1e-3)
        assert torch.equal(assign(x, found), assign(x, expected))
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
        assert torch.equal(assign(x[:0], found), torch.empty(0, dtype=torch.int64))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_start_with_an_empty_component_is_taken_only_where_all_have_one():
    x = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 30])
    found = fit_gaussians(x, 4, seed=0, n_init=8, max_iterations=100, tol=1e-4, reg_covar=1e-3)
    assert assign(x, found).bincount(minlength=4).min() > 0


@pytest.mark.parametrize("components", [1, 4])
def test_k_means_is_that_of_scikit_learn(components):
    x, _ = blobs(components=4)
    before = x.clone()
    found = fit_k_means(x, components, **OPTIONS, tol=1e-8)
    reference = KMeans(components, n_init=4, random_state=0, tol=1e-8).fit(before.numpy())
    assert found.objective * len(x) == pytest.approx(reference.inertia_, rel=1e-4)
    assert adjusted_rand_score(assign(before, found), reference.labels_) > 0.999


@pytest.mark.parametrize(("count", "features"), [(300, 40), (30, 200)])
def test_principal_components_span_those_of_scikit_learn(count, features):
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal(size=(count, features)) * np.geomspace(10, 0.1, features) + 5).float()
    reference = PCA(5, svd_solver="full").fit(x)
    state = torch.get_rng_state()
    mean, components = principal_components(x.clone(), 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(mean, x.mean(dim=0), rtol=1e-5)
    torch.testing.assert_close(components @ components.T, torch.eye(5), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.abs(np.diag(components.numpy() @ reference.components_.T)), 1, atol=1e-3)
    variance = project(x, mean, components).var(dim=0)
    np.testing.assert_allclose(variance, reference.explained_variance_, rtol=1e-3)


def test_assign_works_on_any_float_dtype():
    clustering = Clustering(mean=torch.tensor([[0.0], [1.0]]), var=None, prior=None, objective=0.0, num_iterations=1)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert assign(torch.tensor([[0.2], [0.9]], dtype=dtype), clustering).tolist() == [0, 1]
    assert assign(torch.tensor([[51], [229]], dtype=torch.uint8), clustering).tolist() == [0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_on_a_gpu_finds_the_clusters_of_the_cpu():
    x, _ = blobs(5000)
    expected = fit_gaussians(x, 3, **OPTIONS, tol=1e-4, reg_covar=1e-3)
    found = fit_gaussians(x.cuda(), 3, **OPTIONS, tol=1e-4, reg_covar=1e-3)
    assert found.objective == pytest.approx(expected.objective, abs=1e-3)
    assert adjusted_rand_score(assign(x, found), assign(x, expected, device=torch.device("cuda"))) > 0.99
