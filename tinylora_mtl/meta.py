r"""MeTA-LoRA: two stages, repeated. Few samples per task, and an adapter that is quick to adapt.

Changes from LoRA: the layers are the same; a training step becomes a round. For each of n sampled tasks, a support
set S_i and a query set Q_i are drawn, disjoint, from its few training samples, and then

    stage 1:  θ_i ← θ;   k times:  θ_i ← θ_i - α ∇ L(S_i; θ_i)
    stage 2:  g ← mean_i ∇ L(Q_i; θ_i)      taken at θ_i, applied to θ (first order);     θ ← Optimiser_β(θ, g)

θ is the shared LoRA {A, B}; α (`inner_lr`) and β (`lr`) are learning rates. With k = 0 this is ordinary multi-task
training, in which each task counts the same, however long its answers are.

Sources: MeTA-LoRA, arXiv 2510.11598; the first-order form is MAML's, arXiv 1703.03400, section 5.2. The sizes (k, α, β,
n, |S|, |Q|) are not known from the sources: the defaults in `config.py` are this project's choice.
"""

from contextlib import contextmanager

import torch

from .adapters import adapter_parameters
from .loss import label_loss


def meta_gradients(model, episodes, inner_lr, inner_steps, losses=None):
    """[ex8] Both stages for one round: the gradient g that the outer optimiser is to apply to the shared adapter.

    Args:
        model: a model with adapters, at θ: A [r, d_in] and B [d_out, r] of each layer.
        episodes: [(support_batch, query_batch), ...], one pair for each of the n tasks.
        inner_lr: α, the step size of the plain gradient descent of stage 1.
        inner_steps: k, how many of those steps; 0 gives the plain multi-task gradient over the query sets.
        losses: a list, if given, to which each task's [L(S_i) before each inner step ..., L(Q_i; θ_i)] is added.

    Stage 1 is `adapted_to`; all of stage 2 is within its block, `gradients_of` included. -> {parameter name: g, of its
    shape}. Every parameter is as it was, no `.grad` is touched, and the random state is as if there had been only stage
    2. Tasks come one after another and no step is differentiated through, so memory does not grow with n or k.
    ValueError for a batch without labels, and the adapter is θ again then too.
    Source: arXiv 2510.11598, with the first-order gradient of arXiv 1703.03400, section 5.2.
    """
    parameters = adapter_parameters(model)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for support, query in episodes:
        with adapted_to(model, support, inner_lr, inner_steps) as support_losses:
            loss = label_loss(model, query)  # a forward pass at θ_i
            for g, gradient in zip(total.values(), gradients_of(loss, parameters)):
                g += gradient / len(episodes)  # g ← mean_i ∇ L(Q_i; θ_i)
        if losses is not None:
            losses.append([*support_losses, loss.detach()])
    return total


@contextmanager
def adapted_to(model, support, inner_lr, inner_steps):
    """[ex8] Stage 1: within the block the adapter is θ_i, adapted to a support batch; then θ again, whatever happened.

    Yields [L(S_i; θ_i) before each of the k steps], detached. The steps alone draw random numbers (dropout) aside.
    """
    parameters = adapter_parameters(model)
    shared = [parameter.detach().clone() for parameter in parameters.values()]  # θ
    losses = []
    try:
        with fork_rng(model):
            for _ in range(inner_steps):
                loss = label_loss(model, support)
                inner_step(parameters.values(), gradients_of(loss, parameters), inner_lr)
                losses.append(loss.detach())
        yield losses
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), shared):
                parameter.copy_(value)


@torch.no_grad()
def inner_step(parameters, gradients, inner_lr):
    """[ex7] θ_i ← θ_i - α ∇ L(S_i; θ_i), for two iterables, in place: plain gradient descent, no state."""
    for parameter, gradient in zip(parameters, gradients):
        parameter -= inner_lr * gradient


def gradients_of(loss, parameters):
    """∇ loss for {name: parameter}, in that order; zeros for a parameter that the loss does not reach."""
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)


def fork_rng(model):
    """Within the block random numbers are drawn aside (on CPU and CUDA): those after it do not notice."""
    device = next(model.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
