"""From (prompt, target) samples to batches: iterators that never end. `loss.py` says what a batch is."""

import random

import torch

from .loss import NO_LABEL


def encode(tokenizer, sample, max_length=512):
    """(input_ids, labels), two lists of one length: prompt and target, with labels on the target only.

    The prompt is cut from the left where both together would pass `max_length`; the target never is. ValueError for a
    prompt without tokens, an empty target, and a target that leaves no room for its prompt.
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


def encode_prompt(tokenizer, prompt, max_length):
    """Token ids of a prompt, cut from the left to `max_length`: what stands nearest to the answer is kept.

    Tokens that the tokenizer puts before every text are kept too, once if the prompt has them already (as a chat
    template's does); an end token after it is not, for the text goes on.
    """
    whole = tokenizer(prompt)["input_ids"]
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = whole[:next((i for i in range(len(whole)) if whole[i:i + len(plain)] == plain), 0)]
    plain = plain[len(start):] if plain[:len(start)] == start else plain
    return start + plain[max(0, len(plain) + len(start) - max_length):]


def encode_target(tokenizer, target):
    """Token ids of a target: a space, the answer, the end token; as they are after a colon, where most prompts end."""
    colon, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (":", f": {target}"))
    if ids[:len(colon)] == colon:  # so that a space which some tokenizers put before every text is not in the answer
        return ids[len(colon):] + [tokenizer.eos_token_id]
    return tokenizer(f" {target}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def collate(rows, task_ids, pad_id):
    """A batch of `encode`d rows, padded on the left so that every answer ends at the last column."""
    length = max(len(ids) for ids, _ in rows)

    def padded(lists, filler):
        return torch.tensor([[filler] * (length - len(values)) + values for values in lists])  # [batch, length]

    return {"input_ids": padded([ids for ids, _ in rows], pad_id),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": padded([labels for _, labels in rows], NO_LABEL),
            "task_ids": torch.tensor(task_ids)}


class BalancedBatches:
    """Training batches with the same number of samples of every task: batch_size // (number of tasks).

    Each task is shuffled and gone through by itself, and shuffled anew when it is used up. So a small task is
    repeated more often than a large one, every sample of a task is seen equally often, and an epoch is a notion of a
    task. Length plays no part in the draw: batches of short samples and of long ones would pull to and fro.

    tasks: objects with a `train` list of (prompt, target). ValueError if a batch cannot hold all, and as `encode`.
    """

    def __init__(self, tasks, tokenizer, batch_size, max_length=512, seed=0):
        if batch_size < len(tasks) or not tasks or not all(task.train for task in tasks):
            raise ValueError(f"a batch of {batch_size} samples cannot hold {len(tasks)} tasks, or one has no samples")
        self.rows = [[encode(tokenizer, sample, max_length) for sample in task.train] for task in tasks]
        self.pad_id, self.each = tokenizer.pad_token_id, batch_size // len(tasks)
        self.rng = random.Random(seed)
        self.waiting = [[] for _ in tasks]  # per task: the indices that this pass has not used yet

    def __iter__(self):
        return self

    def __next__(self):
        task_ids = [task_id for task_id in range(len(self.rows)) for _ in range(self.each)]
        rows = [row for task_id in range(len(self.rows)) for row in self.draw(task_id, self.each)]
        return collate(rows, task_ids, self.pad_id)

    def draw(self, task_id, count):
        """`count` rows of a task, different ones as long as the task has that many."""
        indices = []
        while len(indices) < count:
            if not self.waiting[task_id]:
                shuffled = self.rng.sample(range(len(self.rows[task_id])), len(self.rows[task_id]))
                # `pop` takes from the end: those drawn already come first in the list, and so are taken last
                self.waiting[task_id] = sorted(shuffled, key=lambda index: index not in indices)
            indices.append(self.waiting[task_id].pop())
        return [self.rows[task_id][index] for index in indices]


class Episodes(BalancedBatches):
    """MeTA-LoRA's rounds: lists of (support batch, query batch), one for each of `tasks_per_round` sampled tasks.

    A task's support and query set have no sample in common; ValueError for a task with too few samples for both.
    """

    def __init__(self, tasks, tokenizer, tasks_per_round, support, query, max_length=512, seed=0):
        super().__init__(tasks, tokenizer, len(tasks), max_length, seed)  # whose batch size plays no part here
        if min(map(len, self.rows)) < support + query:
            raise ValueError(f"a task has fewer than {support} + {query} samples, for support and query")
        self.tasks_per_round, self.support, self.query = min(tasks_per_round, len(tasks)), support, query

    def __next__(self):
        episodes = []
        for task_id in self.rng.sample(range(len(self.rows)), self.tasks_per_round):
            rows = self.rng.sample(self.rows[task_id], self.support + self.query)
            episodes.append(tuple(collate(part, [task_id] * len(part), self.pad_id)
                                  for part in (rows[:self.support], rows[self.support:])))
        return episodes
