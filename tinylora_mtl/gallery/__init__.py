"""Related methods, one file each: what changes from LoRA, or from R-LoRA, and nothing else.

    python -m tinylora_mtl.train --method smora
    python -m tinylora_mtl.train --method path/to/my_method.py

A file has LR, the default rate on the embedded model, and a class `Layer` that takes the place of a linear layer, a
function `gradients(model, batch, config)` as in `train.py`, or both. No line elsewhere knows of it.

A method of your own, from nothing. Say you want LoRA with a gate: y = W x + b + s · g · B A x, g a number that trains.

    from torch import nn, ones                                     # my_method.py
    from tinylora_mtl.lora import LoRALinear, branch_precision

    LR = 5e-3

    class Layer(LoRALinear):
        def __init__(self, base, config):                          # an AdapterConfig: rank, alpha, heads, tasks, …
            super().__init__(base, config.rank, config.alpha, config.dropout or 0.0)
            self.g = nn.Parameter(ones((), device=base.weight.device))

        def forward(self, x):                                      # [..., d_in] -> [..., d_out]
            y = self.base(x)
            with branch_precision(x) as branch_x:
                return y + (self.g * self.lora_B(self.scaling * self.lora_A(branch_x))).to(y.dtype)

        def delta(self):                                           # what merging adds to W; ValueError if nothing can
            return self.g.detach() * super().delta()

Rules. A layer is a subclass of LoRALinear or MultiHeadLoRALinear, for these are found by what trains, saves and merges.
It calls `self.lora_A`, if it has features A x that are to be compared. It should start as its base. Its Parameters, in
float32 and on the base's device, train; what is to be saved with them and not trained is a buffer. If it differs by
task, it has `task_ids = None`, its gradients function sets that to the batch's, and whoever asks for an answer sets it
to the task's number (`mtl_lora.py`). A gradients function leaves gradients in `.grad` and returns {"loss": ...}; it is
called for each part of a step that comes in parts, whose losses add up (`bora.py`). A file by its path is taken from
the command line alone, so `evaluate`, `lab.heads` and `--resume` need --method path/to/my_method.py too.
"""
