"""LoRI, dense (LoRI-D): LoRA whose A never trains.

Changes from LoRA: A stays as it was drawn, so only B trains, and adapters of different A interfere little when they are
added up.

    y = W x + b + s · B A x,     s = alpha / r,     A Kaiming-uniform and frozen, B = 0 at the start

No dropout, as in the authors' code. It merges as LoRA does. The alignment loss would have nothing to train here.

Source: arXiv 2504.07448 and its code (r 32 or 64, alpha 2 r). The default rate is this project's choice.
"""

from ..lora import LoRALinear

LR = 1e-2


class Layer(LoRALinear):
    """As `LoRALinear`, with the weight of `lora_A` [r, d_in] as a buffer: it is saved, and does not train."""

    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha, 0.0, bool(config.rank_stabilized))
        drawn = self.lora_A.weight.detach()
        del self.lora_A.weight
        self.lora_A.register_buffer("weight", drawn)
