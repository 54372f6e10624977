"""Encoding, balanced batches and episodes."""

from collections import Counter

import pytest
import torch

from tinylora_mtl.batching import BalancedBatches, Episodes, collate, encode, encode_prompt, encode_target
from tinylora_mtl.data.tasks import Task
from tinylora_mtl.run.checkpoint import place_of, put_back


class Letters:
    """A tokenizer for tests: token id = code of the letter, 1 begins and 2 ends."""

    eos_token_id, pad_token_id = 2, 0

    def __init__(self, begins=True, ends=False, space_first=False):  # what a tokenizer may add to a text
        self.begins, self.ends, self.space_first = begins, ends, space_first

    def __call__(self, text, add_special_tokens=True):
        letters = [3 + ord(letter) % 47 for letter in " " * self.space_first + text]
        return {"input_ids": [1] * self.begins + letters + [2] * self.ends if add_special_tokens else letters}


def ids_of(text):
    return Letters()(text, False)["input_ids"]


def rows_of(batch):
    """The rows of a batch, each as a tuple of the ids that are not padding."""
    return [tuple(i for i in ids if i) for ids in batch["input_ids"].tolist()]


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
    assert len(encode(Letters(), ("abc", "xyz"), max_length=6)[0]) == 6
    with pytest.raises(ValueError, match="an empty target: 'abc'"):
        encode(Letters(), ("abc", "  "))
    with pytest.raises(ValueError, match="an empty prompt, before the target 'x'"):
        encode(Letters(begins=False), ("", "x"))
    assert len(encode(Letters(), ("a" * 1000, "x"))[0]) == 512


def test_prompts_keep_what_stands_before_them_and_lose_what_ends_them():
    whole = ids_of("abcdef")
    for tokenizer in (Letters(), Letters(ends=True)):
        assert encode_prompt(tokenizer, "abcdef", 7) == encode_prompt(tokenizer, "abcdef", 99) == [1, *whole]
        assert encode_prompt(tokenizer, "abcdef", 6) == [1, *whole[1:]] and encode_prompt(tokenizer, "abcdef", 1) == [1]

    class Changes(Letters):
        def __call__(self, text, add_special_tokens=True):  # the text's own tokens are others behind a start token
            return {"input_ids": [1, 60, 61]} if add_special_tokens else super().__call__(text, False)
    assert encode_prompt(Changes(), "abcdef", 99) == whole


def test_a_target_is_a_space_the_answer_and_the_end():
    """Also where the tokenizer puts a space of its own before every text: one space is enough."""
    for tokenizer in (Letters(), Letters(ends=True), Letters(space_first=True)):
        assert encode_target(tokenizer, "yes") == ids_of(" yes") + [2]

    class Together(Letters):
        def __call__(self, text, add_special_tokens=True):  # ": " is one token, so the colon cannot be told from it
            if text[:2] == ": ":
                return {"input_ids": [60] + ids_of(text[2:])}
            return super().__call__(text, add_special_tokens)
    assert encode_target(Together(), "yes") == ids_of(" yes") + [2]


def test_batches_end_together_on_the_right():
    rows = [encode(Letters(), sample) for sample in [("a", "b"), ("abcdef", "xyz")]]
    batch = collate(rows, [4, 7], pad_id=0)
    assert batch["input_ids"].shape == (2, 12) and batch["task_ids"].tolist() == [4, 7]
    assert batch["attention_mask"].sum(1).tolist() == [5, 12]
    assert (batch["input_ids"][:, -1] == 2).all() and (batch["labels"][:, -1] == 2).all()
    assert not batch["input_ids"][0, :7].any() and (batch["labels"][0, :9] == -100).all()


