"""The embedded tasks: seeded, disjoint, their splits alike, and their answers recomputed from the prompt alone."""

import doctest
import functools
import itertools
import random
import re
from collections import Counter

import pytest

from tinylora_mtl.data import embedded, load_tasks
from tinylora_mtl.data.embedded import (ANSWERS, CATEGORIES, LANGUAGES, NUMBERS, PHRASES, SKILLS, WORDED_SIZES, WORDS,
                                        worded_sample)
from tinylora_mtl.data.pretrain import PROBLEM_SIZES
from tinylora_mtl.data.tasks import TASK_SETS, scored_samples


@functools.cache
def embedded_task(name):
    return load_tasks([name])[0]


def solve(name, prompt):
    """The answer worked out from the words of a prompt, independently of the generator."""
    words = re.findall(r"[\w]+|[^\w\s]", prompt.removesuffix(" Answer:"))
    if name == "boolean_expressions":
        return str(eval(prompt.split(": ")[1].split(".")[0]))
    if name == "multistep_arithmetic":
        signs = {"plus": "+", "minus": "-", "times": "*", "(": "(", ")": ")"}
        return str(eval("".join(signs.get(w) or str(NUMBERS.index(w)) for w in words[4:-1])))
    if name == "word_sorting":
        return " ".join(sorted(prompt.split(": ")[1].split(".")[0].split()))
    if name == "dyck_languages":
        text = prompt.split(": ")[1].removesuffix(" Answer:").replace(" ", "")
        while re.search(r"\(\)|\[\]|{}|<>", text):
            text = re.sub(r"\(\)|\[\]|{}|<>", "", text)
        return " ".join(text[::-1].translate(str.maketrans("([{<", ")]}>")))
    if name == "object_counting":
        wanted = CATEGORIES[re.search(r"How many (\w+)", prompt)[1]]
        return str(sum(NUMBERS.index(n) for n, thing in re.findall(r"(\w+) (\w+)[,.]", prompt) if thing in wanted))
    if name == "navigate":
        moves = re.findall(r"Take (\w+) steps? (\w+)", prompt)
        total = {goal: sum(NUMBERS.index(n) for n, way in moves if way == goal)
                 for goal in ("left", "right", "forward", "backward")}
        return "Yes" if total["left"] == total["right"] and total["forward"] == total["backward"] else "No"
    if name == "web_of_lies":
        truth = {}
        for sentence in prompt.split(".")[:-1]:
            parts = sentence.split()
            says = parts[-1] == "truth"
            truth[parts[0]] = says if parts[1] != "says" else (truth[parts[2]] == says)
        return "Yes" if truth[re.search(r"Does (\w+)", prompt)[1]] else "No"
    held = dict(re.findall(r"(\w+) has the (\w+)", prompt))
    for a, b in re.findall(r"(\w+) and (\w+) trade", prompt):
        held[a], held[b] = held[b], held[a]
    return held[re.search(r"what does (\w+)", prompt)[1]]


@pytest.mark.parametrize("name", SKILLS)
def test_answers_follow_from_the_prompts(name):
    task = embedded_task(name)
    for prompt, target in task.train + task.validation + task.test:
        assert solve(name, prompt) == target, prompt


def read_numbers(language, prompt):
    """(kind, the three numbers) of a prompt, read with the phrases of its language: ("+-", [3, 4, 2])."""
    result, plus, minus, largest = PHRASES[language]
    for phrase, blank in ((result, "(.*)"), (largest, r"([\w-]+)")):
        if found := re.fullmatch(blank.join(map(re.escape, phrase.split("{}"))), prompt):
            words = " ".join(found.groups()).split()
            signs = [{plus: "+", minus: "-"}[sign] for sign in words[1::2]] if phrase == result else ["max"]
            operands = words[::2] if phrase == result else words
            return "".join(signs), [LANGUAGES[language].index(word) for word in operands]
    raise AssertionError(prompt)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_in_every_language(language):
    words, task, kinds = LANGUAGES[language], embedded_task(language), set()
    assert len(set(words)) == 21
    compute = {"++": lambda a, b, c: a + b + c, "--": lambda a, b, c: a - b - c, "+-": lambda a, b, c: a + b - c,
               "max": max}
    for prompt, target in task.train + task.validation + task.test:
        kind, operands = read_numbers(language, prompt)
        kinds.add(kind)
        assert words[compute[kind](*operands)] == target
    assert kinds == set(compute)


