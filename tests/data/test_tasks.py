"""The embedded tasks: seeded, disjoint, and their answers recomputed from the prompt alone."""

import doctest
import functools
import random
import re

import pytest

from tinylora_mtl.data import embedded, load_tasks
from tinylora_mtl.data.embedded import CATEGORIES, LANGUAGES, NUMBERS, PHRASES, SKILLS, WORDED_SIZES, worded_sample
from tinylora_mtl.data.pretrain import PROBLEM_SIZES
from tinylora_mtl.data.tasks import TASK_SETS


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_in_every_language(language):
    words = LANGUAGES[language]
    assert len(set(words)) == 21
    compute = [lambda a, b: a + b, lambda a, b: a - b, lambda a: a + 1, max]
    task = embedded_task(language)
    kinds = set()
    for prompt, target in task.train + task.test:
        for kind, phrase in enumerate(PHRASES[language]):
            if match := re.fullmatch(re.escape(phrase).replace(r"\{\}", r"([\w-]+)"), prompt):
                kinds.add(kind)
                assert words[compute[kind](*(words.index(word) for word in match.groups()))] == target
                break
        else:
            raise AssertionError(prompt)
    assert kinds == {0, 1, 2, 3}


@pytest.mark.parametrize("name", [*SKILLS, *LANGUAGES])
def test_splits_are_disjoint_of_full_size_and_always_the_same(name):
    task, again = embedded_task(name), load_tasks([name])[0]
    assert (len(task.train), len(task.validation), len(task.test)) == (500, 100, 100)
    prompts = [prompt for prompt, _ in task.train + task.validation + task.test]
    assert len(set(prompts)) == 700
    assert task == again


@pytest.mark.parametrize("name", SKILLS)
def test_no_answer_is_nearly_always_right(name):
    targets = [target for _, target in embedded_task(name).test]
    assert max(targets.count(target) for target in targets) <= 65


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
