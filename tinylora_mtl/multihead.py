r"""Several heads on one A: HydraLoRA, R-LoRA and M-LoRA.

Changes from LoRA: A is shared by N heads B_1 … B_N, and a router, if there is one, weighs the heads for every token.

    y = W x + b + s · Σ_i w_i(x) · B_i z_i           w = softmax(W_r x), of x without dropout; M-LoRA: w = 1
    z_i = A drop_i(x) (HydraLoRA) or drop_i(A x) (R-LoRA, M-LoRA); without dropout all are z = A x

| method    | weights w | dropout                                    | start of A and B_i          | s           |
|-----------|-----------|--------------------------------------------|-----------------------------|-------------|
| HydraLoRA | softmax   | on x before A, a fresh mask for every head | A Kaiming-uniform, B_i zero | alpha / r   |
| R-LoRA    | softmax   | on z, a fresh mask for every head          | random, see `random_start`  | alpha / √r  |
| M-LoRA    | all 1     | as R-LoRA                                  | as R-LoRA                   | alpha / √r  |

Sources: HydraLoRA arXiv 2404.19245; R-LoRA arXiv 2502.15455, table 1 and figure 4; M-LoRA is the simplified
multi-head adapter of "Align, Don't Divide", arXiv 2508.05078, summed as in its section 3.1 (its 3.3 averages). Shapes
as in `lora.py`, and heads [N, d_out, r], W_r [N, d_in], w [..., N].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .lora import branch_precision, linear_shape, lora_scaling


class MultiHeadLoRALinear(nn.Module):
    """y = W x + b + s · Σ_i w_i(x) · B_i z_i, with W [d_out, d_in] and b frozen; x [..., d_in] -> y [..., d_out].

    Args:
        base: the layer to adapt, an `nn.Linear` (or GPT-2's `Conv1D`); it is frozen here and never changed.
        rank, alpha, rank_stabilized: as in `LoRALinear`.
        heads: N, at least 1.
        dropout: on x before A, with a mask of its own for every head (HydraLoRA).
        head_dropout: multi-head dropout, on the r values of z, with a mask of its own for every head (R-LoRA).
        random_init: start as R-LoRA does (`random_start`), with a uniform router, instead of from B_i = 0.
        routed: weigh the heads by a router (True) or add them up (False, M-LoRA).

    Attributes: `lora_A` (nn.Linear d_in -> r), `heads` (Parameter [N, d_out, r]), `router` (nn.Linear d_in -> N, or
    None), all without bias and in float32 whatever the base's type, and `scaling` (s).

    The layer equals its base at step 0 (with random_init: in evaluation mode and to rounding, for centred heads cancel
    only under equal masks). Raises ValueError for a rank or a number of heads below 1, for a base that is not a linear
    layer, and for random_init with a single head: centred, it would be zero for ever.
    Sources: arXiv 2404.19245 (HydraLoRA), 2502.15455 (R-LoRA, table 1 and figure 4), 2508.05078 (M-LoRA).
    """

    def __init__(self, base, rank, alpha, heads, dropout=0.0, head_dropout=0.0, random_init=False, routed=True,
                 rank_stabilized=False):
        super().__init__()
        if heads < 1 or (random_init and heads < 2):
            raise ValueError(f"heads must be at least {2 if random_init else 1}, got {heads}")
        d_in, d_out = linear_shape(base)
        self.scaling = lora_scaling(alpha, rank, rank_stabilized)
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        float32 = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(d_in, rank, bias=False, **float32)  # Kaiming-uniform(a = sqrt 5)
        self.heads = nn.Parameter(torch.zeros(heads, d_out, rank, **float32))
        self.router = nn.Linear(d_in, heads, bias=False, **float32) if routed else None
        self.dropout, self.head_dropout = nn.Dropout(dropout), nn.Dropout(head_dropout)
        if random_init:
            random_start(self.lora_A.weight, self.heads)
            if routed:
                nn.init.zeros_(self.router.weight)  # w = 1/N at first; any other router would let Σ w_i B_i drift off 0
        self.base = base.requires_grad_(False)

    weight = property(lambda self: self.base.weight.to("meta"))  # as in `LoRALinear`

    def forward(self, x):
        """y = W x + b + s · Σ_i w_i(x) · B_i z_i; x [..., d_in] -> y [..., d_out], in the type of the base layer."""
        y = self.base(x)  # [..., d_out]
        w = None if self.router is None else torch.softmax(self.router(x.float()), dim=-1)  # [..., N], in float32
        with branch_precision(x) as branch_x:  # float32, or bfloat16 beside a bfloat16 layer
            z = self.head_dropout(self.head_inputs(branch_x))  # [..., N, r]: masks of its own for every head
            return y + combine_heads(self.scaling * z, w, self.heads).to(y.dtype)

    def head_inputs(self, x):
        """z_i of every head, [..., N, r]: A drop_i(x) with HydraLoRA's masks on x, else A x for all of them."""
        if self.training and self.dropout.p > 0:
            return torch.stack([self.lora_A(self.dropout(x)) for _ in range(len(self.heads))], dim=-2)
        z = self.lora_A(x)  # [..., r]
        return z.unsqueeze(-2).expand(*z.shape[:-1], len(self.heads), self.rank)

    def delta(self):
        """ΔW = s · Σ_i B_i A, float32 [d_out, d_in]; ValueError with a router, whose weights change with x."""
        if self.router is not None:
            raise ValueError("a routed adapter has no single weight to merge: its heads are weighted for every token")
        return self.scaling * self.heads.sum(0) @ self.lora_A.weight


def combine_heads(z, weights, heads):
    """[ex3] Σ_i w_i B_i z_i as one matrix product: [w_1 z_1, …, w_N z_N] times the heads laid side by side.

    z [..., N, r], weights [..., N] (None: all 1), heads [N, d_out, r] -> [..., d_out]. The same as a loop over the
    heads, but no tensor of shape [..., N, d_out] is ever made.
    """
    if weights is not None:
        z = z * weights.unsqueeze(-1)  # [..., N, r]
    side_by_side = heads.transpose(0, 1).flatten(1)  # [N, d_out, r] -> [d_out, N·r]
    return F.linear(z.flatten(-2), side_by_side)  # [..., N·r] -> [..., d_out]


@torch.no_grad()
def random_start(A, heads, gamma=64):
    """[ex4] R-LoRA's random start, in place: A [r, d_in] and heads [N, d_out, r] (arXiv 2502.15455, table 1).

        A ~ d_out^¼ / √γ · 𝒩(0, 1/d_in)        B_i ~ d_out^¼ / √γ · 𝒩(0, 1/d_out)        𝒩(mean, variance)

    The paper then subtracts s · mean_i(B_i) A from the frozen W, so that training starts at the base model. Here the
    mean is subtracted from the heads instead, in place too: with a router, since Σ w_i = 1, that is the same function
    at step 0 (without masks, to rounding), and W stays untouched. A centred head has √(1 - 1/N) times the table's
    deviation. It is not quite the paper's training: but for the masks, A's gradient is 0 in the first step, as LoRA's.
    """
    d_out, d_in = heads.shape[1], A.shape[1]
    scale = d_out ** 0.25 / math.sqrt(gamma)
    A.normal_(std=scale / math.sqrt(d_in))
    heads.normal_(std=scale / math.sqrt(d_out))
    heads -= heads.mean(0)
