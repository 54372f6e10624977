"""A training step asks the device for no number: nothing in it waits for a GPU.

There need be no GPU for that. torch's `meta` device has tensors without numbers, so whatever looks at one raises: an
`int()`, an `if`, a `nonzero`, a mask that picks rows. The batches are on the CPU, as in training. Eager attention, for
the other kinds have transformers look at the padding mask in every forward pass, which is not this package's to change.
"""

import pytest
import torch
from conftest import make_batch, make_llama

from tinylora_mtl import adapter_parameters, add_adapters
from tinylora_mtl.run.settings import METHODS, TrainConfig, adapter_config
from tinylora_mtl.run.training import meta_step, multitask_step


class Episodes:
    rows = [None] * 3

    def episodes(self, *sizes):
        return [(make_batch(seed=t, tasks=(t,)), make_batch(seed=9 + t, tasks=(t,))) for t in range(3)]


def without_numbers(config):
    model = make_llama(attn_implementation="eager").to("meta")
    add_adapters(model, adapter_config(config))
    return model.train()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method,align", [(name, "kl") for name in METHODS if name != "meta"] + [("align", "mmd")])
def test_a_step_looks_at_no_number_on_the_device(method, align, accumulation):
    config = TrainConfig(method=method, dropout=0.1, accumulation=accumulation, align=align, align_weight=0.5)
    model = without_numbers(config)
    numbers = multitask_step(model, make_batch(each=30), config)
    assert all(number.device.type == "meta" for number in numbers.values())
    gradients = [parameter.grad for parameter in adapter_parameters(model).values()]
    assert all(gradient.device.type == "meta" for gradient in gradients)
    norm = torch.nn.utils.clip_grad_norm_(adapter_parameters(model).values(), 1.0)
    with pytest.raises(RuntimeError):  # so it would be seen
        bool(torch.isfinite(norm))


def test_a_round_of_meta_looks_at_no_number_on_the_device():
    config = TrainConfig(method="meta", dropout=0.1)
    model = without_numbers(config)
    meta_step(model, Episodes(), config, log=False)
    assert all(p.grad.device.type == "meta" for p in adapter_parameters(model).values())
