"""MeTA-LoRA's two stages against the update written out with plain autograd."""

import copy

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters

from tinylora_mtl import AdapterConfig, adapter_parameters, add_adapters, meta_gradients
from tinylora_mtl.loss import label_loss
from tinylora_mtl.meta import adapted_to, gradients_of, inner_step

EPISODES = [(make_batch(seed=10 + t, tasks=(t,), each=3), make_batch(seed=20 + t, tasks=(t,), each=4))
            for t in range(3)]


def adapted(dropout=0.0):
    model = make_llama()
    add_adapters(model, AdapterConfig(rank=3, alpha=6, dropout=dropout))
    randomize_adapters(model)
    return model


def written_out(model, episodes, inner_lr, inner_steps):
    """θ_i on a deep copy of the model, by a plain torch.optim.SGD; the mean of the query gradients there."""
    sums = None
    for support, query in episodes:
        own = copy.deepcopy(model)
        parameters = list(adapter_parameters(own).values())
        sgd = torch.optim.SGD(parameters, lr=inner_lr)
        for _ in range(inner_steps):
            sgd.zero_grad()
            label_loss(own, support).backward()
            sgd.step()
        gradients = torch.autograd.grad(label_loss(own, query), parameters)
        sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients)]
    return {name: total / len(episodes) for name, total in zip(adapter_parameters(model), sums)}


@pytest.mark.parametrize("inner_steps", [0, 1, 3])
def test_gradient_is_the_mean_query_gradient_at_the_adapted_parameters(inner_steps):
    model = adapted()
    ours = meta_gradients(model, EPISODES, 0.5, inner_steps)
    torch.testing.assert_close(ours, written_out(model, EPISODES, 0.5, inner_steps), atol=1e-6, rtol=1e-4)
    shared = written_out(model, EPISODES, 0.5, 0)
    moved = max((ours[name] - shared[name]).abs().max() for name in ours)
    assert (moved > 1e-3) == (inner_steps > 0)  # at θ_i, not at θ


def test_no_inner_steps_is_ordinary_multi_task_training():
    model = adapted()
    loss = sum(label_loss(model, query) for _, query in EPISODES) / len(EPISODES)
    plain = torch.autograd.grad(loss, list(adapter_parameters(model).values()))
    ours = list(meta_gradients(model, EPISODES, 0.5, 0).values())
    torch.testing.assert_close(ours, list(plain), atol=1e-6, rtol=1e-4)


def test_the_shared_adapter_is_untouched():
    model = adapted(dropout=0.3).train()
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    label_loss(model, EPISODES[0][0]).backward()
    optimizer.step()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in parameters.items()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    base = {name: p.clone() for name, p in model.named_parameters()}
    meta_gradients(model, EPISODES, 0.5, 2, losses=[])
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, before[name][0]) and torch.equal(parameter.grad, before[name][1])
        assert parameter is parameters[name]
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, atol=0, rtol=0)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


def test_the_shared_adapter_is_restored_when_a_task_fails():
    model = adapted()
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    unlabelled = EPISODES[0][1] | {"labels": torch.full_like(EPISODES[0][1]["labels"], -100)}
    with pytest.raises(ValueError, match="no label is left"):
        meta_gradients(model, [(EPISODES[0][0], unlabelled)], 0.5, 2)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


@pytest.mark.parametrize("losses", [None, []])
def test_stage_one_leaves_the_random_state_alone(losses):
    """After any number of inner steps, and logged or not, the next random number is the same as after none."""
    next_numbers = []
    for inner_steps in (0, 1, 4):
        model = adapted(dropout=0.3).train()
        torch.manual_seed(7)
        meta_gradients(model, EPISODES, 0.1, inner_steps, None if inner_steps == 0 else losses)
        next_numbers.append(torch.rand(3))
    assert torch.equal(next_numbers[0], next_numbers[1]) and torch.equal(next_numbers[0], next_numbers[2])


def test_dropout_draws_new_masks_in_the_inner_steps():
    model = adapted(dropout=0.5).train()
    masks = []
    model.model.layers[0].mlp.up_proj.lora_A.register_forward_hook(lambda m, i, o: masks.append(i[0] == 0))
    with adapted_to(model, EPISODES[0][0], 0.1, 2):
        pass
    assert not torch.equal(masks[0], masks[1])


def test_logged_losses_are_those_before_each_inner_step_and_of_the_query():
    model, losses = adapted(), []
    meta_gradients(model, EPISODES, 0.5, 3, losses)
    assert len(losses) == len(EPISODES)
    for (support, query), (*support_losses, query_loss) in zip(EPISODES, losses):
        for inner_steps, before in enumerate(support_losses):  # that were taken before
            with adapted_to(model, support, 0.5, inner_steps):
                assert before.item() == pytest.approx(label_loss(model, support).item())
        with adapted_to(model, support, 0.5, 3) as yielded:
            assert query_loss.item() == pytest.approx(label_loss(model, query).item())
            assert label_loss(model, support) < support_losses[2] < support_losses[1] < support_losses[0]
        torch.testing.assert_close(yielded, support_losses)
        assert not any(loss.requires_grad for loss in [*support_losses, query_loss])
    meta_gradients(model, EPISODES, 0.5, 0, losses)
    assert [len(row) for row in losses] == [4, 4, 4, 1, 1, 1]  # added to the list; without inner steps the query's only


def test_the_inner_step_is_plain_gradient_descent():
    parameters = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    gradients = [torch.tensor([0.5, -1.0]), torch.tensor([[2.0]])]
    inner_step(parameters, gradients, 0.1)
    torch.testing.assert_close(parameters, [torch.tensor([0.95, 2.1]), torch.tensor([[2.8]])])


def test_a_parameter_that_the_loss_does_not_reach_has_a_gradient_of_zero():
    used, unused = (torch.tensor([2.0, 3.0], requires_grad=True) for _ in range(2))
    gradients = gradients_of(used.square().sum(), {"used": used, "unused": unused})
    torch.testing.assert_close(gradients, (torch.tensor([4.0, 6.0]), torch.zeros(2)))


def test_memory_does_not_grow_with_tasks_or_inner_steps():
    """What autograd keeps alive at once, counted at every packing of a tensor for backward."""
    def peak(episodes, inner_steps):
        import gc
        import weakref
        alive, most = weakref.WeakSet(), [0]

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor
                alive.add(self)
                most[0] = max(most[0], len(alive))
        gc.collect()
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            meta_gradients(adapted(), episodes, 0.1, inner_steps)
        return most[0]
    assert peak(EPISODES, 8) <= peak(EPISODES[:1], 1) * 1.05
