"""From (prompt, target) samples to batches, and from a batch to its loss.

A batch is a dict of tensors: `input_ids`, `attention_mask` (1 for a real token), `labels` (-100 where there is no
target), all [batch, length] and padded on the left, and `task_ids` [batch]. It stays on the CPU, where it can be
counted, split and trimmed at once: to look at a number on a GPU is to wait until all that was asked of it is done. Only
what the model computes with is sent to the model's device, by `send`.
"""

import copy
import inspect
import random

import torch
import torch.nn.functional as F

NO_LABEL = -100


def encode_prompt(tokenizer, prompt, max_length):
    """Token ids of a prompt, cut from the left to `max_length`: what stands nearest to the answer is kept.

    Tokens that the tokenizer puts before every text are kept too; an end token after it is not, for the text goes on.
    """
    whole = tokenizer(prompt)["input_ids"]
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = whole[:next((i for i in range(len(whole)) if whole[i:i + len(plain)] == plain), 0)]
    return start + plain[max(0, len(plain) + len(start) - max_length):]


def encode_target(tokenizer, target):
    """Token ids of a target: a space, the answer, the end token.

    As they are after a colon, where most prompts end: some tokenizers put a space of their own before a text.
    """
    colon = tokenizer(":", add_special_tokens=False)["input_ids"]
    ids = tokenizer(f": {target}", add_special_tokens=False)["input_ids"]
    if ids[:len(colon)] == colon:
        return ids[len(colon):] + [tokenizer.eos_token_id]
    return tokenizer(f" {target}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def encode(tokenizer, sample, max_length=512):
    """(input_ids, labels), two lists of one length: prompt and target, with labels on the target only.

    The prompt is cut from the left where both together would pass `max_length`; the target never is. Raises
    ValueError for an empty prompt or target, and for a target that leaves no room for its prompt.
    """
    prompt, target = sample
    answer = encode_target(tokenizer, target)
    if not target.strip() or len(answer) >= max_length:
        problem = f"a target of {len(answer)} tokens, max length {max_length}" if target.strip() else "an empty target"
        raise ValueError(f"{problem}: {prompt[-60:]!r}")
    question = encode_prompt(tokenizer, prompt, max_length - len(answer))
    if not question:
        raise ValueError(f"an empty prompt, before the target {target!r}")
    return question + answer, [NO_LABEL] * len(question) + answer


def collate(rows, task_ids, pad_id):
    """A batch of `encode`d rows, padded on the left so that every answer ends at the last column."""
    length = max(len(ids) for ids, _ in rows)

    def padded(lists, filler):
        return torch.tensor([[filler] * (length - len(values)) + values for values in lists])

    return {"input_ids": padded([ids for ids, _ in rows], pad_id),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": padded([labels for _, labels in rows], NO_LABEL),
            "task_ids": torch.tensor(task_ids)}


def send(tensor, device):
    """A CPU tensor on the model's device. A GPU fetches it by itself, from pinned memory, and nobody waits for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class BalancedBatches:
    """An endless draw of training batches with the same number of samples of every task.

    Each task is shuffled and gone through by itself, and shuffled anew when it is used up. So a small task is
    repeated more often than a large one, every sample of a task is seen equally often, and an epoch is a notion of
    a task, not of the whole. A batch has batch_size // (number of tasks) samples each.

    Length plays no part in the draw; samples of like length meet only in the pieces of a batch (`split_batch`). Batches
    of short samples and batches of long ones would pull the adapter to and fro: on the embedded tasks that cost LoRA
    1.5 points (9 seeds, 95 % interval 0.4 to 2.7).
    """

    def __init__(self, tasks, tokenizer, max_length, seed):
        self.rows = [[encode(tokenizer, sample, max_length) for sample in task.train] for task in tasks]
        self.pad_id = tokenizer.pad_token_id
        self.rng = random.Random(seed)
        self.waiting = [[] for _ in tasks]  # per task: the indices that this pass has not used yet

    def state(self):
        """Where the draw stands, for `set_state` of another of the same tasks, which then goes on alike."""
        return {"rng": self.rng.getstate(), "waiting": copy.deepcopy(self.waiting)}

    def set_state(self, state):
        """Go on from where `state()` was taken."""
        self.rng.setstate(state["rng"])
        self.waiting = copy.deepcopy(state["waiting"])

    def draw(self, task_id, count):
        """Indices of `count` rows of a task, different ones as long as the task has that many."""
        indices = []
        while len(indices) < count:
            if not self.waiting[task_id]:
                shuffled = self.rng.sample(range(len(self.rows[task_id])), len(self.rows[task_id]))
                # `pop` takes from the end: those drawn already come first in the list, and so are taken last
                self.waiting[task_id] = sorted(shuffled, key=lambda index: index not in indices)
            indices.append(self.waiting[task_id].pop())
        return indices

    def balanced(self, batch_size):
        """A batch of all tasks."""
        each = batch_size // len(self.rows)
        drawn = [(task_id, index) for task_id in range(len(self.rows)) for index in self.draw(task_id, each)]
        rows = [self.rows[task_id][index] for task_id, index in drawn]
        return collate(rows, [task_id for task_id, _ in drawn], self.pad_id)

    def episodes(self, count, support, query):
        """MeTA-LoRA's round: for each of `count` sampled tasks a support and a query batch without a common sample."""
        result = []
        for task_id in self.rng.sample(range(len(self.rows)), count):
            rows = self.rng.sample(self.rows[task_id], support + query)
            result.append(tuple(collate(part, [task_id] * len(part), self.pad_id)
                                for part in (rows[:support], rows[support:])))
        return result


def label_logits(model, batch):
    """(logits [batch, k, vocabulary], labels [batch, k]): the last k columns, from the first one with a label.

    Both are on the model's device. Logits are computed for those columns only: the prompts' ones, most of them, would
    be thrown away. Raises ValueError if no label is left in the batch (a loss of NaN or 0 would go unnoticed).
    """
    labelled = (batch["labels"] != NO_LABEL).any(0).nonzero()  # [columns, 1]
    if len(labelled) == 0:
        raise ValueError("no label is left in the batch: every target was cut away or masked")
    k = batch["labels"].shape[1] - max(int(labelled[0]), 1)  # nothing predicts column 0
    device = next(model.parameters()).device
    ids, mask, labels = (send(batch[key], device) for key in ("input_ids", "attention_mask", "labels"))
    logits = forward(model, ids, mask, k + 1).logits  # [batch, k + 1, vocabulary]
    return logits[:, -k - 1:-1], labels[:, -k:]  # the logits at a position predict the next token


def forward(model, input_ids, attention_mask, keep, use_cache=False, cache=None):
    """The model's output for ids [batch, new], with logits for the last `keep` columns only, where it can do that.

    attention_mask [batch, length] covers the tokens in the cache too, if there is one: length >= new.
    """
    takes = inspect.signature(bare(model).forward).parameters
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # from the first real token: left padding changes nothing
    new = input_ids.shape[1]
    # As indices, not as a number: the model then takes a copy of these columns, not a view across the rows, for which
    # the output head would be multiplied (and in bfloat16 copied) once for every row of the batch.
    columns = torch.arange(max(0, new - keep), new, device=input_ids.device)
    options = {"position_ids": positions[:, -new:], "logits_to_keep": columns}
    options = {name: value for name, value in options.items() if name in takes}
    if cache is not None:
        options["cache" if "cache" in takes else "past_key_values"] = cache  # its newer and its older name
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **options)


