"""Encoding, balanced batches, episodes, and the loss."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch

from tinylora_mtl.batching import BalancedBatches, collate, encode, label_logits, label_loss, split_batch
from tinylora_mtl.data.tasks import Task


class Letters:
    """A tokenizer for tests: token id = code of the letter, 1 begins and 2 ends."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None):
        letters = [3 + ord(letter) % 47 for letter in text]
        if truncation:
            letters = letters[max(0, len(letters) + 1 - max_length):]
        return {"input_ids": [1] * add_special_tokens + letters}


def task(name, count, prefix="q"):
    return Task(name, [(f"{prefix}{i}", chr(97 + i % 26)) for i in range(count)], [], [])


def test_labels_are_on_the_target_and_its_end_only():
    ids, labels = encode(Letters(), ("2+3=", "5"))
    assert ids[:5] == Letters()("2+3=")["input_ids"]
    assert labels == [-100] * 5 + ids[5:] and ids[5:] == Letters()(" 5", False)["input_ids"] + [2]


def test_long_prompts_are_cut_from_the_left_and_targets_never():
    whole, _ = encode(Letters(), ("abcdefghijklmnop", "xyz"))
    ids, labels = encode(Letters(), ("abcdefghijklmnop", "xyz"), max_length=9)
    assert ids == [1, *whole[-8:]] and labels == [-100] * 4 + whole[-5:]  # the start token is kept
    with pytest.raises(ValueError, match="a target of 5 tokens, max length 5"):
        encode(Letters(), ("abc", "xyz"), max_length=5)
    with pytest.raises(ValueError, match="empty target"):
        encode(Letters(), ("abc", "  "))


def test_batches_end_together_on_the_right():
    rows = [encode(Letters(), sample) for sample in [("a", "b"), ("abcdef", "xyz")]]
    batch = collate(rows, [4, 7], pad_id=0)
    assert batch["input_ids"].shape == (2, 12) and batch["task_ids"].tolist() == [4, 7]
    assert batch["attention_mask"].sum(1).tolist() == [5, 12]
    assert (batch["input_ids"][:, -1] == 2).all() and (batch["labels"][:, -1] == 2).all()
    assert not batch["input_ids"][0, :7].any() and (batch["labels"][0, :9] == -100).all()


