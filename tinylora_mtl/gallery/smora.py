"""SMoRA: every rank of a LoRA is an expert of its own, and each token gets k of them.

Changes from LoRA: a router scores the r ranks for each token, and the k best are used.

    y = W x + b + alpha/k · B (g ∘ A x'),     x' = drop(x),     q = sigmoid(R x') + β
    g_j = k · q_j / Σ_chosen q     for the k largest q_j, and 0 for the others

A and R are Kaiming-uniform, B and β zero: the layer starts as its base. A, B and R train. β evens out the load by a
rule instead of a loss: after each training pass it grows by 1e-5 for ranks chosen less often than the mean, and falls
for the others (padding counts, and with several processes each has its own). It does not merge, for the choice is
made for every token. --heads is k, at most r (8 of 64 in the authors' setting).

As in the code, the score with β is the weight too, not only what the choice is made by.
Source: arXiv 2501.15103 and its code, `srmole/layer.py`. The default rate is this project's choice.
"""

import torch
from torch import nn

from ..lora import LoRALinear, branch_precision

LR, BIAS_RATE = 5e-3, 1e-5


class Layer(LoRALinear):
    """`rank_router` is R, nn.Linear d_in -> r; `load_bias` is β [r], a buffer."""

    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha, config.dropout or 0.0)
        self.active = min(config.heads, config.rank)
        self.scaling = config.alpha / self.active
        like = self.lora_A.weight
        self.rank_router = nn.Linear(like.shape[1], config.rank, bias=False, device=like.device, dtype=like.dtype)
        self.register_buffer("load_bias", like.new_zeros(config.rank))

    def forward(self, x):
        y = self.base(x)
        with branch_precision(x) as branch_x:
            dropped = self.dropout(branch_x)
            q = torch.sigmoid(self.rank_router(dropped).float()) + self.load_bias  # [..., r]
            best, chosen = q.topk(self.active)  # [..., k]
            g = torch.zeros_like(q).scatter(-1, chosen, self.active * best / best.sum(-1, keepdim=True))
            if self.training:
                counts = chosen.flatten().bincount(minlength=len(self.load_bias)).float()
                self.load_bias += BIAS_RATE * torch.sign(counts.mean() - counts)
            return y + self.lora_B(self.scaling * g * self.lora_A(dropped)).to(y.dtype)

    def delta(self):
        raise ValueError("SMoRA chooses ranks anew for every token, so no single weight equals it")
