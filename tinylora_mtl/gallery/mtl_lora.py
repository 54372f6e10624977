"""MTL-LoRA: a small matrix for each task between A and B, and a mixture of several B for each task.

Changes from LoRA: t is the task of the sample, which the layer has to be told, also when it answers.

    y = W x + b + s · B_t Λ_t A drop(x),     B_t = Σ_i w_ti B_i,     w_t = softmax(M_t / τ),     s = alpha / r

A is Kaiming-uniform, Λ_t [r, r] the identity, M [T, N] Kaiming-uniform, B_i zero: the layer starts as its base. All
train. Once a task is told, it merges for that task. --heads is N (3 in the authors' script), τ is 0.1 as there. Source:
arXiv 2410.09437 and its code, `mlora.py`. The default rate is this project's choice.
"""

import torch
from torch import nn

from ..adapters import find_adapters
from ..lora import LoRALinear, branch_precision
from ..train import lora_gradients

LR, TAU = 5e-3, 0.1


class Layer(LoRALinear):
    """`heads` [N, d_out, r], `task_matrices` Λ [T, r, r], `mixture` M [T, N]; `task_ids`: [batch] or a number."""

    task_ids = None

    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha, config.dropout or 0.0, bool(config.rank_stabilized))
        tasks, like = max(1, len(config.tasks)), self.lora_A.weight
        self.heads = nn.Parameter(like.new_zeros(config.heads, self.lora_B.out_features, config.rank))
        self.task_matrices = nn.Parameter(torch.eye(config.rank).to(like).repeat(tasks, 1, 1))
        self.mixture = nn.Parameter(nn.init.kaiming_uniform_(like.new_empty(tasks, config.heads), a=5 ** 0.5))
        del self.lora_B

    def forward(self, x):
        y, (matrices, B) = self.base(x), self.of_task()
        with branch_precision(x) as branch_x:
            z = self.lora_A(self.dropout(branch_x)) @ matrices.mT  # [batch, length, r]
            return y + (self.scaling * z @ B.mT).to(y.dtype)

    def of_task(self):
        """(Λ_t, B_t): [r, r] and [d_out, r] of a task, or of each sample [batch, r, r] and [batch, d_out, r]."""
        if self.task_ids is None:
            raise ValueError("the layer has to be told the task (`task_ids`)")
        w = torch.softmax(self.mixture[self.task_ids] / TAU, dim=-1)
        return self.task_matrices[self.task_ids], torch.einsum("...n,nor->...or", w, self.heads)

    @torch.no_grad()
    def delta(self):
        if not isinstance(self.task_ids, int):
            raise ValueError("each task has a weight of its own: tell the layer which one (`task_ids`)")
        matrix, B = self.of_task()
        return self.scaling * B @ matrix @ self.lora_A.weight


def gradients(model, batch, config):
    """LoRA's, with the tasks told."""
    for adapter in find_adapters(model).values():
        adapter.task_ids = batch["task_ids"].to(adapter.mixture.device)
    return lora_gradients(model, batch, config)
