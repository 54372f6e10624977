r"""The papers' tasks from the Hugging Face Hub: one entry each, with its place, its splits and its template.

    python -m tinylora_mtl.train --model HuggingFaceTB/SmolLM2-135M --tasks sst2 qqp cola --split validation

A template turns a row of the set into (prompt, target), or into None where the row has no label. The splits keep the
names they have on the Hub: where the labels of the test split are not public (GLUE, BoolQ, PIQA, WinoGrande, ...) the
task has no test samples, and what is measured on its validation split is called that.

At most TAKE rows of a split are used, drawn from its first POOL rows. These are read as a stream, so a large set is not
downloaded whole; the `datasets` library keeps the drawn rows in its cache, and the next run needs no network.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from huggingface_hub import HfApi

TAKE = {"train": 2000, "validation": 500, "test": 500}
POOL = 10_000  # the first rows of a split, from which those are drawn
LETTERS = "ABCDE"
CONVERTED = {"revision": "refs/convert/parquet"}  # the Hub's own conversion of a set that has only a loading script


@dataclass(frozen=True)
class HubTask:
    """Where a set is and what to make of its rows."""

    path: str  # repository on the Hub (or a local folder with the same files)
    template: Callable  # row -> (prompt, target), or None for a row without a label
    splits: dict  # our split -> the set's own name for it
    config: str | None = None  # the subset, where a set has several
    options: dict = field(default_factory=dict)  # more arguments for load_dataset


# ------------------------------------------------------------------------------------------------------- templates
def classification(instruction, columns, labels, label="label"):
    """A template: instruction, the columns (title -> name), and the label's word; labels: value in the row -> word."""
    def template(row):
        if row[label] not in labels:
            return None
        text = "\n".join(f"{title}: {row[column].strip()}" for title, column in columns.items())
        return f"{instruction}\n{text}\nAnswer:", labels[row[label]]
    return template


def multiple_choice(question, options, index):
    """(prompt, target): lettered options and the letter of the right one; None if `index` is not one of them."""
    if index not in range(len(options)):
        return None
    listed = "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options))
    return f"Choose the correct answer.\n{question}\n{listed}\nAnswer:", LETTERS[index]


def choices(question, options, label, first=0):
    """A template: a question with columns in {}, the columns of the options, and that of the right one's number.

    first: the number of the first option in that column."""
    def template(row):
        asked = question.format(**{column: str(value).strip() for column, value in row.items()})
        return multiple_choice(asked, [row[option] for option in options], number(row[label]) - first)
    return template


def openbookqa(row):
    return science_question(row | {"question": row["question_stem"]})


def science_question(row):
    """ARC and OpenBookQA: the key is a letter or a digit, whichever the options of this question are named by."""
    names, key = list(row["choices"]["label"]), row["answerKey"]
    return multiple_choice(f"Question: {row['question'].strip()}", row["choices"]["text"],
                           names.index(key) if key in names else -1)


def common_gen(row):
    if not row["target"].strip():
        return None
    words = ", ".join(row["concepts"])
    return f"Write a sentence with these words.\nWords: {words}\nSentence:", one_line(row["target"])


def dart(row):
    triples = "; ".join(" | ".join(triple) for triple in row["tripleset"])
    return f"Describe the facts in one sentence.\nFacts: {triples}\nSentence:", one_line(row["annotations"]["text"][0])


def math_problem(question, solution, mark):
    """A template with the final answer only, after the last `mark`: it can be scored, and fits on one line."""
    def template(row):
        _, found, answer = row[solution].rpartition(mark)
        prompt = f"Solve the problem. Reply with the final answer only.\nProblem: {row[question].strip()}\nAnswer:"
        return (prompt, one_line(answer)) if found and answer.strip() else None
    return template


def natural_questions(row):
    """The first of the accepted answers."""
    return (f"Question: {row['question'].strip()}\nAnswer:", one_line(row["answer"][0])) if row["answer"] else None


def big_bench_hard(row):
    return f"{row['input'].strip()}\nAnswer:", one_line(row["target"])


def number(text):
    """The number in a label column, some of which hold texts; 0 where it is empty."""
    return int(text) if str(text).strip() else 0


def one_line(text):
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------------------- the sets
VALIDATED = {"train": "train", "validation": "validation"}  # the test labels are not public
TESTED = VALIDATED | {"test": "test"}
ENTAILMENT = {0: "entailment", 1: "not_entailment"}
BBH = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()

