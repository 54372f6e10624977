"""BoRA, Bayesian hierarchical LoRA: a LoRA for each task, all drawn towards a common mean.

Changes from LoRA: each task t, which the layer has to be told, has its own θ_t = (A_t, B_t), with the prior 𝒩(Θ, 1/τ).

    y = W x + b + s · B_t A_t drop(x),     s = alpha / r
    L = L_task + τ/2 · Σ_layers Σ_t ‖θ_t - Θ‖²

Θ = (A, B) trains too; τ = 0 trains every task by itself, a large τ one LoRA for all. A is Kaiming-uniform, B zero,
every θ_t a copy of them: the layer starts as its base. Once a task is told, it merges for that task.
The norm is squared as in the paper, not as in its code; L_task is a mean, so τ is the paper's divided by the number of
samples. TAU and LR are this project's choice. Source: arXiv 2407.15857.
"""

import torch
from torch import nn

from ..adapters import find_adapters
from ..lora import LoRALinear, branch_precision
from ..loss import NO_LABEL, label_loss

LR, TAU = 5e-3, 1e-2


class Layer(LoRALinear):
    """Θ is `lora_A` and `lora_B`; `task_A` [T, r, d_in], `task_B` [T, d_out, r]; `task_ids`: [batch] or a number."""

    task_ids = None

    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha, config.dropout or 0.0, bool(config.rank_stabilized))
        for name, mean in (("task_A", self.lora_A.weight), ("task_B", self.lora_B.weight)):
            self.register_parameter(name, nn.Parameter(mean.detach().repeat(max(1, len(config.tasks)), 1, 1)))

    def forward(self, x):
        if self.task_ids is None:
            raise ValueError("the layer has to be told the task (`task_ids`)")
        y = self.base(x)
        with branch_precision(x) as branch_x:
            z = self.dropout(branch_x) @ self.task_A[self.task_ids].mT  # [batch, length, r]
            return y + (self.scaling * z @ self.task_B[self.task_ids].mT).to(y.dtype)

    @torch.no_grad()
    def delta(self):
        if not isinstance(self.task_ids, int):
            raise ValueError("each task has a weight of its own: tell the layer which one (`task_ids`)")
        return self.scaling * self.task_B[self.task_ids] @ self.task_A[self.task_ids]


def gradients(model, batch, config):
    """L of the step, and how far the tasks are apart: Σ ‖θ_t - Θ‖²."""
    layers = list(find_adapters(model).values())
    for layer in layers:
        layer.task_ids = batch["task_ids"].to(layer.task_A.device)
    loss = label_loss(model, batch)
    apart = sum((own - mean.weight).square().sum() for layer in layers
                for own, mean in ((layer.task_A, layer.lora_A), (layer.task_B, layer.lora_B)))
    labels = (batch["labels"][:, 1:] != NO_LABEL).sum()
    share = float(labels / batch.get("label_count", labels))  # of the step, if the batch is a part of it
    (loss + TAU / 2 * share * apart).backward()
    return {"loss": loss.detach(), "apart": share * apart.detach()}
