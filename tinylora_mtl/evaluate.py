"""Answers and whether they are right: python -m tinylora_mtl.evaluate --run runs/align-mini-seed0 --show 5

Two ways of answering. `generate_answers`: the model writes greedily, up to the first line break or end token, and is
right if that equals the target (`is_right`). `choose_answers`, for tasks with a closed set of labels: the label that
the model finds likeliest (likelihood ranking).
"""

import re
from contextlib import contextmanager
from decimal import Context, Decimal

import torch

from .batching import collate, encode_prompt, encode_target
from .loss import forward, to_device

EXTRA_TOKENS = 4  # that an answer may have beyond the longest target, for "(B)" where the target is "B"


def accuracy(answers, samples):
    """Share of (prompt, target) samples whose answer is right, 0 to 1."""
    return sum(is_right(answer, target) for answer, (_, target) in zip(answers, samples, strict=True)) / len(samples)


def is_right(answer, target):
    """Whether an answer equals the target after `normalize`: no part of a longer answer is taken for the whole."""
    return normalize(answer) == normalize(target)


def normalize(answer):
    """What is compared: the first line, without regard to white space, case, a final full stop, brackets around a
    single word ("(B)" is "B"), and how a number is written ("1,234.50" is "1234.5", but "007" is no number)."""
    text = " ".join(answer.split("\n")[0].casefold().split())
    text = text[:-1] if text.endswith(".") and len(text) > 1 else text
    text = re.sub(r"^\((\w+)\)$", r"\1", text)
    if re.fullmatch(r"[+-]?(0|[1-9]\d*|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?", text):
        number = Decimal(text.replace(",", "")).normalize(Context(prec=len(text)))  # every digit counts
        return f"{abs(number) if number == 0 else number:f}"
    return text


def generate_answers(model, tokenizer, samples, max_length=512, batch_size=128):
    """The model's greedy answer to each (prompt, target) sample, a list of str in the same order.

    An answer ends at its first line break or end token: what a model goes on to invent is never read. It may be
    EXTRA_TOKENS longer than the longest target of its batch; one that is cut off there ends in "…", and is never right.
    """
    own = model.generation_config.eos_token_id  # a chat model's turns end in other tokens than its texts
    eos = sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})
    ends = {*tokenizer.all_special_ids, *eos}
    answers = [""] * len(samples)
    for chosen in length_buckets(samples, batch_size):
        max_new_tokens = max(len(encode_target(tokenizer, samples[i][1])) for i in chosen) + EXTRA_TOKENS
        batch = prompt_batch(model, tokenizer, [samples[i][0] for i in chosen], max_length - max_new_tokens)
        with evaluation_mode(model):
            written = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,  # greedy, plainly
                max_new_tokens=max_new_tokens, stop_strings=["\n"], tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=eos)[:, batch["input_ids"].shape[1]:]  # [batch, new]
        for i, ids in zip(chosen, written.tolist()):
            length = next((n for n, token in enumerate(ids) if token in ends), None)
            line, *after = tokenizer.decode(ids[:length]).split("\n", 1)
            answers[i] = line.strip() + ("" if after or length is not None else " …")
    return answers


def choose_answers(model, tokenizer, samples, labels, max_length=512, batch_size=128):
    """For each (prompt, target) sample the label that is likeliest as its whole answer, a list of str.

        argmax over labels of log p(label, end token | prompt), summed over the label's tokens
    The end token counts, so that a label is not preferred for being the beginning of another ("1" and "10"). Raises
    FloatingPointError for likelihoods that are not finite, ValueError for a model without keys and values.
    """
    options = [encode_target(tokenizer, label) for label in labels]
    answers = [""] * len(samples)
    for chosen in length_buckets(samples, max(1, batch_size // len(labels))):
        batch = prompt_batch(model, tokenizer, [samples[i][0] for i in chosen], max_length - max(map(len, options)))
        with evaluation_mode(model):
            likely = log_likelihoods(model, batch, options)  # [prompts, labels]
        if not torch.isfinite(likely).all():
            raise FloatingPointError("the likelihoods of the labels are not finite, so none can be chosen; in float16 "
                                     "they can overflow: try --dtype float32")
        for i, label in zip(chosen, likely.argmax(-1).tolist()):
            answers[i] = labels[label]
    return answers


def log_likelihoods(model, batch, options):
    """log p(option | prompt) for a batch of prompts and each of `options`, lists of token ids -> [prompts, options].

    A prompt is read once, whatever the number of options: they go on from its keys and values.
    """
    mask, count, longest = batch["attention_mask"], len(options), max(map(len, options))
    ids = torch.tensor([option + [0] * (longest - len(option)) for option in options], device=mask.device)
    read = forward(model, batch["input_ids"], mask, 1, use_cache=True)
    logits = read.logits[:, -1:].repeat_interleave(count, 0)  # [prompts · options, 1, vocabulary]: the first token's
    if longest > 1:
        name = "cache" if "cache" in read else "past_key_values"  # its newer and its older name
        try:
            read[name].batch_repeat_interleave(count)
        except (AttributeError, KeyError) as error:  # a recurrent model keeps a state instead
            raise ValueError("this model has no keys and values to go on from; use --score generate") from error
        new = ids[:, :-1].repeat(len(mask), 1)  # [prompts · options, longest - 1]
        mask = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(new)], 1)
        rest = forward(model, new, mask, longest - 1, use_cache=True, **{name: read[name]}).logits
        logits = torch.cat([logits, rest], 1)  # [prompts · options, longest, vocabulary]
    chosen = logits.float().log_softmax(-1).gather(-1, ids.repeat(len(batch["input_ids"]), 1)[..., None])[..., 0]
    counted = torch.tensor([[i < len(option) for i in range(longest)] for option in options], device=mask.device)
    return (chosen.view(-1, count, longest) * counted).sum(-1)  # [prompts, options]


def prompt_batch(model, tokenizer, prompts, max_length):
    """A batch of prompts, without labels, on the model's device."""
    rows = [encode_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    batch = collate([(ids, ids) for ids in rows], [0] * len(rows), tokenizer.pad_token_id)
    return {key: to_device(tensor, model.device) for key, tensor in batch.items()}


def length_buckets(samples, batch_size):
    """Lists of indices of (prompt, target) samples, those of like length together.

    No prompt is more than half as long again as another of its list: on a CPU, padding costs as much as text.
    """
    lists = []
    for i in sorted(range(len(samples)), key=lambda i: len(samples[i][0])):
        if not lists or len(lists[-1]) == batch_size or len(samples[i][0]) > 1.5 * len(samples[lists[-1][0]][0]):
            lists.append([])
        lists[-1].append(i)
    return lists


@contextmanager
def evaluation_mode(model):
    """No dropout and no gradient within the block; the model's mode is as before after it."""
    was_training = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(was_training)


if __name__ == "__main__":
    from .run.scoring import main
    main()
