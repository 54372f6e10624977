"""The training loop: python -m tinylora_mtl.train --method align

Without any flag: Align-LoRA on the embedded model and its eight tasks, on a CPU, without a network, in a minute or
two. The same command with --method lora, hydralora, rlora, mlora or meta trains the other methods.
Read `train`, then the gradients function of a method; the layers are in `lora.py` and `multihead.py`, and `adapters.py`
puts them into a model. All around them (the command line, the log, checkpoints, steps passed over, accumulation,
several processes) is in `run/`, and can be passed by.
"""

import math

import torch

from .adapters import adapter_parameters
from .align import alignment_loss, collect_features
from .config import resolve
from .loss import label_loss
from .meta import meta_gradients


class TrainState:
    """All that changes while a run trains. Whoever saves it, and puts it back, goes on with the run.

    batches: an endless iterator of batches (of rounds, for MeTA-LoRA); parameters: {name: Parameter} to train, None:
    the adapters'. Raises ValueError if there are none.
    """

    def __init__(self, model, batches, config, parameters=None):
        config = resolve(config)
        self.step, self.batches = 0, iter(batches)
        self.parameters = parameters or adapter_parameters(model)  # A and B, or A, the heads and the router
        if not self.parameters:
            raise ValueError("the model has no adapters to train; add_adapters puts them in")
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, weight_decay=0.0)
        self.schedule = cosine_schedule(self.optimizer, round(config.warmup * config.steps), config.steps)


def train(model, state, config, gradients=None):
    """Train from the step where `state` stands to the last; yields (step, metrics) after each one.

    A generator: logging, checkpoints and stopping are the caller's, between two steps. Called again with the same
    state it goes on. gradients(model, batch, config) leaves a step's gradients in `.grad` and returns metrics; None:
    the method's, of a whole batch at once. Raises FloatingPointError for a gradient that is not finite: then only the
    step's number and the batches have moved on.
    """
    config = resolve(config)
    gradients = gradients or GRADIENTS[config.method]
    model.train()
    while state.step < config.steps:
        state.step += 1
        state.optimizer.zero_grad()
        metrics = gradients(model, next(state.batches), config)
        norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), config.clip)
        if not torch.isfinite(norm):  # no step must be taken to NaN; here, and only here, a step waits for the device
            raise FloatingPointError(f"the gradient is not finite at step {state.step}, the loss {metrics['loss']:g}")
        lr = state.schedule.get_last_lr()[0]
        state.optimizer.step()
        state.schedule.step()
        yield state.step, metrics | {"gradient_norm": norm, "lr": lr}
    model.eval()


def lora_gradients(model, batch, config):
    """L = L_task: LoRA, HydraLoRA, R-LoRA and M-LoRA, which differ in their layers only (`multihead.py`)."""
    loss = label_loss(model, batch)
    loss.backward()
    return {"loss": loss.detach()}


def align_gradients(model, batch, config, align=None):
    """[ex9] Align-LoRA: L = L_task + λ · L_align, λ = `config.align_weight`, on z = A x of the same forward pass.

    L_align: `alignment_loss` of form `config.align`, or `align`. -> {"loss": L_task, "alignment": L_align}, detached.
    """
    with collect_features(model) as features:
        loss = label_loss(model, batch)
    alignment = (align or alignment_loss)(features, batch, config.align)
    (loss + config.align_weight * alignment).backward()
    return {"loss": loss.detach(), "alignment": alignment.detach()}


def metalora_gradients(model, episodes, config):
    """MeTA-LoRA: both stages of a round; the gradient is taken at each θ_i and put into `.grad` of the shared θ."""
    losses = []  # a row for each task
    gradients = meta_gradients(model, episodes, config.inner_lr, config.inner_steps, losses)
    for name, parameter in adapter_parameters(model).items():
        parameter.grad = gradients[name]
    *support, query = torch.stack([torch.stack(row) for row in losses]).mean(0)  # [n, k + 1] -> k + 1 means
    return {"loss": query} | ({"support_loss_before": support[0], "support_loss_last": support[-1]} if support else {})


GRADIENTS = dict.fromkeys(("lora", "hydralora", "rlora", "mlora"), lora_gradients) | {
    "align": align_gradients, "meta": metalora_gradients}


def cosine_schedule(optimizer, warmup, steps):
    """The learning rate rises linearly for `warmup` steps, then falls as half a cosine to 0 after all `steps`."""
    def share(step):  # of the peak, for the steps 0, 1, 2, …
        if step < warmup:
            return (step + 1) / (warmup + 1)  # above 0 from the first step on
        return 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup))))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


if __name__ == "__main__":
    from .run.training import main
    main()
