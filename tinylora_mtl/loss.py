"""The training loss: cross-entropy on the answers' tokens.

A batch is a dict of CPU tensors: `input_ids`, `attention_mask` (1 for a real token) and `labels` (-100 where there is
none), all [batch, length] and padded on the left, and `task_ids` [batch]. If it is a part of a larger batch,
`label_count` says how many labels that one has.
"""

import inspect

import torch
import torch.nn.functional as F

from .targets import unwrap

NO_LABEL = -100


def label_loss(model, batch):
    """Cross-entropy in float32, summed over the labels of a batch and divided by their number -> a scalar.

    Where the batch has a `label_count`, that is what the sum is divided by, so that the losses of the parts of a batch
    add up to its own. Raises ValueError for a batch without labels.
    """
    logits, labels = label_logits(model, batch)
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
    return total / batch.get("label_count", (labels != NO_LABEL).sum())


def label_logits(model, batch):
    """(logits [batch, k, vocabulary], labels [batch, k]): the last k columns, from the first one with a label.

    Both are on the model's device. Logits are computed for those columns only, where the model can: the prompts' ones,
    most of them, would be thrown away. Raises ValueError if no label is left in the batch.
    """
    labelled = (batch["labels"][:, 1:] != NO_LABEL).any(0).nonzero()  # [columns, 1]; nothing predicts column 0
    if len(labelled) == 0:
        raise ValueError("no label is left in the batch: every target was cut away or masked")
    k = batch["labels"].shape[1] - 1 - int(labelled[0])
    device = next(model.parameters()).device
    ids, mask, labels = (to_device(batch[key], device) for key in ("input_ids", "attention_mask", "labels"))
    logits = forward(model, ids, mask, k + 1).logits  # [batch, k + 1, vocabulary]
    return logits[:, -k - 1:-1], labels[:, -k:]  # the logits at a position predict the next token


def forward(model, input_ids, attention_mask, keep, **options):
    """The model's output for ids [batch, new], with logits for the last `keep` columns only, where it can do that.

    attention_mask [batch, length]: length > new where a cache in `options` holds the tokens before.
    """
    takes = inspect.signature(unwrap(model).forward).parameters
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # from the first real token: left padding changes nothing
    new = input_ids.shape[1]
    # As indices, not as a number: the model then takes a copy of these columns; a view across the rows would be
    # multiplied by the output head (and in bfloat16 copied) row by row.
    columns = torch.arange(max(0, new - keep), new, device=input_ids.device)
    more = {"position_ids": positions[:, -new:], "logits_to_keep": columns}
    more = {name: value for name, value in more.items() if name in takes}
    return model(input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False} | more | options)


def to_device(tensor, device):
    """A CPU tensor on the model's device. A GPU fetches it by itself, from pinned memory, and nobody waits for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
