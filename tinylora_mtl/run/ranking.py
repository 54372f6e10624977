"""Likelihood ranking: of a closed set of labels, the one that the model finds likeliest (--score choose)."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..batching import encode_target
from ..evaluate import check_finite, evaluation_mode, length_buckets, prompt_batch
from ..loss import forward


def choose_answers(model, tokenizer, samples, labels, max_length=512, batch_size=128):
    """For each (prompt, target) sample the label that is likeliest as its whole answer, a list of str.

        argmax over labels of log p(label, end token | prompt), summed over the label's tokens
    The end token counts, so that a label is not preferred for being the beginning of another ("1" and "10"). Raises
    FloatingPointError for logits that are not finite.
    """
    options = [encode_target(tokenizer, label) for label in labels]
    answers = [""] * len(samples)
    for chosen in length_buckets(samples, max(1, batch_size // len(labels))):
        batch = prompt_batch(model, tokenizer, [samples[i][0] for i in chosen], max_length - max(map(len, options)))
        with evaluation_mode(model):
            likely = check_finite(None, log_likelihoods(model, batch, options))  # [prompts, labels]
        for i, label in zip(chosen, likely.argmax(-1).tolist()):
            answers[i] = labels[label]
    return answers


def log_likelihoods(model, batch, options):
    """log p(option | prompt) for a batch of prompts and each of `options`, lists of token ids -> [prompts, options].

    A prompt is read once, whatever the number of options: they go on from its keys and values. Where a layer keeps
    something else (a recurrent one its state), each option is read behind a prompt of its own.
    """
    ids, mask, count, longest = batch["input_ids"], batch["attention_mask"], len(options), max(map(len, options))
    wanted = torch.tensor([option + [0] * (longest - len(option)) for option in options], device=mask.device)
    new = wanted[:, :-1].repeat(len(mask), 1)  # [p · options, longest - 1], of p prompts
    longer = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(new)], 1)
    read = forward(model, ids, mask, 1, use_cache=True)
    name = "cache" if "cache" in read else "past_key_values"  # its newer and its older name
    if longest > 1 and not has_only_keys_and_values(read.get(name)):
        behind = torch.cat([ids.repeat_interleave(count, 0), new], 1)
        logits = forward(model, behind, longer, longest).logits[:, -longest:]  # [p · options, longest, vocabulary]
    else:
        logits = read.logits[:, -1:].repeat_interleave(count, 0)  # [p · options, 1, vocabulary]: the first token's
        if longest > 1:
            read[name].batch_repeat_interleave(count)
            rest = forward(model, new, longer, longest - 1, use_cache=True, **{name: read[name]}).logits
            logits = torch.cat([logits, rest], 1)  # [p · options, longest, vocabulary]
    logits = check_finite(None, logits.float())
    chosen = logits.log_softmax(-1).gather(-1, wanted.repeat(len(mask), 1)[..., None])[..., 0]
    counted = torch.tensor([[i < len(option) for i in range(longest)] for option in options], device=mask.device)
    return torch.where(counted, chosen.view(-1, count, longest), 0.0).sum(-1)  # [prompts, options]


def has_only_keys_and_values(cache):
    """Whether a cache is a plain one of attention layers, which can be repeated and gone on from."""
    return type(cache) is DynamicCache and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
                                               for layer in cache.layers)
