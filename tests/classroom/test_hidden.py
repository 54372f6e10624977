"""The exercises once more, for the teacher: other shapes and numbers than the student's, against plain loops.

SEED draws them; a class that should have numbers of its own has another one.
"""

import math

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from test_exercises import at_adapted, close, expect, outer_gradient
from torch import nn
from torch.distributions import Normal, kl_divergence

from tinylora_mtl import AdapterConfig, LoRALinear, adapter_parameters, add_adapters, align, meta, multihead, train
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.loss import label_loss

SEED = 20


@pytest.fixture(params=range(3))
def size(request):
    """A function: a whole number between two bounds, other ones in each of three rounds."""
    torch.manual_seed(SEED + request.param)
    return lambda low, high: int(torch.randint(low, high + 1, ()))


def some_lora(size):
    """(adapter with random A and B, s) of a random shape; two of three are rank-stabilised or have no bias."""
    rank, alpha, stabilized = size(1, 7), float(size(2, 40)), bool(size(0, 1))
    adapter = LoRALinear(nn.Linear(size(8, 30), size(8, 30), bias=bool(size(0, 1))), rank, alpha,
                         rank_stabilized=stabilized).eval()
    nn.init.normal_(adapter.lora_B.weight)
    return adapter, alpha / (math.sqrt(rank) if stabilized else rank)


@pytest.mark.ex1
def test_ex1_on_other_shapes(size):
    adapter, s = some_lora(size)
    x = torch.randn(size(1, 3), size(1, 5), adapter.base.in_features)
    y = x @ adapter.base.weight.T + s * x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    y = y if adapter.base.bias is None else y + adapter.base.bias
    close(adapter(x), y, "y = W x + b + s · B A x, with s = self.scaling, for [batch, length, d_in]", rtol=1e-3, atol=1e-3)


@pytest.mark.ex2
def test_ex2_on_other_shapes(size):
    adapter, s = some_lora(size)
    B, A = adapter.lora_B.weight, adapter.lora_A.weight
    delta = [[s * sum(B[i, k] * A[k, j] for k in range(len(A))).item() for j in range(A.shape[1])] for i in range(len(B))]
    close(adapter.delta(), delta, "ΔW = s · B A", rtol=1e-3, atol=1e-3)


@pytest.mark.ex3
@pytest.mark.parametrize("weighted", [True, False])
def test_ex3_on_other_shapes(size, weighted):
    tokens, count, rank, d_out = size(1, 6), size(1, 7), size(1, 5), size(2, 9)
    z, heads = torch.randn(2, tokens, count, rank), torch.randn(count, d_out, rank)
    weights = torch.randn(2, tokens, count) if weighted else torch.ones(2, tokens, count)
    expected = sum(weights[..., i, None] * (z[..., i, :] @ heads[i].T) for i in range(count))
    close(multihead.combine_heads(z, weights if weighted else None, heads), expected, "Σ_i w_i B_i z_i", rtol=1e-3, atol=1e-4)


@pytest.mark.ex4
def test_ex4_on_other_shapes(size):
    rank, d_in, d_out, count, gamma = size(5, 9), size(1500, 2500), size(1500, 2500), size(2, 6), 4 ** size(2, 4)
    A, heads = torch.zeros(rank, d_in), torch.zeros(count, d_out, rank)
    multihead.random_start(A, heads, gamma=gamma)
    scale = d_out ** 0.25 / math.sqrt(gamma)
    assert A.std().item() == pytest.approx(scale / math.sqrt(d_in), rel=0.04)
    expected = scale / math.sqrt(d_out) * math.sqrt(1 - 1 / count)
    assert heads.std(dim=(1, 2)).tolist() == pytest.approx([expected] * count, rel=0.04)
    assert heads.sum(0).abs().max() < 1e-5


@pytest.mark.ex5
def test_ex5_on_other_shapes(size):
    rows, length = size(2, 6), size(2, 8)
    mask, ids = torch.randint(0, 2, (rows, length)), torch.randint(0, 4, (rows,))
    real = [(i * length + j, int(ids[i])) for i in range(rows) for j in range(length) if mask[i, j]]
    places, owner = align.tokens_and_owners(mask, ids)
    close(places, [place for place, _ in real], "the places of the real tokens")
    close(owner, [task for _, task in real], "the tasks of the real tokens")


@pytest.mark.ex6
def test_ex6_on_other_shapes(size):
    count, width, shift = size(2, 9), size(1, 12), float(size(0, 4000))
    mean, variance = torch.randn(count, width), 0.3 + torch.rand(count, width)
    one = [Normal(mean[i].double(), variance[i].double().sqrt()) for i in range(count)]
    expected = sum(kl_divergence(one[i], one[j]).sum() for i in range(count) for j in range(count)) / 2
    close(align.kl_all_pairs(mean + shift, variance), expected, "Σ_{i<j} D_ij, whatever all means have in common", rtol=1e-2)


@pytest.mark.ex7
def test_ex7_on_other_shapes(size):
    parameters = [nn.Parameter(torch.randn(size(1, 4), size(1, 4))) for _ in range(size(2, 4))]
    gradients, rate = [torch.randn_like(parameter) for parameter in parameters], size(1, 9) / 10
    expected = [(parameter - rate * gradient).detach() for parameter, gradient in zip(parameters, gradients)]
    meta.inner_step(parameters, gradients, rate)
    for parameter, value in zip(parameters, expected):
        close(parameter, value, "θ - α · gradient, in place")


@pytest.mark.ex8
def test_ex8_on_other_rounds(size):
    model, count, inner_steps, rate = make_llama(seed=size(0, 99)), size(2, 4), size(1, 3), size(2, 8) / 10
    add_adapters(model, AdapterConfig("lora", rank=size(1, 3), alpha=4))
    randomize_adapters(model, seed=size(0, 99))
    seeds = [size(0, 999) for _ in range(2 * count)]
    episodes = [(make_batch(seed=seeds[2 * i], tasks=(i,)), make_batch(seed=seeds[2 * i + 1], tasks=(i,)))
                for i in range(count)]
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    alone = [at_adapted(model, *episode, rate, inner_steps) for episode in episodes]
    losses = []
    expect(outer_gradient(model, episodes, rate, inner_steps, losses),
           {name: sum(gradients[name] for gradients in alone) / count for name in before}, "the mean of ∇ L(Q_i; θ_i)")
    assert [len(row) for row in losses] == [inner_steps + 1] * count
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapter_parameters(model).items())


@pytest.mark.ex9
@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_ex9_on_other_batches(size, kind):
    model, batch, weight = make_llama(seed=size(0, 99)), make_batch(seed=size(0, 99), tasks=(2, 0, 5)), size(1, 30) / 10
    add_adapters(model, AdapterConfig("lora", rank=2, alpha=4))
    randomize_adapters(model)
    with align.collect_features(model) as features:
        loss = label_loss(model, batch)
    term = align.alignment_loss(features, batch, kind)
    parameters = adapter_parameters(model)
    expected = torch.autograd.grad(loss + weight * term, list(parameters.values()))
    returned = train.align_gradients(model, batch, TrainConfig(align=kind, align_weight=weight))
    for (name, parameter), gradient in zip(parameters.items(), expected):
        close(parameter.grad, gradient, f"{name}: the gradient of L_task + λ · L_align", rtol=1e-3, atol=1e-6)
    close(returned["alignment"], term, "L_align")
