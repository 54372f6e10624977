"""The MMD form against written-out sums, and its fast kernel."""

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters

from tinylora_mtl import AdapterConfig, add_adapters, mmd, mmd_alignment
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.mmd import MMD_BANDWIDTHS, MMD_TOKENS, GaussianKernels, subset
from tinylora_mtl.train import align_gradients


def groups_of(sizes, r=4, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, r, generator=generator, dtype=torch.float64) * (1 + t) ** 0.5 + shift * t
            for t, n in enumerate(sizes)]


def mmd_by_sums(groups):
    """The unbiased estimator with every kernel value written out."""
    bandwidths = [10.0 ** power for power in range(-6, 7) if power != 1] + [5, 10, 15, 20, 25, 30, 35]  # the authors'

    def k(a, b):
        return sum(torch.exp(-((a - b) ** 2).sum() / (2 * sigma)) for sigma in bandwidths)

    def within(g):
        return sum(k(g[a], g[b]) for a in range(len(g)) for b in range(len(g)) if a != b) / (len(g) * (len(g) - 1))

    def between(g, h):
        return sum(k(a, b) for a in g for b in h) / (len(g) * len(h))
    pairs = [within(g) + within(h) - 2 * between(g, h) for i, g in enumerate(groups) for h in groups[:i]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("sizes", [(5, 9), (3, 8, 4)])
@pytest.mark.parametrize("shift,scale", [(0.0, 1.0), (1.0, 1.0), (1.0, 1e-2)])
def test_mmd_equals_the_sums(sizes, shift, scale):
    groups = [scale * group for group in groups_of(sizes, shift=shift)]
    torch.testing.assert_close(mmd_alignment(groups).double(), mmd_by_sums(groups), atol=1e-5, rtol=1e-4)


def test_mmd_gradient_equals_that_of_the_sums():
    ours, theirs = ([(0.1 * g.float()).requires_grad_() for g in groups_of((5, 9, 4))] for _ in range(2))
    torch.testing.assert_close(torch.autograd.grad(mmd_alignment(ours), ours),
                               torch.autograd.grad(mmd_by_sums(theirs), theirs), atol=1e-5, rtol=1e-4)


def test_kernels_and_their_derivative_are_those_of_the_sum_written_out():
    """From points that coincide to points whose narrow kernels are far below the smallest float."""
    d = torch.tensor([0.0, 1e-7, 1e-4, 0.3, 7.0, 400.0, 1e8], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 1.5, 2.0])
    values = []
    for kernels in (GaussianKernels.apply(d), sum(torch.exp(-d / (2 * s)) for s in MMD_BANDWIDTHS)):
        values.append((kernels, torch.autograd.grad(kernels, d, upstream)[0]))
    torch.testing.assert_close(*values, atol=1e-30, rtol=1e-5)


def test_no_kernel_is_smaller_than_float32_computes_fast(monkeypatch):
    """Subnormal numbers are many times slower; e^-87 is still a normal one."""
    smallest = torch.finfo(torch.float32).tiny
    seen = []
    monkeypatch.setattr(mmd, "MMD_BANDWIDTHS", (1e-6,))
    for d in (1e-6, 1e-4, 1.0, 1e6):
        seen.append(GaussianKernels.apply(torch.tensor([d])).item())
    assert min(seen) >= smallest and seen[-1] < 1e-37


def test_mmd_without_pdist_is_the_same(monkeypatch):
    """Apple's GPUs have none; there the pairs are written out. These tensors only say that they are there."""
    groups = groups_of((5, 9, 4))
    expected = mmd_alignment(groups)

    class OnMPS(torch.Tensor):
        device = torch.device("mps")
    monkeypatch.setattr(torch, "pdist", None)
    with pytest.raises(TypeError):
        mmd_alignment(groups)
    monkeypatch.setattr(torch, "cat", lambda groups, cat=torch.cat: cat(groups).as_subclass(OnMPS))
    for name in ("triu_indices", "arange"):
        monkeypatch.setattr(torch, name, lambda *args, device=None, original=getattr(torch, name): original(*args))
    monkeypatch.setattr(mmd, "to_device", lambda tensor, device: tensor)
    torch.testing.assert_close(mmd_alignment(groups).as_subclass(torch.Tensor), expected)


def test_mmd_gradient_is_finite_where_points_coincide():
    group = torch.ones(4, 3, requires_grad=True)
    gradient, = torch.autograd.grad(mmd_alignment([group, torch.randn(5, 3)]), group)
    assert gradient.isfinite().all() and gradient.any()


def test_a_subset_is_whole_rows_of_the_group_each_once():
    for n in (2, MMD_TOKENS, MMD_TOKENS + 1, 500):
        group = torch.arange(n)[:, None, None].expand(n, 2, 3)
        rows = subset(group)
        assert len(rows) == min(n, MMD_TOKENS) and (rows == rows[:, :1, :1]).all()
        assert len(rows[:, 0, 0].unique()) == len(rows)
    assert subset(torch.arange(500)).max() > MMD_TOKENS  # not the first ones


def test_mmd_takes_other_tokens_in_every_step(monkeypatch):
    taken = []

    def watch(*arguments, original=torch.randperm, **options):
        taken.append(original(*arguments, **options))
        return taken[-1]
    monkeypatch.setattr(torch, "randperm", watch)
    model, batch = make_llama(), make_batch(each=12)
    add_adapters(model, AdapterConfig(rank=3))
    randomize_adapters(model)
    torch.manual_seed(0)
    for _ in range(2):
        align_gradients(model.train(), batch, TrainConfig(method="align", align="mmd", align_weight=0.5))
    first, second = taken[:len(taken) // 2], taken[len(taken) // 2:]
    assert len(first) == 3 and not any(torch.equal(a, b) for a, b in zip(first, second))
