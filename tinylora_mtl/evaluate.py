"""Answers and whether they are right: python -m tinylora_mtl.evaluate --run runs/align-mini-seed0 --show 5

The model writes greedily, up to the first line break or end token (`generate_answers`), and is right if that equals the
target (`is_right`). For tasks with a closed set of labels `run/ranking.py` has another way: the likeliest label.
"""

import re
import unicodedata
from contextlib import contextmanager
from decimal import Context, Decimal

import torch
from transformers import GenerationConfig

from .batching import collate, encode_prompt, encode_target
from .loss import to_device

EXTRA_TOKENS = 4  # that an answer may have beyond the longest target, for "(B)" where the target is "B"


def accuracy(answers, samples):
    """Share of (prompt, target) samples whose answer is right, 0 to 1."""
    return sum(is_right(answer, target) for answer, (_, target) in zip(answers, samples, strict=True)) / len(samples)


def is_right(answer, target):
    """Whether an answer equals the target after `normalize`: no part of a longer answer is taken for the whole."""
    return normalize(answer) == normalize(target)


def normalize(answer):
    """What is compared: the first line, without regard to white space, case, a final full stop, brackets around a
    single word ("(B)" is "B"), how a character is composed (Unicode's NFC), and how a number is written ("1,234.50" is
    "1234.5", but "007" is no number)."""
    text = unicodedata.normalize("NFC", " ".join(answer.split("\n")[0].casefold().split()))
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
    Of the model's own generation settings only the end tokens count. FloatingPointError for logits that are not finite.
    """
    line_break = lambda ids, _: torch.tensor(["\n" in t for t in tokenizer.batch_decode(ids[:, -1:])]).to(ids.device)
    eos, answers = end_tokens(model, tokenizer), [""] * len(samples)
    for chosen in length_buckets(samples, batch_size):
        new_tokens = max(len(encode_target(tokenizer, samples[i][1])) for i in chosen) + EXTRA_TOKENS
        greedy = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
        batch = prompt_batch(model, tokenizer, [samples[i][0] for i in chosen], max_length - new_tokens)
        ids = batch["input_ids"]  # [batch, length]
        with evaluation_mode(model):  # -> [batch, length + new]
            written = model.generate(input_ids=ids, attention_mask=batch["attention_mask"], generation_config=greedy,
                                     logits_processor=[check_finite], stopping_criteria=[line_break])[:, ids.shape[1]:]
        for i, ids in zip(chosen, written.tolist()):
            answers[i] = read_answer(tokenizer, ids, eos)
    return answers


def end_tokens(model, tokenizer):
    """The tokens that end an answer: the tokenizer's, and the model's own, for a chat model's turns end in others."""
    own = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])]


def read_answer(tokenizer, ids, eos):
    """The answer in what a model wrote: up to the first special token, one of `eos`, or line break; else with "…"."""
    ends = {*eos, *tokenizer.all_special_ids}
    length = next((n for n, token in enumerate(ids) if token in ends), None)
    line, *after = tokenizer.decode(ids[:length]).split("\n", 1)
    return line.strip() + ("" if after or length is not None else " …")


def check_finite(_, numbers):
    """A logits processor: FloatingPointError unless each row's largest is finite (one token's may be -inf)."""
    if not torch.isfinite(numbers.amax(-1)).all():
        raise FloatingPointError("the model's logits are not finite; in float16 they can overflow: try --dtype float32")
    return numbers


def prompt_batch(model, tokenizer, prompts, max_length):
    """A batch of prompts, without labels, on the model's device."""
    rows = [encode_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    batch = collate([(ids, ids) for ids in rows], [0] * len(rows), tokenizer.pad_token_id)
    return {key: to_device(tensor, model.device) for key, tensor in batch.items()}


def length_buckets(samples, batch_size=128):
    """Lists of indices of samples, those of like length together (within 1.5 times): padding costs as much as text."""
    lists = []
    for i in sorted(range(len(samples)), key=lambda i: len(samples[i][0])):
        if not lists or len(lists[-1]) == batch_size or len(samples[i][0]) > 1.5 * len(samples[lists[-1][0]][0]):
            lists.append([])
        lists[-1].append(i)
    return lists


@contextmanager
def evaluation_mode(model):
    """No dropout, no gradient, none of the model's own generation settings within the block; after it all as before."""
    was_training, own = model.training, getattr(model, "generation_config", None)
    try:
        model.generation_config = GenerationConfig()
        with torch.no_grad():
            yield model.eval()
    finally:
        model.generation_config = own
        model.train(was_training)


if __name__ == "__main__":
    from .run.scoring import main
    main()