@pytest.mark.parametrize("name", [*SKILLS, *LANGUAGES])
def test_splits_are_disjoint_of_full_size_and_always_the_same(name):
    task, again = embedded_task(name), load_tasks([name])[0]
    assert (len(task.train), len(task.validation), len(task.test)) == (500, 500, 1000)
    prompts = [prompt for prompt, _ in task.train + task.validation + task.test]
    assert len(set(prompts)) == 2000
    assert task == again


COUNTED = {  # the words of a prompt whose number is the size of its problem
    "boolean_expressions": ["True", "False"], "word_sorting": WORDS, "dyck_languages": list("()[]{}<>"),
    "object_counting": NUMBERS, "navigate": ["Take"], "web_of_lies": ["lies", "tells"],
    "tracking_shuffled_objects": ["trade"], "multistep_arithmetic": NUMBERS}


def size_of(name, prompt):
    """The size of the problem in a prompt, or of a language its kind, read from the words alone."""
    if name in LANGUAGES:
        return read_numbers(name, prompt)[0]
    return sum(word in COUNTED[name] for word in re.findall(r"\w+|[^\w\s]", prompt))


@pytest.mark.parametrize("name", [*SKILLS, *LANGUAGES])
def test_all_splits_come_from_one_distribution(name):
    """In every split as many problems of each size, and of these, where there are two answers, half with each.

    Else few of the rarer kind are left for the split that is drawn last, for no prompt comes twice.
    """
    task, sizes, answers = embedded_task(name), WORDED_SIZES.get(name, ("++", "--", "+-", "max")), ANSWERS.get(name)
    for split in (task.train, task.validation, task.test):
        kinds = Counter((size_of(name, prompt), answers and target) for prompt, target in split)
        assert set(kinds) == set(itertools.product(sizes, answers or [None]))
        assert max(kinds.values()) - min(kinds.values()) <= 1
        targets = Counter(target for _, target in split)
        assert max(targets.values()) <= (0.5 if answers else 0.35) * len(split)  # the commonest alone is not enough


def test_a_sample_draws_from_its_own_generator_only():
    state = random.getstate()
    assert worded_sample("navigate", random.Random(3)) == worded_sample("navigate", random.Random(3))
    assert random.getstate() == state


def test_load_tasks_by_name_and_set():
    assert [t.name for t in load_tasks(["mini"])] == list(SKILLS)
    assert [t.name for t in load_tasks(["mini-multilingual", "navigate"])] == [*LANGUAGES, "navigate"]
    assert set(TASK_SETS) == {"mini", "mini-multilingual", "bbh"} and len(TASK_SETS["bbh"]) == 27


def test_fewer_samples_are_drawn_with_the_seed_and_tests_stay():
    few, other = (load_tasks(["navigate"], samples=20, seed=seed)[0] for seed in (0, 1))
    everything = embedded_task("navigate")
    assert len(set(few.train)) == 20 and set(few.train) <= set(everything.train) and few.train != other.train
    assert few.test == other.test == everything.test and few.validation == everything.validation


def test_scored_samples_are_drawn_and_always_the_same():
    tasks = load_tasks(["navigate", "word_sorting"])
    some, again = scored_samples(tasks, "test", 50), scored_samples(tasks[::-1], "test", 50)[::-1]
    assert some == again
    for part, task in zip(some, tasks):
        assert len(set(part.test)) == 50 and set(part.test) <= set(task.test)
        assert 10 < len(set(part.test) & set(task.test[500:])) < 40  # not the first ones
        assert (part.train, part.validation, part.labels) == (task.train, task.validation, task.labels)
    for count in (None, 1000, 1001):
        assert scored_samples(tasks, "test", count) == tasks
    assert [len(part.validation) for part in scored_samples(tasks, "validation", 1)] == [1, 1]


@pytest.mark.parametrize("names,samples,message", [
    (["navigat"], None, "unknown task 'navigat'; there are: mini, mini-multilingual, boolean_expressions"),
    (["mini", "navigate"], None, "'navigate' is asked for more than once"),
    ([], None, "no task"),
    (["navigate"], 501, "501 training samples are asked for, but task 'navigate' has 500"),
    (["navigate"], 0, "0 training samples")])
def test_bad_tasks(names, samples, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, samples)


def test_the_worked_example_of_the_module():
    result = doctest.testmod(embedded)
    assert result.attempted >= 3 and result.failed == 0


@pytest.mark.parametrize("sizes", [WORDED_SIZES, PROBLEM_SIZES])
def test_every_skill_has_its_sizes(sizes):
    assert set(sizes) == set(SKILLS)
    assert all(set(WORDED_SIZES[name]) <= set(sizes[name]) for name in SKILLS)  # the worded ones are met before