def test_batches_are_balanced_and_small_tasks_come_round_more_often():
    tasks = [task("a", 3), task("b", 8, "r"), task("c", 5, "s")]
    batches = BalancedBatches(tasks, Letters(), batch_size=10)  # 3 of each task; the tenth place stays empty
    seen = [Counter() for _ in range(3)]
    for _, batch in zip(range(24), batches):
        assert batch["task_ids"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for row, task_id in zip(rows_of(batch), batch["task_ids"].tolist()):
            seen[task_id][row] += 1
    assert [len(counts) for counts in seen] == [3, 8, 5]
    assert set(seen[0].values()) == {24} and set(seen[1].values()) == {9}  # 72 / 3 and 72 / 8 times each
    assert set(seen[2].values()) <= {14, 15}


def test_long_and_short_samples_meet_in_every_batch():
    """Two tasks with prompts of 1 to 40 letters: no batch is one of short samples only, or of long ones."""
    tasks = [Task(name, [(letter * i, "x") for i in range(1, 41)], [], []) for name, letter in (("a", "a"), ("b", "b"))]
    for _, batch in zip(range(80), BalancedBatches(tasks, Letters(), 20, max_length=64)):
        lengths = batch["attention_mask"].sum(1).tolist()
        assert min(lengths) <= 15 and max(lengths) >= 30


def test_a_small_task_fills_its_batches_with_different_samples():
    """Also where a new pass begins in the middle of a batch."""
    for sizes in ((6, 40), (37, 100), (9, 9)):
        tasks = [Task(name, [(letter * i, "x") for i in range(1, size + 1)], [], [])
                 for name, letter, size in zip("ab", "ab", sizes)]
        counts = Counter()
        for _, batch in zip(range(200), BalancedBatches(tasks, Letters(), 8)):
            rows = rows_of(batch)
            assert len(set(rows)) == 8
            counts.update(rows)
        for task_id, size in enumerate(sizes):
            seen = [count for row, count in counts.items() if (3 + ord("ab"[task_id]) % 47) in row]
            assert len(seen) == size and max(seen) - min(seen) <= 2


def test_a_task_with_fewer_samples_than_its_share_repeats_them():
    batch = next(BalancedBatches([task("a", 2)], Letters(), 5))
    assert sorted(Counter(rows_of(batch)).values()) == [2, 3]


def test_samples_come_in_an_order_of_their_own_in_every_pass():
    batches = BalancedBatches([task("a", 12)], Letters(), 12)
    passes = [tuple(rows_of(next(batches))) for _ in range(5)]
    assert len(set(passes)) == 5 and len({frozenset(rows) for rows in passes}) == 1


def test_support_and_query_are_disjoint_and_drawn_anew():
    tasks = [task("a", 12), task("b", 12, "r"), task("c", 12, "s")]
    supports, pairs = [], set()
    for _, episodes in zip(range(30), Episodes(tasks, Letters(), 2, 5, 7)):
        assert len(episodes) == 2
        owners = [support["task_ids"].tolist() for support, _ in episodes]
        assert owners[0] != owners[1] and all(len(set(owner)) == 1 for owner in owners)
        pairs.add((owners[0][0], owners[1][0]))
        for support, query in episodes:
            assert set(query["task_ids"].tolist()) == set(support["task_ids"].tolist())
            rows = [set(rows_of(part)) for part in (support, query)]
            assert len(rows[0]) == 5 and len(rows[1]) == 7 and not rows[0] & rows[1]
            assert {row[1] for row in rows[0] | rows[1]} == {ids_of("qrs"[support["task_ids"][0]])[0]}
            supports.append(frozenset(rows[0]))
    assert len(set(supports)) > 50 and len(pairs) == 6


def test_a_round_has_no_more_tasks_than_there_are():
    assert len(next(Episodes([task("a", 4), task("b", 4)], Letters(), 4, 2, 2))) == 2


def batches_of(kind, **options):
    tasks = [task("a", 7), task("b", 9, "r")]
    return BalancedBatches(tasks, Letters(), 6, **options) if kind == "batches" else Episodes(tasks, Letters(), 1, 2, 2,
                                                                                              **options)


def some(batches, count=8):
    return [batch for _, batch in zip(range(count), batches)]


@pytest.mark.parametrize("kind", ["batches", "episodes"])
def test_the_seed_decides_and_a_place_is_gone_on_from(kind):
    """From any place: in the middle of a pass too, and however far the one that is put there has gone."""
    first = some(batches_of(kind))
    torch.testing.assert_close(first, some(batches_of(kind, seed=0)), atol=0, rtol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first, some(batches_of(kind, seed=1)), atol=0, rtol=0)
    going = batches_of(kind)
    some(going, 3)
    place = place_of(going)
    expected = some(going)
    for other in (going, batches_of(kind, seed=5)):
        put_back(other, place)
        torch.testing.assert_close(some(other), expected, atol=0, rtol=0)  # nor has going on changed the place


def test_prompts_are_cut_to_the_length_that_is_asked_for():
    for batches in (batches_of("batches", max_length=4), batches_of("episodes", max_length=4)):
        batch = next(batches)
        batch = batch if isinstance(batch, dict) else batch[0][0]
        assert batch["input_ids"].shape[1] == 4


def test_batches_that_cannot_be_are_refused():
    tasks = [task("a", 5), task("b", 9, "r")]
    with pytest.raises(ValueError, match="a batch of 1 samples cannot hold 2 tasks"):
        BalancedBatches(tasks, Letters(), 1)
    with pytest.raises(ValueError, match="fewer than 3 . 3 samples"):
        Episodes(tasks, Letters(), 2, 3, 3)
    assert len(next(Episodes(tasks, Letters(), 2, 3, 2))) == 2
