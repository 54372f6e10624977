"""The training loop against the same loop written out, and what the gradients function of each method does."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_llama, randomize_adapters

from tinylora_mtl import adapter_parameters, add_adapters
from tinylora_mtl.adapters import find_adapters
from tinylora_mtl.config import METHODS, MINI_LR, TrainConfig, adapter_config
from tinylora_mtl.loss import label_loss
from tinylora_mtl.meta import meta_gradients
from tinylora_mtl.train import (GRADIENTS, TrainState, align_gradients, cosine_schedule, lora_gradients,
                                metalora_gradients, train)

STEPS = 6
CLIP = {"lora": 0.09, "hydralora": 0.02, "rlora": 0.07, "mlora": 0.7, "align": 1.1, "meta": 0.1}  # not in every step


def config_for(method, **changes):
    return TrainConfig(**{"method": method, "steps": STEPS, "lr": 0.02, "warmup": 0.3, "clip": CLIP[method], "rank": 3,
                          "alpha": 6.0, "heads": 4, "dropout": 0.0, "inner_lr": 0.5, "inner_steps": 2,
                          "align_weight": 0.5} | changes)


def adapted(config):
    """A tiny model with adapters that are not at their start; random numbers begin anew."""
    model = make_llama()
    add_adapters(model, adapter_config(config))
    randomize_adapters(model)
    torch.manual_seed(5)
    return model


def batches_for(method, steps=STEPS):
    """A batch for each step; for meta a round of two tasks."""
    if method == "meta":
        return [[(make_batch(seed=9 * step + t, tasks=(t,)), make_batch(seed=9 * step + t + 5, tasks=(t,), each=3))
                 for t in (0, 2)] for step in range(steps)]
    return [make_batch(seed=step) for step in range(steps)]


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def trained(config, batches, **options):
    """(adapters, metrics of each step) of a run that goes through."""
    model = adapted(config)
    metrics = list(train(model, TrainState(model, batches, config), config, **options))
    return values_of(model), metrics


# ------------------------------------------------------------------------------------------------- all written out
def share(step, warmup, steps):
    """The share of the peak rate in the step that comes after `step` others."""
    if step < warmup:
        return (step + 1) / (warmup + 1)  # never 0: no step is lost
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def plain_loss(model, batch):
    """The mean cross-entropy over the labels, of all logits, with positions that do not count the padding."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"],
                   position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def kl_loss(model, batch):
    """(L_task, L_align): mean over layers of mean over pairs of tasks of ½ (KL(t‖t') + KL(t'‖t)), each KL by itself."""
    outputs, handles = [], []
    for adapter in find_adapters(model).values():
        handles.append(adapter.lora_A.register_forward_hook(lambda module, inputs, z: outputs.append(z)))
    loss = plain_loss(model, batch)
    for handle in handles:
        handle.remove()
    layers = []
    for z in outputs:
        gaussians = []
        for task in batch["task_ids"].unique():
            mine = batch["attention_mask"].bool() & (batch["task_ids"] == task)[:, None]
            tokens = z[mine]
            mean = tokens.sum(0) / len(tokens)
            gaussians.append((mean, (tokens - mean).square().sum(0) / len(tokens) + 1e-5))

        def kl(p, q):
            (m, v), (m2, v2) = p, q
            return 0.5 * (torch.log(v2 / v) + (v + (m - m2) ** 2) / v2 - 1).sum()
        pairs = [(kl(p, q) + kl(q, p)) / 2 for p, q in itertools.combinations(gaussians, 2)]
        layers.append(sum(pairs) / len(pairs))
    return loss, sum(layers) / len(layers)


def plain_gradients(model, batch, config):
    """The gradient of a step, a list, by the definition of its method."""
    parameters = list(adapter_parameters(model).values())
    if config.method == "align":
        loss, alignment = kl_loss(model, batch)
        return torch.autograd.grad(loss + config.align_weight * alignment, parameters)
    if config.method != "meta":
        return torch.autograd.grad(plain_loss(model, batch), parameters)
    of_tasks = []
    for support, query in batch:
        own = copy.deepcopy(model)
        moving = list(adapter_parameters(own).values())
        for _ in range(config.inner_steps):
            for parameter, gradient in zip(moving, torch.autograd.grad(plain_loss(own, support), moving)):
                parameter.data -= config.inner_lr * gradient
        of_tasks.append(torch.autograd.grad(plain_loss(own, query), moving))
    return [sum(gradients) / len(batch) for gradients in zip(*of_tasks)]


