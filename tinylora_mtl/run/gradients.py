"""The gradients functions of `train.py` once more: a step in micro-batches, or shared by several processes.

They work because a batch carries `label_count`, the labels of the whole step: the gradients of its parts add up. But
for dropout and for the random tokens of MMD, the gradient is the same in any number of parts.
"""

import torch

from ..align import alignment, collect_features, real_tokens
from ..loss import NO_LABEL, label_logits, label_loss
from ..meta import fork_rng
from ..train import GRADIENTS, align_gradients
from .distributed import gather_features, same_random_numbers, share, sum_over_processes, world_size


def gradients_for(config):
    """The gradients function of a run: its method's, wrapped as accumulation, processes and shuffled groups need it."""
    gradients = GRADIENTS[config.method]
    if config.method == "align" and config.accumulation > 1:
        gradients = align_in_micro_batches
    elif config.method == "align" and world_size() > 1:
        gradients = align_across_processes
    elif config.accumulation > 1 and config.method != "meta":
        gradients = in_micro_batches(gradients)
    if world_size() > 1:
        gradients = across_processes(gradients, mean=config.method == "meta")
    return shuffled_groups(gradients) if config.shuffle_groups else gradients


def with_label_count(batch):
    """The batch, with the number of its labels in it."""
    return {"label_count": (batch["labels"][:, 1:] != NO_LABEL).sum()} | batch  # as `label_logits`: not column 0


def micro_batches(batch, count):
    """The batch in `count` batches of (nearly) equal size, each with the `label_count` of the whole.

    Samples of like length come together, and each part loses the columns that are padding in all of its rows.
    """
    batch, parts = with_label_count(batch), []
    for rows in batch["attention_mask"].sum(1).argsort(stable=True).tensor_split(count):  # the shortest first
        length = int(batch["attention_mask"][rows].sum(1).max())
        parts.append({key: tensor[rows][:, -length:] if tensor.dim() == 2 else tensor[rows] if tensor.dim() else tensor
                      for key, tensor in batch.items()})
    return parts


def in_micro_batches(gradients):
    """Gradient accumulation: a step computed in `config.accumulation` parts, one after another."""
    def step(model, batch, config):
        logs = [gradients(model, part, config) for part in micro_batches(batch, config.accumulation)]
        return {name: sum(log[name] for log in logs) for name in logs[0]}
    return step


def across_processes(gradients, mean):
    """The same step on this process's share; gradients and metrics are then summed over all, or averaged."""
    def step(model, batch, config):
        metrics = gradients(model, share(batch if mean else with_label_count(batch)), config)
        exchanged = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        exchanged += [value for name, value in metrics.items() if name != "alignment"]  # which is the whole's already
        sum_over_processes(exchanged)
        for tensor in exchanged if mean else ():
            tensor /= world_size()
        return metrics
    return step


def shuffled_groups(gradients):
    """A control for Align-LoRA: as many samples in each group as before, but of any task."""
    def step(model, batch, config):
        with same_random_numbers(torch.device("cpu")):
            order = torch.randperm(len(batch["task_ids"]))
        return gradients(model, batch | {"task_ids": batch["task_ids"][order]}, config)
    return step


def align_across_processes(model, batch, config):
    """Align-LoRA's step with the features of all processes."""
    return align_gradients(model, batch, config, lambda features, batch, kind: alignment_of_all(
        *real_tokens(features, batch), kind))


def align_in_micro_batches(model, batch, config):
    """Align-LoRA's step in parts. The statistics are the whole batch's, so dL_align/dz is found first, without a graph.

    The random numbers of that pass are drawn aside, so that the pass that trains has the same dropout masks.
    """
    parts, seen = micro_batches(batch, config.accumulation), []
    seed = int(torch.randint(2 ** 62, ()))  # not drawn aside: MMD is to take other tokens in every step
    with fork_rng(model):
        for part in parts:
            with torch.no_grad(), collect_features(model) as features:
                label_logits(model, part)
                seen.append(real_tokens(features, part))
        z, owner = torch.cat([z for z, _ in seen]).requires_grad_(), torch.cat([owner for _, owner in seen])
        torch.manual_seed(seed)
        value = alignment_of_all(z, owner, config.align)
        gradient, = torch.autograd.grad(value, z)
    metrics = {"loss": torch.zeros((), device=z.device), "alignment": value.detach()}
    for part, part_gradient in zip(parts, gradient.split([len(z) for z, _ in seen])):
        with collect_features(model) as features:
            loss = label_loss(model, part)
        z, _ = real_tokens(features, part)
        (loss + config.align_weight * (z * part_gradient).sum()).backward()  # Σ z · dL/dz has the gradient of L_align
        metrics["loss"] += loss.detach()
    return metrics


def alignment_of_all(z, owner, kind):
    """The alignment of the features of all processes, the same number in each, with a gradient on its own features."""
    with same_random_numbers(z.device):  # for the tokens that MMD takes
        return alignment(*gather_features(z, owner), kind)
