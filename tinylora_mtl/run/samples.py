"""What is amiss with the samples of a run, found and said before it takes its time."""

from collections import Counter

from ..batching import encode_prompt, encode_target
from ..data.tasks import prompt_key
from ..evaluate import EXTRA_TOKENS, is_right, read_answer


def check_samples(model, tokenizer, tasks, split, max_length, score, training=False):
    """Print what is amiss with a split of the tasks, and with their training samples if they are to be trained on.

    Prompts that are cut, targets that no answer can equal, prompts that another task trains on. Raises ValueError for a
    target that leaves no room for its prompt, and for a token that the model does not have.
    """
    check_tokens(model, tokenizer, tasks, ["train", split] if training else [split])
    for name in ["train", split] if training else [split]:
        say_cut(tokenizer, tasks, name, max_length)
    say_never_right(tokenizer, tasks, split, score)
    if training:
        say_shared(tasks, split)


def check_tokens(model, tokenizer, tasks, splits):
    """ValueError for a text with a token that the tokenizer has, and the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    for task in tasks:
        for split in splits:
            for sample in getattr(task, split):
                last = max(encode_prompt(tokenizer, sample[0], 10 ** 9) + encode_target(tokenizer, sample[1]))
                if last >= rows:
                    token = tokenizer.convert_ids_to_tokens(last)
                    raise ValueError(f"task {task.name!r} has a sample with the token {token!r}, number {last} of the "
                                     f"tokenizer, and the model has embeddings for {rows} tokens only; "
                                     "model.resize_token_embeddings(len(tokenizer)) adds those that are missing, "
                                     "untrained")


def say_cut(tokenizer, tasks, split, max_length):
    """Print how many prompts of a split are too long for `max_length`, answer included, so that they are cut.

    Raises ValueError for a target that leaves no room for its prompt.
    """
    spare = 0 if split == "train" else EXTRA_TOKENS  # an answer that the model writes may be longer than the target
    samples, cut = [(task.name, *sample) for task in tasks for sample in getattr(task, split)], 0
    for name, prompt, target in samples:
        new_tokens = len(encode_target(tokenizer, target)) + spare
        if new_tokens >= max_length:
            more = f", and {spare} to spare," if spare else ""
            raise ValueError(f"task {name!r}: a target of {new_tokens - spare} tokens{more} leaves no room for its "
                             f"prompt in --max-length {max_length}: {target[:40]!r}")
        if len(prompt.encode()) + 8 > max_length - new_tokens:  # a token is a byte at least; most need no closer look
            cut += len(encode_prompt(tokenizer, prompt, 10 ** 9)) > max_length - new_tokens
    if cut:
        print(f"{cut} of {len(samples)} {'training' if split == 'train' else split} prompts are too long for "
              f"--max-length {max_length}: their beginning is cut")


def say_never_right(tokenizer, tasks, split, score):
    """Print for each task how many targets of a split no answer can equal, whatever the model.

    Those that do not come back from the tokenizer, or, where the answer is chosen, are none of the labels.
    """
    for task in tasks:
        targets = Counter(target for _, target in getattr(task, split))
        never = [target for target in targets if not (
            any(is_right(label, target) for label in task.labels) if score == "choose"
            else is_right(read_answer(tokenizer, encode_target(tokenizer, target), {tokenizer.eos_token_id}), target))]
        if never:
            why = "none of the training labels" if score == "choose" else "changed by the tokenizer"
            print(f"task {task.name!r}: {sum(targets[target] for target in never)} of {targets.total()} {split} targets "
                  f"can never be matched, {never[0][:40]!r} for one: {why}")


def say_shared(tasks, split):
    """Print for each task how many prompts of a split are training prompts of another task."""
    for task in tasks:
        keys = [prompt_key(prompt) for prompt, _ in getattr(task, split)]
        for other in tasks:
            seen = {prompt_key(prompt) for prompt, _ in other.train} if other is not task else ()
            shared = sum(key in seen for key in keys)
            if shared:
                print(f"{shared} of {len(keys)} {split} prompts of task {task.name!r} are training prompts of task "
                      f"{other.name!r}")