def written_out(config, batches):
    """AdamW without weight decay, clipping and schedule, by hand -> (adapters, [(norm, rate) of each step])."""
    model, log = adapted(config), []
    parameters = list(adapter_parameters(model).values())
    m, v = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for step, batch in enumerate(batches, 1):
        gradients = plain_gradients(model, batch, config)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        rate = config.lr * share(step - 1, round(config.warmup * config.steps), config.steps)
        for i, (parameter, g) in enumerate(zip(parameters, gradients)):
            g = g * min(1.0, config.clip / float(norm))
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g ** 2
            update = (m[i] / (1 - 0.9 ** step)) / ((v[i] / (1 - 0.999 ** step)).sqrt() + 1e-8)
            parameter.data -= rate * update
        log.append((float(norm), rate))
    return values_of(model), log


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_is_the_one_written_out(method):
    config, batches = config_for(method), batches_for(method)
    values, metrics = trained(config, batches)
    expected, log = written_out(config, batches)
    assert [step for step, _ in metrics] == [1, 2, 3, 4, 5, 6]
    norms = [float(numbers["gradient_norm"]) for _, numbers in metrics]
    assert norms == pytest.approx([norm for norm, _ in log], rel=1e-3)
    assert [numbers["lr"] for _, numbers in metrics] == pytest.approx([rate for _, rate in log])
    assert min(norm for norm, _ in log) < config.clip < max(norm for norm, _ in log)  # some are clipped, some are not
    start = values_of(adapted(config))
    assert max((expected[name] - start[name]).abs().max() for name in start) > 0.03
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("warmup,steps", [(0, 1), (0, 7), (1, 7), (3, 10), (5, 5), (30, 1000)])
def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine(warmup, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, rates = cosine_schedule(optimizer, warmup, steps), []
    for _ in range(steps):
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2.0 * share(step, warmup, steps) for step in range(steps)])
    assert max(rates) == 2.0 if warmup < steps else rates[-1] < 2.0
    assert schedule.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12) or warmup == steps  # after the last step


# ------------------------------------------------------------------------------------------------ stopping, going on
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_that_is_stopped_goes_on_as_if_it_had_not_been(method):
    """With dropout, so that the random numbers count; bit for bit."""
    config, batches = config_for(method, dropout=0.3), batches_for(method)
    values, metrics = trained(config, batches)
    model = adapted(config)
    state, parts = TrainState(model, batches, config), []
    for stop in (2, 3, 99):
        for step, numbers in train(model, state, config):
            assert state.step == step and model.training
            parts.append((step, numbers))
            if step == stop:
                break
    torch.testing.assert_close(parts, metrics, atol=0, rtol=0)
    torch.testing.assert_close(values_of(model), values, atol=0, rtol=0)
    assert not model.training  # at the end
    assert list(train(model, state, config)) == []


def test_a_gradient_that_is_not_finite_stops_the_step_and_leaves_all_as_it_was():
    """And calling again goes on, as if there had never been that batch."""
    config, batches = config_for("lora"), batches_for("lora")
    for value in (float("nan"), float("inf")):
        model = adapted(config)
        state = TrainState(model, batches, config)

        def spoiled(model, batch, config):
            metrics = lora_gradients(model, batch, config)
            if state.step == 3:
                next(iter(adapter_parameters(model).values())).grad[0, 0] = value
            return metrics
        with pytest.raises(FloatingPointError, match=r"not finite at step 3, the loss \d\.\d+"):
            for step, _ in train(model, state, config, spoiled):
                before = values_of(model), copy.deepcopy([state.optimizer.state_dict(), state.schedule.state_dict()])
        assert step == 2 and state.step == 3
        after = values_of(model), [state.optimizer.state_dict(), state.schedule.state_dict()]
        torch.testing.assert_close(after, before, atol=0, rtol=0)
        assert next(train(model, state, config, spoiled))[0] == 4

        other = adapted(config)
        steps = train(other, TrainState(other, batches[:2] + batches[3:], config), config)
        assert [next(steps)[0] for _ in range(3)] == [1, 2, 3]
        torch.testing.assert_close(values_of(model), values_of(other), atol=0, rtol=0)


# --------------------------------------------------------------------------------------------- the gradients functions
def test_every_method_has_its_gradients():
    assert list(GRADIENTS) == list(METHODS)
    assert GRADIENTS["align"] is align_gradients and GRADIENTS["meta"] is metalora_gradients
    assert {GRADIENTS[method] for method in ("lora", "hydralora", "rlora", "mlora")} == {lora_gradients}


