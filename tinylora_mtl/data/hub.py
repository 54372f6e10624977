"""The papers' tasks from the Hugging Face Hub: one entry each, with its place, its splits and its template.

    python -m tinylora_mtl.train --model HuggingFaceTB/SmolLM2-135M --tasks sst2 qqp cola --split validation

A template turns a row of the set into (prompt, target), or into None where the row has no label. The splits keep the
names they have on the Hub: where the labels of the test split are not public (GLUE, BoolQ, PIQA, WinoGrande, ...) the
task has no test samples. At most TAKE rows of a split are used, drawn from its first POOL rows. These are read as a
stream, so a large set is not downloaded whole; `datasets` keeps the drawn rows, and the next run needs no network.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from huggingface_hub import HfApi

TAKE = {"train": 2000, "validation": 500, "test": 500}
POOL = 10_000
LETTERS = "ABCDE"


@dataclass(frozen=True)
class HubTask:
    """Where a set is and what to make of its rows."""

    path: str  # repository on the Hub (or a local folder with the same files)
    template: Callable  # row -> (prompt, target), or None for a row without a label
    splits: dict  # our split -> the set's own name for it
    config: str | None = None  # the subset, where a set has several
    revision: str | None = None  # the branch, where it is not the main one


def classification(row, question, words, label="label"):
    """A question with columns in {}, answered by the word for the label, a number from 0; None for any other label."""
    if row[label] not in range(len(words)):
        return None
    return f"{filled(question, row)}\nAnswer:", words[row[label]]


def multiple_choice(row, question, options, index):
    """A question with columns in {}, lettered options, and the letter of the right one; None if `index` is of none."""
    if index not in range(len(options)):
        return None
    listed = "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options))
    return f"Choose the correct answer.\n{filled(question, row)}\n{listed}\nAnswer:", LETTERS[index]


def science_question(row, question="Question: {question}"):
    """ARC and OpenBookQA: the key is a letter or a digit, whichever the options of this row are named by."""
    names, key = list(row["choices"]["label"]), row["answerKey"]
    return multiple_choice(row, question, row["choices"]["text"], names.index(key) if key in names else -1)


def free_answer(row, prompt, answer):
    """A prompt with columns in {}, and the answer on one line; None for an empty one."""
    return (filled(prompt, row), " ".join(answer.split())) if answer.strip() else None


def math_problem(row, problem, solution, mark):
    """Answered by what comes after the last `mark` of the solution, so that it can be scored."""
    prompt = f"Solve the problem. Reply with the final answer only.\nProblem: {problem}\nAnswer:"
    return free_answer(row, prompt, solution.rpartition(mark)[2] if mark in solution else "")


def filled(text, row):
    """The text with a row's columns in its {}."""
    return text.format(**{column: str(value).strip() for column, value in row.items()})


VALIDATED = {"train": "train", "validation": "validation"}  # the test labels are not public
TESTED = VALIDATED | {"test": "test"}
CONVERTED = "refs/convert/parquet"  # the Hub's own conversion of a set that has only a loading script
BBH = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()

