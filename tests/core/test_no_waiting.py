"""A training step asks the device for one number only, whether its gradient is finite: nothing else waits for a GPU.

There need be no GPU for that. torch's `meta` device has tensors without numbers, so whatever looks at one raises: an
`int()`, an `if`, a `nonzero`, a mask that picks rows. The batches are on the CPU, as in training. Eager attention, for
the other kinds have transformers look at the padding mask in every forward pass, which is not this package's to change.
"""

import itertools

import pytest
import torch
from conftest import make_batch, make_llama

from tinylora_mtl import adapter_parameters, add_adapters
from tinylora_mtl.config import METHODS, TrainConfig, adapter_config
from tinylora_mtl.train import TrainState, train

EPISODES = [(make_batch(seed=t, tasks=(t,)), make_batch(seed=9 + t, tasks=(t,))) for t in range(3)]


@pytest.mark.parametrize("method,align", [(name, "kl") for name in METHODS] + [("align", "mmd")])
def test_a_step_looks_at_no_other_number_on_the_device(monkeypatch, method, align):
    config = TrainConfig(method=method, dropout=0.1, align=align, steps=2)
    model = make_llama(attn_implementation="eager").to("meta")
    add_adapters(model, adapter_config(config))
    batches = itertools.repeat(EPISODES if method == "meta" else make_batch(each=30))
    with pytest.raises(RuntimeError):  # this one look, and so any other would be seen
        next(train(model, TrainState(model, batches, config), config))
    asked = []
    monkeypatch.setattr(torch, "isfinite", lambda number: asked.append(number) or torch.tensor(True))
    for step, metrics in train(model, TrainState(model, batches, config), config):
        assert {number.device.type for name, number in metrics.items() if name != "lr"} == {"meta"}
    assert step == 2 and [number.shape for number in asked] == [()] * 2
    assert all(parameter.grad.device.type == "meta" for parameter in adapter_parameters(model).values())
