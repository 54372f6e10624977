r"""LoRA: a frozen linear layer and a trainable low-rank branch beside it.

    y = W x + b + s · B A drop(x)            s = alpha / r

Source: Hu et al., "LoRA", arXiv 2106.09685, equation 3 and section 4.1; the rank-stabilised s = alpha / sqrt(r) is
Kalajdzievski, arXiv 2312.03732.

Shapes, here and in every module: x [..., d_in], W [d_out, d_in], A [r, d_in], B [d_out, r], y [..., d_out].
`nn.Linear` stores its weight as [d_out, d_in] and computes x Wᵀ, so `lora_A.weight` is A and `lora_B.weight` is B.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn


class LoRALinear(nn.Module):
    """y = W x + b + s · B A drop(x), with W [d_out, d_in] and b frozen; x [..., d_in] -> y [..., d_out].

    Args:
        base: the layer to adapt, an `nn.Linear` (or GPT-2's `Conv1D`); it is frozen here and never changed.
        rank: r, the width of the low-rank branch, at least 1.
        alpha: numerator of the scaling s.
        dropout: probability with which an entry of x is dropped, in the branch only and only in training.
        rank_stabilized: s = alpha / sqrt(r) instead of alpha / r.

    Attributes: `lora_A` (nn.Linear d_in -> r), `lora_B` (nn.Linear r -> d_out), both without bias and in float32
    whatever the base's type (`branch_precision` says what they compute in), and `scaling` (s).

    Raises ValueError for a rank below 1 or a base that is not a linear layer. Source: arXiv 2106.09685, equation 3.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rank_stabilized=False):
        super().__init__()
        d_in, d_out = linear_shape(base)
        self.scaling = lora_scaling(alpha, rank, rank_stabilized)
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(d_in, rank, **options)  # starts as Kaiming-uniform(a = sqrt 5): U(-1/√d_in, 1/√d_in)
        self.lora_B = nn.Linear(rank, d_out, **options)
        nn.init.zeros_(self.lora_B.weight)  # so that the adapted layer starts as the base layer, exactly
        self.dropout = nn.Dropout(dropout)
        self.base = base.requires_grad_(False)

    weight = property(lambda self: self.base.weight.to("meta"))  # for code that asks for its type; no numbers in it

    def forward(self, x):
        """[ex1] y = W x + b + s · B A drop(x), in the type that the base layer returns.

        x [..., d_in] -> y [..., d_out]. The base layer sees x as it is; the branch is computed within
        `branch_precision(x)`, and dropout acts on its input only. `self.lora_A` is called as a layer, so that its
        output can be collected.
        """
        y = self.base(x)  # [..., d_out]
        with branch_precision(x) as x:  # float32, or bfloat16 beside a bfloat16 layer
            z = self.lora_A(self.dropout(x))  # [..., r]
            return y + self.lora_B(self.scaling * z).to(y.dtype)  # s times r values of z, not times d_out of y

    def delta(self):
        """[ex2] ΔW = s · B A, float32 [d_out, d_in]: what merging adds to W."""
        return self.scaling * self.lora_B.weight @ self.lora_A.weight


@contextmanager
def branch_precision(x):
    """What the branch computes in: within the block, matrix products of the yielded x [..., d_in] are in that type.

    bfloat16 for a bfloat16 x: a float32 copy of it would cost more time and memory than the branch itself. The weights,
    their gradients and the optimiser stay float32, where small steps add up. float32 for every other x: in float16 the
    branch's gradients could be too small to be told from zero, as there is no loss scaling.
    """
    if x.dtype == torch.bfloat16:
        with torch.autocast(x.device.type, torch.bfloat16):
            yield x
    else:
        yield x.float()


def lora_scaling(alpha, rank, rank_stabilized):
    """The factor s of the branch: alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732).

    Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def is_linear(module):
    """Whether a module can take an adapter: an nn.Linear, or GPT-2's Conv1D, whose weight is [d_in, d_out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(base):
    """(d_in, d_out) of a layer that `is_linear`; ValueError for any other."""
    if not is_linear(base):
        raise ValueError(f"only linear layers can be adapted, got {type(base).__name__}")
    rows, columns = base.weight.shape
    return (columns, rows) if isinstance(base, nn.Linear) else (rows, columns)
