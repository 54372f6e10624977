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
                z = self.lora_A(self.dropout(branch_x))            # [..., r]
                return y + (self.g * self.lora_B(self.scaling * z)).to(y.dtype)

        def delta(self):                                           # what merging adds to W; ValueError if nothing can
            return self.g.detach() * super().delta()

and once it has been trained, in Python:

    from tinylora_mtl import load_adapter, merge_adapters
    from tinylora_mtl.run.methods import typed_method
    from tinylora_mtl.run.models import load_model

    typed_method("my_method.py")                                   # makes it known, as --method does
    model, tokenizer, _ = load_model("mini")
    load_adapter(model, "runs/my_method-mini-seed0/adapter")
    merge_adapters(model)

Rules. A layer is a subclass of LoRALinear or MultiHeadLoRALinear, for these are found by what trains, saves and merges.
It calls `self.lora_A`, if it has features A x that are to be compared. W is `self.base.weight` [d_out, d_in] (of
GPT-2's Conv1D its transpose), while `delta` is always [d_out, d_in]. The layer should start as its base: compare the
two. Its Parameters, in float32 and on the base's device, train (a tensor that is none does not: compare the number that
`train` prints); what is to be saved with them and not trained is a buffer. If it differs by task, it has `task_ids =
None`, its gradients function sets that to the batch's, and whoever asks for an answer sets it to the task's number
(`mtl_lora.py`). A gradients function leaves gradients in `.grad` and returns {"loss": ...}; it is called for each part
of a step that comes in parts, whose losses add up (`bora.py`). A file by its path is taken from whoever types it, never
from a run's folder, so `evaluate`, `lab.heads` and `--resume` need --method my_method.py too.
"""
