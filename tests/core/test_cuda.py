"""The methods on a GPU: the CPU's numbers, and nothing in a step that waits for them.

Skipped where there is no GPU. TINYLORA_TEST_DEVICE=cpu tries the tests themselves on a CPU, but for what only CUDA can
tell.
"""

import itertools
import os
import warnings

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from torch import nn

from tinylora_mtl import MultiHeadLoRALinear, adapter_parameters, add_adapters, load_adapter, save_adapter
from tinylora_mtl.config import METHODS, TrainConfig, adapter_config, resolve
from tinylora_mtl.loss import label_logits
from tinylora_mtl.run.gradients import gradients_for
from tinylora_mtl.train import GRADIENTS, TrainState, train

DEVICE = os.environ.get("TINYLORA_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA can tell")
EPISODES = [(make_batch(seed=t, tasks=(t,)), make_batch(seed=9 + t, tasks=(t,))) for t in range(3)]
KINDS = [(method, "kl") for method in METHODS] + [("align", "mmd")]


def adapted(method, device=DEVICE, dtype=torch.float32, **changes):
    """(a small model with random adapters, the config that trains it)."""
    settings = {"method": method, "rank": 3, "alpha": 6, "dropout": 0.0, "steps": 20, "lr": 1e-3} | changes
    config = resolve(TrainConfig(**settings))
    model = make_llama().to(device, dtype)
    add_adapters(model, adapter_config(config))
    randomize_adapters(model)  # on the CPU, so the same on any device
    return model.train(), config


def batches(method):
    return EPISODES if method == "meta" else make_batch(each=6)


def step_of(method, device=DEVICE, dtype=torch.float32, checkpointing=False, **changes):
    """(metrics, {name: gradient}) of one step, on the CPU."""
    model, config = adapted(method, device, dtype, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    metrics = gradients_for(config)(model, batches(method), config)
    return ({name: float(value) for name, value in metrics.items()},
            {name: parameter.grad.cpu() for name, parameter in adapter_parameters(model).items()})


@pytest.mark.parametrize("method,align", KINDS)
def test_losses_and_gradients_are_the_cpus(method, align):
    found, expected = (step_of(method, device, align=align, inner_lr=0.1) for device in (DEVICE, "cpu"))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected[1].values())


@pytest.mark.parametrize("method", ["lora", "hydralora", "rlora", "mlora"])
def test_outputs_are_the_cpus(method):
    logits = [label_logits(adapted(method, device)[0].eval(), make_batch())[0].cpu() for device in (DEVICE, "cpu")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method,align", KINDS)
def test_bfloat16_weights_train_float32_adapters(method, align):
    """Losses to the precision of bfloat16, gradients in float32 and of the same direction."""
    found, expected = (step_of(method, dtype=dtype, align=align) for dtype in (torch.bfloat16, torch.float32))
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.05)
    one, other = (torch.cat([gradient.flatten() for gradient in step[1].values()]) for step in (found, expected))
    assert one.dtype == torch.float32 and torch.cosine_similarity(one, other, dim=0) > 0.98


@pytest.mark.parametrize("method", [method for method in METHODS if method != "meta"])
def test_accumulation_and_checkpointing_change_nothing(method):
    plain = step_of(method)
    for changes in (dict(accumulation=3), dict(checkpointing=True), dict(accumulation=2, checkpointing=True)):
        parts = step_of(method, **changes)
        torch.testing.assert_close(parts[0], plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts[1], plain[1], rtol=1e-3, atol=1e-5)


def test_every_head_and_every_step_has_a_mask_of_its_own():
    layer = MultiHeadLoRALinear(nn.Linear(8, 8, device=DEVICE), 16, 16, 5, head_dropout=0.5).train()
    seen = []
    layer.head_dropout.register_forward_hook(lambda module, inputs, z: seen.append((z == 0).cpu()))
    for _ in range(2):
        layer(torch.randn(64, 8, device=DEVICE))
    masks = [*seen[0].unbind(-2), *seen[1].unbind(-2)]  # [64, 16] each: 2 steps of 5 heads
    for one, other in itertools.combinations(masks, 2):
        assert 0.4 < (one != other).float().mean() < 0.6
    assert all(0.4 < mask.float().mean() < 0.6 for mask in masks)


@pytest.mark.parametrize("method,align", KINDS)
def test_training_lowers_the_loss_and_an_adapter_comes_back(tmp_path, method, align):
    model, config = adapted(method, align=align, lr=1e-2, dropout=0.1)
    state = TrainState(model, itertools.repeat(batches(method)), config)
    losses = [float(metrics["loss"]) for _, metrics in train(model, state, config)]
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path)
    for device in (DEVICE, "cpu"):
        other = make_llama().to(device)
        load_adapter(other, tmp_path)
        torch.testing.assert_close(label_logits(other, make_batch())[0].cpu(), label_logits(model, make_batch())[0].cpu(),
                                   rtol=1e-4, atol=1e-5)


@only_cuda
@pytest.mark.parametrize("method,align", KINDS)
def test_no_gradients_wait_for_the_device(method, align):
    """In `train`, the one number that a step asks for is whether its gradient is finite, after these.

    What transformers waits for in making its attention masks is its own.
    """
    model, config = adapted(method, align=align, dropout=0.1)
    for mode in ("default", "warn"):  # the first time there is memory to find
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                GRADIENTS[method](model, batches(method), config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    own = [f"{wait.filename}:{wait.lineno}: {wait.message!s:.100}" for wait in waits
           if "synchroniz" in str(wait.message) and "/transformers/" not in wait.filename]
    assert not own, own


@only_cuda
@pytest.mark.parametrize("method,align", KINDS)
def test_memory_is_flat_over_steps(method, align):
    model, config = adapted(method, align=align, steps=40, dropout=0.1)
    state, used = TrainState(model, itertools.repeat(batches(method)), config), []
    for step, _ in train(model, state, config):
        used.append(torch.cuda.memory_allocated())
    assert max(used[25:]) <= max(used[5:25]), used  # it goes up and down a little, as Python lets go of things