HUB_TASKS = {
    "sst2": HubTask("nyu-mll/glue", lambda row: classification(
        row, "Classify the sentiment of the sentence as positive or negative.\nSentence: {sentence}",
        ["negative", "positive"]), VALIDATED, "sst2"),
    "cola": HubTask("nyu-mll/glue", lambda row: classification(
        row, "Is the sentence grammatically acceptable or unacceptable?\nSentence: {sentence}",
        ["unacceptable", "acceptable"]), VALIDATED, "cola"),
    "qqp": HubTask("nyu-mll/glue", lambda row: classification(
        row, "Do the questions ask the same thing? Reply duplicate or different.\n"
        "Question 1: {question1}\nQuestion 2: {question2}", ["different", "duplicate"]), VALIDATED, "qqp"),
    "mrpc": HubTask("nyu-mll/glue", lambda row: classification(
        row, "Do the sentences mean the same? Reply equivalent or different.\n"
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}", ["different", "equivalent"]), TESTED, "mrpc"),
    "qnli": HubTask("nyu-mll/glue", lambda row: classification(
        row, "Does the sentence answer the question? Reply entailment or not_entailment.\n"
        "Question: {question}\nSentence: {sentence}", ["entailment", "not_entailment"]), VALIDATED, "qnli"),
    "mnli": HubTask("nyu-mll/glue", lambda row: classification(
        row, "Does the premise entail the hypothesis? Reply entailment, neutral or contradiction.\n"
        "Premise: {premise}\nHypothesis: {hypothesis}", ["entailment", "neutral", "contradiction"]),
        {"train": "train", "validation": "validation_matched"}, "mnli"),
    "boolq": HubTask("google/boolq", lambda row: classification(
        row, "Read the passage and answer the question with true or false.\nPassage: {passage}\nQuestion: {question}",
        ["false", "true"], label="answer"), VALIDATED),
    "piqa": HubTask("baber/piqa", lambda row: multiple_choice(
        row, "Goal: {goal}", [row["sol1"], row["sol2"]], int(row["label"])), VALIDATED),
    "social_i_qa": HubTask("lighteval/siqa", lambda row: multiple_choice(
        row, "Context: {context}\nQuestion: {question}", [row["answerA"], row["answerB"], row["answerC"]],
        int(row["label"] or 0) - 1), VALIDATED),  # "1", "2", "3", or "" where there is no label
    "winogrande": HubTask("allenai/winogrande", lambda row: multiple_choice(
        row, "Fill the blank _ in: {sentence}", [row["option1"], row["option2"]], int(row["answer"] or 0) - 1),
        VALIDATED, "winogrande_xl"),
    "openbookqa": HubTask("allenai/openbookqa", lambda row: science_question(row, "Question: {question_stem}"), TESTED,
                          "main"),
    "arc_easy": HubTask("allenai/ai2_arc", science_question, TESTED, "ARC-Easy"),
    "arc_challenge": HubTask("allenai/ai2_arc", science_question, TESTED, "ARC-Challenge"),
    "cosmos_qa": HubTask("allenai/cosmos_qa", lambda row: multiple_choice(
        row, "Context: {context}\nQuestion: {question}", [row[f"answer{number}"] for number in range(4)],
        int(row["label"])), VALIDATED, revision=CONVERTED),
    "common_gen": HubTask("allenai/common_gen", lambda row: free_answer(
        row | {"words": ", ".join(row["concepts"])}, "Write a sentence with these words.\nWords: {words}\nSentence:",
        row["target"]), VALIDATED),
    "dart": HubTask("Yale-LILY/dart", lambda row: free_answer(
        row | {"facts": "; ".join(" | ".join(triple) for triple in row["tripleset"])},
        "Describe the facts in one sentence.\nFacts: {facts}\nSentence:", row["annotations"]["text"][0]), TESTED,
        revision=CONVERTED),
    # It has many wordings of one original question, so the validation split taken from it is an easy one.
    "metamath_qa": HubTask("meta-math/MetaMathQA", lambda row: math_problem(
        row, "{query}", row["response"], "The answer is:"), {"train": "train"}),
    "natural_questions": HubTask("google-research-datasets/nq_open", lambda row: free_answer(
        row, "Question: {question}\nAnswer:", (row["answer"] or [""])[0]), VALIDATED, "nq_open"),
    "gsm8k": HubTask("openai/gsm8k", lambda row: math_problem(row, "{question}", row["answer"], "####"),
                     {"train": "train", "test": "test"}, "main"),
} | {f"bbh_{name}": HubTask("SaylorTwift/bbh", lambda row: free_answer(row, "{input}\nAnswer:", row["target"]),
                            {"test": "test"}, name) for name in BBH}


def hub_samples(name):
    """{split: [(prompt, target), ...]} of an entry of HUB_TASKS, without the rows that have no label.

    Raises ValueError, naming the repository, for a set that cannot be had or has other columns than its entry says.
    """
    from datasets import Dataset  # here, because it takes a second and most runs do not need it

    entry, samples = HUB_TASKS[name], {}
    try:
        for split, theirs in entry.splits.items():
            request = {"path": entry.path, "config": entry.config, "split": theirs, "count": TAKE[split], "pool": POOL,
                       "revision": entry.revision}  # together the name of the rows in the cache
            rows = Dataset.from_generator(stream_rows, gen_kwargs=request)
            samples[split] = [sample for sample in map(entry.template, rows) if sample]
    except Exception as error:  # of many kinds: network, files, columns, by way of several libraries
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"task {name!r} cannot be had from {entry.path!r} on the Hugging Face Hub ({reason}); "
                         "without a network, give the path of a folder with train.jsonl and test.jsonl") from error
    return samples


def stream_rows(path, config, split, count, pool, revision):
    """Yield `count` rows of a split, drawn with a fixed seed from its first `pool` rows."""
    from datasets import load_dataset

    if not Path(path).is_dir():
        HfApi().dataset_info(path, timeout=10)  # asked once: loading would try for minutes before it gave up
    rows = list(load_dataset(path, config, split=split, revision=revision, streaming=True).take(pool))
    yield from random.Random(0).sample(rows, min(count, len(rows)))
