"""MoRE: a rank for each task, learned.

Changes from LoRA: t is the task of the sample, which the layer has to be told, also when it answers. A gate chooses for
each task how many of the r rows of A and columns of B it uses.

    y = W x + b + s · B[:, :r_t] A[:r_t] drop(x),     p_t = softmax(G e_t + g),     r_t = argmax p_t,     s = alpha / r

The choice has no gradient. So the branch is multiplied by 1 + p - sg(p), p the chosen probability and sg "without
gradient": it gives the gate the gradient of p (straight-through). In the authors' code this line is never reached. e_t
[d_in] is 𝒩(0, 0.01²), G and g as in nn.Linear, B zero: it starts as its base. Once told a task, it merges for that one.
Left out: the contrastive loss between samples and e_t (its weight is 0.1 in the paper, known here only from a summary),
the sampling of tasks by size, the factors (i + 1)/8 of the code. Source: arXiv 2505.22694. LR is this project's choice.
"""

import torch
from torch import nn

from ..adapters import find_adapters
from ..lora import LoRALinear, branch_precision
from ..train import lora_gradients

LR = 5e-3


class Layer(LoRALinear):
    """`tasks` e [T, d_in], `rank_gate` nn.Linear d_in -> r; `task_ids`: [batch] or a number."""

    task_ids = None

    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha, config.dropout or 0.0, bool(config.rank_stabilized))
        like = self.lora_A.weight
        self.tasks = nn.Parameter(0.01 * torch.randn_like(like[:1].expand(max(1, len(config.tasks)), -1)))
        self.rank_gate = nn.Linear(like.shape[1], config.rank, device=like.device, dtype=like.dtype)

    def forward(self, x):
        y, gate = self.base(x), self.gate()
        with branch_precision(x) as branch_x:
            z = gate.unsqueeze(-2) * self.lora_A(self.dropout(branch_x))  # [batch, length, r]
            return y + self.lora_B(self.scaling * z).to(y.dtype)

    def gate(self):
        """1 for the first r_t ranks and 0 for the others, with the gradient of p: [r], or [batch, r]."""
        if self.task_ids is None:
            raise ValueError("the layer has to be told the task (`task_ids`)")
        p, chosen = torch.softmax(self.rank_gate(self.tasks[self.task_ids]), dim=-1).max(-1, keepdim=True)
        return (torch.arange(self.rank, device=p.device) <= chosen) * (1 + p - p.detach())

    @torch.no_grad()
    def delta(self):
        if not isinstance(self.task_ids, int):
            raise ValueError("each task has a weight of its own: tell the layer which one (`task_ids`)")
        return self.scaling * (self.lora_B.weight * self.gate()) @ self.lora_A.weight


def gradients(model, batch, config):
    """LoRA's, with the tasks told."""
    for adapter in find_adapters(model).values():
        adapter.task_ids = batch["task_ids"].to(adapter.tasks.device)
    return lora_gradients(model, batch, config)
