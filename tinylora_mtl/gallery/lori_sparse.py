"""LoRI, sparse (LoRI-S): LoRI-D, then once more with a tenth of B.

Changes from LoRI-D: half way, the tenth of all entries of all B that are largest is kept as a mask M, B is set to zero
and training goes on.

    y = W x + b + s · (M ∘ B) A x

It merges, with M ∘ B for B. In the authors' code the stages are two runs, each with its own schedule; here they are the
halves of one, and the optimiser's moments and the falling learning rate go on. Masked entries of B may move, but M
keeps them out. Source: arXiv 2504.07448 and its code (90 % sparse, one threshold for all layers). LR: this project's.
"""

import torch
import torch.nn.functional as F

from ..adapters import find_adapters
from ..lora import branch_precision
from ..train import lora_gradients
from . import lori

LR, KEPT = 3e-2, 0.1


class Layer(lori.Layer):
    """`mask` [d_out, r], all 1 in the first stage; `steps`: how many (micro-)batches there were."""

    def __init__(self, base, config):
        super().__init__(base, config)
        self.register_buffer("mask", torch.ones_like(self.lora_B.weight))
        self.register_buffer("steps", self.mask.new_zeros(()))

    def forward(self, x):
        y = self.base(x)
        with branch_precision(x) as branch_x:
            return y + F.linear(self.scaling * self.lora_A(branch_x), self.mask * self.lora_B.weight).to(y.dtype)

    @torch.no_grad()
    def delta(self):
        return self.scaling * (self.mask * self.lora_B.weight) @ self.lora_A.weight


@torch.no_grad()
def keep_the_largest(layers):
    """Make the masks, and set B to zero."""
    sizes = torch.cat([layer.lora_B.weight.abs().flatten() for layer in layers])
    threshold = sizes.sort(descending=True).values[int(KEPT * len(sizes))]
    for layer in layers:
        layer.mask.copy_(layer.lora_B.weight.abs() > threshold)
        layer.lora_B.weight.zero_()


def gradients(model, batch, config):
    """LoRA's, with the masks made half way."""
    layers = list(find_adapters(model).values())
    if int(layers[0].steps) == config.steps // 2 * config.accumulation:
        keep_the_largest(layers)
    for layer in layers:
        layer.steps += 1
    return lora_gradients(model, batch, config)
