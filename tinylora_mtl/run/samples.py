"""What is amiss with the samples of a run, found and said before it takes its time."""

from collections import Counter

from ..batching import encode_prompt, encode_target
from ..data.tasks import prompt_key
from ..evaluate import EXTRA_TOKENS, end_tokens, is_right, length_buckets, read_answer


def check_samples(model, tokenizer, tasks, split, max_length, score, training=False):
    """Print what is amiss with a split of the tasks, and with their training samples if they are to be trained on.

    Prompts that are cut, targets that no answer can equal, prompts that another task trains on. Raises ValueError for a
    text without tokens or with one that the model does not have, and for an answer that leaves no room for its prompt.
    """
    for name in ("train", split) if training else (split,):
        say_cut(model, tokenizer, tasks, name, max_length, score)
    say_never_right(model, tokenizer, tasks, split, score)
    if training:
        say_shared(tasks, split)


def say_cut(model, tokenizer, tasks, split, max_length, score):
    """Print how many prompts of a split are too long for `max_length`, answer included, so that they are cut."""
    rows, prompts, cut = model.get_input_embeddings().weight.shape[0], 0, 0
    larger = max(tokenizer.get_vocab().values()) >= rows  # the tokenizer than the model
    for task in tasks:
        samples = getattr(task, split)
        room = [max_length - tokens for tokens in answer_tokens(tokenizer, task, split, score)]
        for (prompt, target), left in zip(samples, room):
            if left < 1:
                raise ValueError(f"task {task.name!r}: an answer of {max_length - left} tokens leaves no room for its "
                                 f"prompt in --max-length {max_length}: {target[:40]!r}")
        plain, whole = (tokenizer([prompt for prompt, _ in samples], add_special_tokens=special)["input_ids"]
                        for special in (False, True))
        for (prompt, _), text, ids, left in zip(samples, plain, whole, room):
            if not text:
                raise ValueError(f"task {task.name!r} has a prompt without a single token: {prompt!r:.60}")
            cut += len(ids) > left and len(encode_prompt(tokenizer, prompt, 10 ** 9)) > left
        if larger:
            check_tokens(tokenizer, task, split, rows)
        prompts += len(samples)
    if cut:
        print(f"{cut} of {prompts} {'training' if split == 'train' else split} prompts are too long for "
              f"--max-length {max_length}: their beginning is cut")


def answer_tokens(tokenizer, task, split, score):
    """For each sample of a split the tokens that are kept free for its answer: its own target's in training, else as
    `choose_answers` and `generate_answers` do, the longest label's or those of its batch's longest target and some."""
    samples = getattr(task, split)
    tokens = {target: len(encode_target(tokenizer, target)) for target in {target for _, target in samples}}
    answers = [tokens[target] for _, target in samples]
    if split == "train":
        return answers
    if score == "choose":
        return [max(len(encode_target(tokenizer, label)) for label in task.labels)] * len(samples)
    for chosen in length_buckets(samples):
        longest = max(answers[i] for i in chosen)
        for i in chosen:
            answers[i] = longest + EXTRA_TOKENS
    return answers


def check_tokens(tokenizer, task, split, rows):
    """ValueError for a text with a token that the tokenizer has, and the model's `rows` embeddings have not."""
    for prompt, target in [*getattr(task, split), *(("", label) for label in task.labels)]:
        last = max(encode_prompt(tokenizer, prompt, 10 ** 9) + encode_target(tokenizer, target))
        if last >= rows:
            token = tokenizer.convert_ids_to_tokens(last)
            raise ValueError(f"task {task.name!r} has a sample with the token {token!r}, number {last} of the "
                             f"tokenizer, and the model has embeddings for {rows} tokens only; "
                             "model.resize_token_embeddings(len(tokenizer)) adds those that are missing, untrained")


def say_never_right(model, tokenizer, tasks, split, score):
    """Print for each task how many targets of a split no answer can equal, however good the model.

    Those that do not come back from the tokenizer or hold an end token, or, if answers are chosen, are not a label.
    """
    ends = end_tokens(model, tokenizer)
    if not all(isinstance(token, int) for token in ends):
        raise ValueError(f"the eos_token_id of the model's generation settings is no token's number: {ends!r:.60}")
    for task in tasks:
        targets = Counter(target for _, target in getattr(task, split))
        never = [target for target in targets if not (
            any(is_right(label, target) for label in task.labels) if score == "choose"
            else is_right(read_answer(tokenizer, encode_target(tokenizer, target), ends), target))]
        if never:
            why = "none of the training labels" if score == "choose" else "changed by the tokenizer, or ended too soon"
            count = sum(targets[target] for target in never)
            print(f"task {task.name!r}: {count} of {targets.total()} {split} targets can never be matched, "
                  f"{never[0][:40]!r} for one: {why}")


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
