"""MultiLoRA: several small LoRAs side by side, each with a gate for every output.

Changes from LoRA: N branches instead of one, B_i random at the start instead of zero, and a gate that is zero.

    y = W x + b + s · Σ_i diag(c_i) B_i A_i drop(x),     s = alpha / r

A_i and B_i are Kaiming-uniform(a = √5), c_i [d_out] zero: the layer starts as its base, and only c has a gradient in
the first step. All three train. It merges: ΔW = s · Σ_i diag(c_i) B_i A_i. --heads is N (3 in the authors' script).

Source: arXiv 2311.11501; the start and the place of the gates are read from a re-implementation (that of MTL-LoRA's
authors), for no code of its own authors was found. The default rate is this project's choice.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..lora import LoRALinear, branch_precision, lora_scaling

LR = 5e-3


class Layer(LoRALinear):
    """`lora_A` holds all A_i [N·r, d_in], `lora_B` all B_i side by side [d_out, N·r]; `gates` [d_out, N]."""

    def __init__(self, base, config):
        super().__init__(base, config.heads * config.rank, config.alpha, config.dropout or 0.0)
        self.scaling = lora_scaling(config.alpha, config.rank, bool(config.rank_stabilized))
        nn.init.uniform_(self.lora_B.weight, -config.rank ** -0.5, config.rank ** -0.5)  # of a fan-in of r, not N·r
        self.gates = nn.Parameter(self.lora_B.weight.new_zeros(self.lora_B.out_features, config.heads))

    def forward(self, x):
        y = self.base(x)
        with branch_precision(x) as branch_x:
            z = self.lora_A(self.dropout(branch_x))  # [..., N·r]
            return y + F.linear(self.scaling * z, self.gated_B()).to(y.dtype)

    def gated_B(self):
        """[diag(c_1) B_1, …, diag(c_N) B_N], [d_out, N·r]."""
        return self.lora_B.weight * self.gates.repeat_interleave(self.lora_B.in_features // self.gates.shape[1], dim=1)

    @torch.no_grad()
    def delta(self):
        return self.scaling * self.gated_B() @ self.lora_A.weight