def test_aligns_gradient_is_that_of_both_losses(batch):
    """L_task + λ L_align, with an independent double loop over pairs of tasks; and the log has both, without λ."""
    config = config_for("align", align_weight=0.7)
    model = adapted(config)
    metrics = align_gradients(model, batch, config)
    loss, alignment = kl_loss(model, batch)
    expected = torch.autograd.grad(loss + 0.7 * alignment, list(adapter_parameters(model).values()))
    found = [parameter.grad for parameter in adapter_parameters(model).values()]
    torch.testing.assert_close(found, list(expected), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(metrics, {"loss": loss.detach(), "alignment": alignment.detach()})
    assert not any(number.requires_grad for number in metrics.values())


def test_the_kind_of_alignment_is_the_configs(batch):
    values = [align_gradients(adapted(config), batch, config)["alignment"]
              for config in (config_for("align", align=kind) for kind in ("kl", "mmd"))]
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("inner_steps", [0, 1, 3])
def test_metalora_leaves_the_adapter_and_the_mean_gradient(inner_steps):
    config, rounds = config_for("meta", inner_steps=inner_steps), batches_for("meta")[0]
    model = adapted(config)
    before = values_of(model)
    metrics = metalora_gradients(model, rounds, config)
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())
    found = [parameter.grad for parameter in adapter_parameters(model).values()]
    torch.testing.assert_close(found, list(plain_gradients(model, rounds, config)), atol=1e-6, rtol=1e-4)
    losses = []
    meta_gradients(model, rounds, config.inner_lr, inner_steps, losses)
    mean = [sum(column) / 2 for column in zip(*losses)]  # of the two tasks
    expected = {"loss": mean[-1]}
    if inner_steps:
        expected |= {"support_loss_before": mean[0], "support_loss_last": mean[inner_steps - 1]}
    torch.testing.assert_close(metrics, expected)
    assert not any(number.requires_grad for number in metrics.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_tells(method):
    _, numbers = trained(config_for(method, steps=1), batches_for(method))[1][0]
    more = {"align": {"alignment"}, "meta": {"support_loss_before", "support_loss_last"}}.get(method, set())
    assert set(numbers) == {"loss", "gradient_norm", "lr"} | more


def test_the_gradients_of_the_parts_of_a_batch_add_up(batch):
    """With `label_count`, the labels of the whole; so do their losses."""
    config = config_for("lora")
    whole, parts = adapted(config), adapted(config)
    loss = lora_gradients(whole, batch, config)["loss"]
    count = (batch["labels"] != -100).sum()
    batches = [{key: tensor[rows] for key, tensor in batch.items()} | {"label_count": count}
               for rows in ([3], [0, 4], [1, 2, 5])]
    losses = [lora_gradients(parts, part, config)["loss"] for part in batches]
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close([p.grad for p in adapter_parameters(parts).values()],
                               [p.grad for p in adapter_parameters(whole).values()], atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------- what else can be given
def test_batches_can_be_any_iterable():
    config, batches = config_for("lora"), batches_for("lora")
    expected = trained(config, batches)
    torch.testing.assert_close(trained(config, (batch for batch in batches)), expected, atol=0, rtol=0)
    more = itertools.chain(batches, itertools.repeat(None))  # no more are taken than there are steps
    torch.testing.assert_close(trained(config, more), expected, atol=0, rtol=0)


def test_other_parameters_can_be_trained_without_adapters():
    config, model = config_for("lora", lr=0.01), make_llama()
    wanted = {name: parameter for name, parameter in model.named_parameters() if "mlp" in name}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = make_batch()
    state = TrainState(model, itertools.repeat(batch), config, wanted)
    losses = [float(numbers["loss"]) for _, numbers in train(model, state, config)]
    assert state.parameters is wanted and losses[-1] < losses[0]
    assert losses[0] == pytest.approx(label_loss(make_llama(), batch).item())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in wanted)


def test_a_config_with_open_settings_is_filled_in():
    config = TrainConfig(method="align", steps=2, warmup=0.0, rank=3)
    model, seen = adapted(config), []

    def gradients(model, batch, config):
        seen.append(config.align_weight)
        return align_gradients(model, batch, config)
    state = TrainState(model, batches_for("align"), config)
    rates = [numbers["lr"] for _, numbers in train(model, state, config, gradients)]
    assert rates[0] == MINI_LR["align"] and seen == [0.2, 0.2]
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.0}


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="the model has no adapters to train"):
        TrainState(make_llama(), itertools.repeat(make_batch()), TrainConfig(method="lora"))
    for wrong in ({"method": "hydra"}, {"align": "cosine"}):
        with pytest.raises(ValueError, match="must be one of lora, hydralora, .* one of kl, mmd"):
            TrainState(make_llama(), itertools.repeat(make_batch()), TrainConfig(**wrong))