HUB_TASKS = {
    "sst2": HubTask("nyu-mll/glue", classification(
        "Classify the sentiment of the sentence as positive or negative.", {"Sentence": "sentence"},
        {0: "negative", 1: "positive"}), VALIDATED, "sst2"),
    "cola": HubTask("nyu-mll/glue", classification(
        "Is the sentence grammatically acceptable or unacceptable?", {"Sentence": "sentence"},
        {0: "unacceptable", 1: "acceptable"}), VALIDATED, "cola"),
    "qqp": HubTask("nyu-mll/glue", classification(
        "Do the questions ask the same thing? Reply duplicate or different.",
        {"Question 1": "question1", "Question 2": "question2"}, {0: "different", 1: "duplicate"}), VALIDATED, "qqp"),
    "mrpc": HubTask("nyu-mll/glue", classification(
        "Do the sentences mean the same? Reply equivalent or different.",
        {"Sentence 1": "sentence1", "Sentence 2": "sentence2"}, {0: "different", 1: "equivalent"}), TESTED, "mrpc"),
    "qnli": HubTask("nyu-mll/glue", classification(
        "Does the sentence answer the question? Reply entailment or not_entailment.",
        {"Question": "question", "Sentence": "sentence"}, ENTAILMENT), VALIDATED, "qnli"),
    "mnli": HubTask("nyu-mll/glue", classification(
        "Does the premise entail the hypothesis? Reply entailment, neutral or contradiction.",
        {"Premise": "premise", "Hypothesis": "hypothesis"}, {0: "entailment", 1: "neutral", 2: "contradiction"}),
        {"train": "train", "validation": "validation_matched"}, "mnli"),
    "boolq": HubTask("google/boolq", classification(
        "Read the passage and answer the question with true or false.",
        {"Passage": "passage", "Question": "question"}, {True: "true", False: "false"}, label="answer"), VALIDATED),
    "piqa": HubTask("baber/piqa", choices("Goal: {goal}", ["sol1", "sol2"], "label"), VALIDATED),
    "social_i_qa": HubTask("lighteval/siqa", choices(
        "Context: {context}\nQuestion: {question}", ["answerA", "answerB", "answerC"], "label", first=1), VALIDATED),
    "winogrande": HubTask("allenai/winogrande", choices(
        "Fill the blank _ in: {sentence}", ["option1", "option2"], "answer", first=1), VALIDATED, "winogrande_xl"),
    "openbookqa": HubTask("allenai/openbookqa", openbookqa, TESTED, "main"),
    "arc_easy": HubTask("allenai/ai2_arc", science_question, TESTED, "ARC-Easy"),
    "arc_challenge": HubTask("allenai/ai2_arc", science_question, TESTED, "ARC-Challenge"),
    "cosmos_qa": HubTask("allenai/cosmos_qa", choices(
        "Context: {context}\nQuestion: {question}", ["answer0", "answer1", "answer2", "answer3"], "label"), VALIDATED,
        options=CONVERTED),
    "common_gen": HubTask("allenai/common_gen", common_gen, VALIDATED),
    "dart": HubTask("Yale-LILY/dart", dart, TESTED, options=CONVERTED),
    # It has many wordings of one original question, so the validation split taken from it is an easy one.
    "metamath_qa": HubTask("meta-math/MetaMathQA", math_problem("query", "response", "The answer is:"),
                           {"train": "train"}),
    "natural_questions": HubTask("google-research-datasets/nq_open", natural_questions, VALIDATED, "nq_open"),
    "gsm8k": HubTask("openai/gsm8k", math_problem("question", "answer", "####"), {"train": "train", "test": "test"},
                     "main"),
} | {f"bbh_{name}": HubTask("SaylorTwift/bbh", big_bench_hard, {"test": "test"}, name) for name in BBH}


# ---------------------------------------------------------------------------------------------------------- loading
def hub_samples(name):
    """{split: [(prompt, target), ...]} of an entry of HUB_TASKS, without the rows that have no label.

    Raises ValueError, naming the repository, for a set that cannot be had or has other columns than its entry says.
    """
    entry = HUB_TASKS[name]
    try:
        rows = {split: hub_rows(entry.path, entry.config, theirs, TAKE[split], entry.options)
                for split, theirs in entry.splits.items()}
        samples = {split: [entry.template(row) for row in rows[split]] for split in rows}
    except Exception as error:  # of many kinds: network, files, columns, by way of several libraries
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"task {name!r} cannot be had from {entry.path!r} on the Hugging Face Hub ({reason}); "
                         "without a network, give the path of a folder with train.jsonl and test.jsonl") from error
    return {split: [sample for sample in samples[split] if sample is not None] for split in samples}


def hub_rows(path, config, split, count, options):
    """At most `count` rows of a split as a Dataset, from the cache of `datasets` after the first time."""
    from datasets import Dataset  # here, because it takes a second and most runs do not need it

    request = {"path": path, "config": config, "split": split, "count": count, "pool": POOL,
               "options": options}  # together the name of the rows in the cache
    return Dataset.from_generator(stream_rows, gen_kwargs=request)


def stream_rows(path, config, split, count, pool, options):
    """Yield `count` rows of a split, drawn with a fixed seed from its first `pool` rows."""
    from datasets import load_dataset

    if not Path(path).is_dir():
        HfApi().dataset_info(path, timeout=10)  # asked once: loading would try for minutes before it gave up
    rows = list(load_dataset(path, config, split=split, streaming=True, **options).take(pool))
    yield from random.Random(0).sample(rows, min(count, len(rows)))