def test_batches_are_balanced_and_small_tasks_come_round_more_often():
    batches = BalancedBatches([task("a", 3), task("b", 8, "r"), task("c", 5, "s")], Letters(), 32, 0)
    seen = [Counter() for _ in range(3)]
    for _ in range(24):
        batch = batches.balanced(batch_size=10)  # 3 of each task; the tenth place stays empty
        assert batch["task_ids"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for ids, task_id in zip(batch["input_ids"].tolist(), batch["task_ids"].tolist()):
            seen[task_id][tuple(i for i in ids if i)] += 1
    assert [len(counts) for counts in seen] == [3, 8, 5]
    assert set(seen[0].values()) == {24} and set(seen[1].values()) == {9}  # 72 / 3 and 72 / 8 times each
    assert set(seen[2].values()) <= {14, 15}


def test_long_and_short_samples_meet_in_every_batch():
    """Two tasks with prompts of 1 to 40 letters: no batch is one of short samples only, or of long ones."""
    tasks = [Task(name, [(letter * i, "x") for i in range(1, 41)], [], []) for name, letter in (("a", "a"), ("b", "b"))]
    batches = BalancedBatches(tasks, Letters(), 64, 0)
    for _ in range(80):
        lengths = batches.balanced(20)["attention_mask"].sum(1).tolist()
        assert min(lengths) <= 15 and max(lengths) >= 30


def test_a_small_task_fills_its_batches_with_different_samples():
    """Also where a new pass begins in the middle of a batch."""
    for sizes in ((6, 40), (37, 100), (9, 9)):
        tasks = [Task(name, [(letter * i, "x") for i in range(1, size + 1)], [], [])
                 for name, letter, size in zip("ab", "ab", sizes)]
        batches, counts = BalancedBatches(tasks, Letters(), 200, 0), Counter()
        for _ in range(200):
            rows = [tuple(i for i in row if i) for row in batches.balanced(8)["input_ids"].tolist()]
            assert len(set(rows)) == 8
            counts.update(rows)
        for task_id, size in enumerate(sizes):
            seen = [count for row, count in counts.items() if (3 + ord("ab"[task_id]) % 47) in row]
            assert len(seen) == size and max(seen) - min(seen) <= 2


def test_pieces_hold_the_same_tokens_with_less_padding():
    rows = [encode(Letters(), ("q" * length, "xyz")) for length in (30, 2, 28, 5, 9, 3)]
    batch = collate(rows, [0, 1, 2, 0, 1, 2], pad_id=0)
    pieces = split_batch(batch, 3)
    assert [piece["input_ids"].shape for piece in pieces] == [(2, 9), (2, 15), (2, 36)]

    def tokens(parts):
        return Counter((tuple(ids[mask.bool()].tolist()), tuple(labels[mask.bool()].tolist()), int(task_id))
                       for part in parts for ids, mask, labels, task_id in
                       zip(part["input_ids"], part["attention_mask"], part["labels"], part["task_ids"]))
    assert tokens(pieces) == tokens([batch])


def test_support_and_query_are_disjoint_and_drawn_anew():
    batches = BalancedBatches([task("a", 12), task("b", 12, "r"), task("c", 12, "s")], Letters(), 32, 0)
    supports = []
    for _ in range(30):
        episodes = batches.episodes(count=2, support=5, query=7)
        assert len(episodes) == 2
        owners = [support["task_ids"].tolist() for support, _ in episodes]
        assert owners[0] != owners[1] and all(len(set(owner)) == 1 for owner in owners)
        for support, query in episodes:
            rows = [{tuple(i for i in ids if i) for ids in part["input_ids"].tolist()} for part in (support, query)]
            assert len(rows[0]) == 5 and len(rows[1]) == 7 and not rows[0] & rows[1]
            supports.append(frozenset(rows[0]))
    assert len(set(supports)) > 50


def test_loss_is_the_mean_over_labels_and_padding_changes_nothing(llama):
    rows = [([5, 6, 7, 8], [-100, -100, 7, 8]), ([9, 10, 11, 12, 13, 14], [-100] * 5 + [14])]
    total, count = 0.0, 0
    for ids, labels in rows:  # one row at a time, no padding, all logits
        logits = llama(torch.tensor([ids])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        count += sum(label != -100 for label in labels)
    for filler in ([], [([3] * 20, [-100] * 19 + [3])]):
        batch = collate(rows + filler, list(range(2 + len(filler))), pad_id=0)
        if filler:
            batch["labels"][2] = -100  # a row of padding length only
        torch.testing.assert_close(label_loss(llama, batch), total / count)


def test_logits_are_computed_for_the_labels_columns_only(llama):
    batch = collate([([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]), ([5, 6, 7], [-100, -100, 7])], [0, 1], 0)
    sizes = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    logits, labels = label_logits(llama, batch)
    assert sizes == [(2, 3, 50)] and logits.shape == (2, 2, 50) and labels.tolist() == [[8, 9], [-100, 7]]


def test_the_head_gets_a_copy_of_the_columns(llama):
    """Torch multiplies a view across the rows by the head once for each row: twice the time of a step in bfloat16."""
    seen = []
    llama.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    label_loss(llama, make_batch())
    assert seen == [True]


def test_a_batch_without_labels_is_refused(llama):
    batch = collate([([5, 6], [-100, -100])], [0], 0)
    with pytest.raises(ValueError, match="no label is left"):
        label_loss(llama, batch)


def test_gpt2s_positions_do_not_count_the_padding():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    row = ([5, 6, 7, 8], [-100, -100, 7, 8])
    alone, beside = collate([row], [0], 0), collate([row, ([9] * 9, [-100] * 9)], [0, 1], 0)
    torch.testing.assert_close(label_loss(model, alone), label_loss(model, beside))
