r"""R-LoRA with the start of its released code, which is not that of the paper.

Changes from R-LoRA: A and the heads start otherwise, and so does the router, which is Kaiming-uniform.

    A ~ 𝒩(0, 1/max(r, d_in));   for i = 1 … N:  B_i ~ 𝒩(0, 1/max(r, d_out)),  then A and B_1 … B_i are all multiplied
    by r^¼ / √γ, γ = 64   (variances; the paper has d_out^¼ / √γ, once)

since the loop over the heads uses the variable of the loop around it: B_i ends with N - i + 1 factors and A with N, at
r = 4 and N = 5 less than 2 in 10,000 of what was drawn. The start's own product is subtracted, in the code from W, here
in the forward pass by a frozen copy, so that W stays what it is:

    y = W x + b + s · (Σ_i w_i(x) · B_i z_i - B⁰ A⁰ x),     B⁰ = mean_i B_i⁰     (without a router: B⁰ = Σ_i B_i⁰)

With the router the layer starts close to its base, not as it. Source: the repository of arXiv 2502.15455, `reinit.py`.
"""

import torch
import torch.nn.functional as F

from ..lora import branch_precision
from ..multihead import MultiHeadLoRALinear

LR = 5e-3


class Layer(MultiHeadLoRALinear):
    """As `MultiHeadLoRALinear`; `start_A` [r, d_in] and `start_B` [d_out, r] are the frozen copy of the start."""

    routed = True

    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha, config.heads, routed=self.routed, rank_stabilized=True,
                         head_dropout=0.1 if config.dropout is None else config.dropout)
        released_start(self.lora_A.weight, self.heads)
        self.register_buffer("start_A", self.lora_A.weight.detach().clone())
        self.register_buffer("start_B", self.heads.detach().mean(0) if self.routed else self.heads.detach().sum(0))

    def forward(self, x):
        y = super().forward(x)  # [..., d_out]
        with branch_precision(x) as branch_x:
            return y - F.linear(F.linear(branch_x, self.start_A), self.scaling * self.start_B).to(y.dtype)

    def delta(self):
        return super().delta() - self.scaling * self.start_B @ self.start_A


@torch.no_grad()
def released_start(A, heads, gamma=64):
    """The start above, in place: A [r, d_in] and heads [N, d_out, r]."""
    rank, d_in, d_out = *A.shape, heads.shape[1]
    A.normal_(std=max(rank, d_in) ** -0.5)
    for i in range(len(heads)):
        heads[i].normal_(std=max(rank, d_out) ** -0.5)
        for drawn in (A, heads[:i + 1]):
            drawn *= rank ** 0.25 / gamma ** 0.5