def bare(model):
    """The model itself, out of the wrappers of DistributedDataParallel and torch.compile, if it is in them."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def random_aside(model):
    """Within the block random numbers are drawn aside: those after it are as if there had been none."""
    device = next(model.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def label_loss(model, batch, count=None):
    """Cross-entropy in float32, summed over the labels of a batch and divided by their number -> a scalar.

    count: divide by this instead, the number of labels of the whole step when the batch is a piece of one.
    """
    logits, labels = label_logits(model, batch)
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
    return total / ((labels != NO_LABEL).sum() if count is None else count)


def split_batch(batch, pieces):
    """The batch in `pieces` batches of (nearly) equal size, for gradient accumulation.

    Samples of like length come together and each piece loses the columns that are padding in all of its rows: the
    same tokens and labels as in one piece, and less padding.
    """
    order = batch["attention_mask"].sum(1).argsort(stable=True)  # [batch], the shortest first
    parts = {key: tensor[order].tensor_split(pieces) for key, tensor in batch.items()}
    return [trim({key: part[i] for key, part in parts.items()}) for i in range(pieces)]


def trim(batch):
    """The batch without the columns that are padding in every row."""
    length = int(batch["attention_mask"].sum(1).max())
    return {key: tensor[:, -length:] if tensor.dim() == 2 else tensor for key, tensor in batch.items()}
