"""LoRALinear against the equation, on layers small enough to write it out."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tinylora_mtl import LoRALinear


def randomized(layer):
    nn.init.normal_(layer.lora_B.weight)
    return layer


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
@pytest.mark.parametrize("stabilized", [False, True])
def test_forward_is_the_equation(shape, stabilized):
    torch.manual_seed(0)
    layer = randomized(LoRALinear(nn.Linear(5, 6), rank=3, alpha=7, rank_stabilized=stabilized))
    x = torch.randn(shape)
    s = 7 / math.sqrt(3) if stabilized else 7 / 3
    W, b, A, B = layer.base.weight, layer.base.bias, layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer(x), x @ W.T + b + s * (x @ A.T) @ B.T)
    torch.testing.assert_close(layer.delta(), s * B @ A)
    assert layer.scaling == pytest.approx(s)


def test_conv1d_is_a_linear_layer_stored_the_other_way_round():
    base = Conv1D(6, 5)  # GPT-2's: d_out first in the call, weight [d_in, d_out]
    layer = randomized(LoRALinear(base, rank=2, alpha=4))
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), base(x) + 2 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)


def test_start_is_the_base_layer_exactly():
    base = nn.Linear(40, 30)
    layer, x = LoRALinear(base, rank=4, alpha=16, dropout=0.5), torch.randn(9, 40)
    assert torch.equal(layer(x), base(x))
    A = LoRALinear(nn.Linear(400, 30), rank=64, alpha=16).lora_A.weight  # U(-1/√d_in, 1/√d_in)
    assert A.abs().max() <= 1 / math.sqrt(400)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


def test_dropout_is_on_x_in_the_branch_and_in_training_only():
    torch.manual_seed(0)
    layer = randomized(LoRALinear(nn.Linear(200, 6), rank=3, alpha=3, dropout=0.25))
    nn.init.zeros_(layer.base.weight)
    x = torch.ones(500, 200)
    with torch.no_grad():
        layer.lora_A.weight.fill_(1.0)
    z = []
    layer.lora_A.register_forward_hook(lambda module, inputs, output: z.append(inputs[0]))
    layer(x)
    assert 0.24 < (z[0] == 0).float().mean() < 0.26  # entries of x
    assert torch.allclose(z[0][z[0] != 0], torch.tensor(1 / 0.75))
    layer.eval()
    layer(x)
    assert torch.equal(z[1], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_stays_float32_beside_a_half_precision_base(dtype):
    layer = randomized(LoRALinear(nn.Linear(8, 6).to(dtype), rank=2, alpha=4))
    x = torch.randn(3, 8).to(dtype)
    assert layer(x).dtype == dtype
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    branch = 2 * (x.float() @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x) - layer.base(x), branch.to(dtype), atol=0.02, rtol=0.02)


def test_only_the_branch_trains():
    layer = LoRALinear(nn.Linear(5, 6), rank=3, alpha=3)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]


@pytest.mark.parametrize("rank", [0, -1])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoRALinear(nn.Linear(5, 6), rank=rank, alpha=1)


def test_bad_base():
    with pytest.raises(ValueError, match="Embedding"):
        LoRALinear(nn.Embedding(5, 6), rank=1, alpha=1)
