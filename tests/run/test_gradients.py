"""A step in micro-batches has the gradient of the step in one piece, for every method; and the shuffled groups."""

from collections import Counter

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters

from tinylora_mtl import adapter_parameters, add_adapters
from tinylora_mtl.config import METHODS, TrainConfig, adapter_config
from tinylora_mtl.run import gradients as module
from tinylora_mtl.run.gradients import gradients_for, micro_batches, with_label_count
from tinylora_mtl.train import align_gradients

MULTITASK = [(method, "kl") for method in METHODS if method != "meta"] + [("align", "mmd")]


def config_for(method="align", kind="kl", weight=0.5, **changes):
    return TrainConfig(**{"method": method, "rank": 3, "alpha": 6, "dropout": 0.0, "align": kind,
                          "align_weight": weight} | changes)


def adapted(config, **changes):
    model = make_llama(**changes)
    add_adapters(model, adapter_config(config))
    randomize_adapters(model)
    return model.train()


def step_gradients(batch, config, checkpointing=False):
    model = adapted(config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    metrics = gradients_for(config)(model, batch, config)
    return metrics, {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("method,kind", MULTITASK)
@pytest.mark.parametrize("accumulation,checkpointing", [(2, False), (5, False), (3, True)])
def test_accumulation_and_checkpointing_change_nothing(batch, method, kind, accumulation, checkpointing):
    plain = step_gradients(batch, config_for(method, kind))
    parts = step_gradients(batch, config_for(method, kind, accumulation=accumulation), checkpointing)
    torch.testing.assert_close(parts[1], plain[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(parts[0], plain[0], atol=1e-5, rtol=1e-5)
    if method == "align":  # the term does something
        unaligned = step_gradients(batch, config_for(method, kind, weight=0.0, accumulation=accumulation))[1]
        assert max((plain[1][name] - unaligned[name]).abs().max() for name in unaligned) > 1e-3


def test_micro_batches_hold_the_same_tokens_with_less_padding():
    lengths = (33, 5, 31, 8, 12, 6)
    ids = torch.randint(3, 50, (6, 40))
    mask = torch.tensor([[0] * (40 - length) + [1] * length for length in lengths])
    labels = torch.where(torch.arange(40) >= 36, ids, -100)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels,
             "task_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    parts = micro_batches(batch, 3)
    assert [part["input_ids"].shape for part in parts] == [(2, 6), (2, 12), (2, 33)]
    assert {int(part["label_count"]) for part in parts} == {24}

    def tokens(parts):
        return Counter((tuple(ids[mask.bool()].tolist()), tuple(labels[mask.bool()].tolist()), int(task_id))
                       for part in parts for ids, mask, labels, task_id in
                       zip(part["input_ids"], part["attention_mask"], part["labels"], part["task_ids"]))
    assert tokens(parts) == tokens([batch])


def test_a_label_count_that_is_there_stays(batch):
    """It is of the whole step, of which this may be one process's share."""
    given = batch | {"label_count": torch.tensor(99)}
    assert with_label_count(given)["label_count"] == 99
    assert {int(part["label_count"]) for part in micro_batches(given, 2)} == {99}


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_the_collecting_pass_sees_the_dropout_masks_of_the_training_pass(kind):
    """With dropout, the features that the alignment was computed on are the ones that train."""
    config = config_for(kind=kind, accumulation=3, dropout=0.5)
    model, seen = adapted(config), {True: [], False: []}  # with and without a graph
    model.model.layers[0].mlp.up_proj.lora_A.register_forward_hook(
        lambda module, inputs, output: seen[torch.is_grad_enabled()].append(output.detach()))
    gradients_for(config)(model, make_batch(each=12), config)  # more tokens than MMD_TOKENS a task
    assert len(seen[True]) == len(seen[False]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False]))
    assert not torch.equal(seen[True][0] == 0, seen[True][1] == 0)


def test_features_without_a_gradient_are_noticed(batch):
    config = config_for(accumulation=2)
    model = adapted(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()  # without which nothing at all would train
    with pytest.raises(ValueError, match="no gradient"):
        gradients_for(config)(model, batch, config)


def test_mmd_takes_other_tokens_in_every_step(monkeypatch):
    taken = []

    def watch(*arguments, original=torch.randperm, **options):
        taken.append(original(*arguments, **options))
        return taken[-1]
    monkeypatch.setattr(torch, "randperm", watch)
    config = config_for(kind="mmd", accumulation=2)
    model, batch = adapted(config), make_batch(each=12)
    torch.manual_seed(0)
    for _ in range(2):
        gradients_for(config)(model, batch, config)
    first, second = taken[:len(taken) // 2], taken[len(taken) // 2:]
    assert len(first) == 3 and not any(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("method,kind", MULTITASK)
def test_accumulation_looks_at_no_number_on_the_device(method, kind):
    """As in tests/core/test_no_waiting.py."""
    config = config_for(method, kind, accumulation=3, dropout=0.1)
    model = make_llama(attn_implementation="eager").to("meta")
    add_adapters(model, adapter_config(config))
    metrics = gradients_for(config)(model.train(), make_batch(each=30), config)
    assert all(number.device.type == "meta" for number in metrics.values())
    assert all(parameter.grad.device.type == "meta" for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_shuffled_groups_have_the_sizes_of_the_tasks_and_other_members(monkeypatch, batch, accumulation):
    """Drawn anew in every step; the samples themselves, and so the loss, are the same."""
    seen = []

    def watch(model, batch, config, original=align_gradients):
        seen.append(batch)
        return original(model, batch, config)
    monkeypatch.setitem(module.GRADIENTS, "align", watch)
    monkeypatch.setattr(module, "align_in_micro_batches", watch)
    config = config_for(accumulation=accumulation, shuffle_groups=True)
    model = adapted(config)
    for _ in range(3):
        gradients_for(config)(model, batch, config)
    groups = [part["task_ids"].tolist() for part in seen]
    assert all(sorted(group) == batch["task_ids"].tolist() != group for group in groups)
    assert len({tuple(group) for group in groups}) == 3
    assert all(part[key] is batch[key] for part in seen for key in ("input_ids", "attention_mask", "labels"))
