"""The Hub's tasks: templates on rows with the sets' real columns, loading on folders in the Hub's own formats."""

import json
from dataclasses import replace

import datasets
import pytest

from tinylora_mtl.data import hub
from tinylora_mtl.data.hub import HUB_TASKS, POOL, TAKE, hub_samples
from tinylora_mtl.data.tasks import TASK_SETS, load_tasks, require_samples

SCIENCE = {"id": "x", "question": "What do plants need?", "choices": {"text": ["sand", "light", "salt"],
                                                                      "label": ["A", "B", "C"]}, "answerKey": "B"}
# task: a row with the columns of the real set, what must be in the prompt in this order, and the target
ROWS = {
    "sst2": ({"sentence": "a dull film ", "label": 0, "idx": 0}, ["Sentence: a dull film\n"], "negative"),
    "cola": ({"sentence": "Dogs barks.", "label": 0, "idx": 7}, ["Sentence: Dogs barks."], "unacceptable"),
    "qqp": ({"question1": "Who am I?", "question2": "What am I?", "label": 1, "idx": 1},
            ["Question 1: Who am I?", "Question 2: What am I?"], "duplicate"),
    "mrpc": ({"sentence1": "It rained.", "sentence2": "Rain fell.", "label": 1, "idx": 2},
             ["Sentence 1: It rained.", "Sentence 2: Rain fell."], "equivalent"),
    "qnli": ({"question": "When?", "sentence": "In May.", "label": 0, "idx": 3},
             ["Question: When?", "Sentence: In May."], "entailment"),
    "mnli": ({"premise": "It is red.", "hypothesis": "It is blue.", "label": 2, "idx": 4},
             ["Premise: It is red.", "Hypothesis: It is blue."], "contradiction"),
    "boolq": ({"question": "is it so", "answer": True, "passage": "It is so."},
              ["Passage: It is so.", "Question: is it so"], "true"),
    "piqa": ({"goal": "Open a can", "sol1": "Shout at it.", "sol2": "Use an opener.", "label": 1},
             ["Goal: Open a can", "A. Shout at it.", "B. Use an opener."], "B"),
    "social_i_qa": ({"context": "Ann gave Bob a coat.", "question": "Why?", "answerA": "spite",
                     "answerB": "he was cold", "answerC": "no reason", "label": "2"},
                    ["Context: Ann gave Bob a coat.", "Question: Why?", "A. spite", "B. he was cold"], "B"),
    "winogrande": ({"sentence": "Ann beat Bea because _ was fast.", "option1": "Ann", "option2": "Bea", "answer": "1"},
                   ["Ann beat Bea because _ was fast.", "A. Ann", "B. Bea"], "A"),
    "openbookqa": ({"id": "7-9", "question_stem": "The sun is", "choices": {"text": ["cold", "hot", "wet", "far below"],
                                                                           "label": ["A", "B", "C", "D"]},
                    "answerKey": "B"}, ["Question: The sun is", "A. cold", "B. hot", "D. far below"], "B"),
    "arc_easy": (SCIENCE, ["Question: What do plants need?", "A. sand", "B. light", "C. salt"], "B"),
    "arc_challenge": (SCIENCE | {"choices": {"text": ["sand", "light"], "label": ["1", "2"]}, "answerKey": "2"},
                      ["Question: What do plants need?", "A. sand", "B. light"], "B"),
    "cosmos_qa": ({"id": "3B", "context": "I went home.", "question": "Why?", "answer0": "bored", "answer1": "tired",
                   "answer2": "late", "answer3": "None of the above choices .", "label": 3},
                  ["Context: I went home.", "Question: Why?", "A. bored", "D. None of the above"], "D"),
    "common_gen": ({"concept_set_idx": 0, "concepts": ["ski", "mountain"], "target": "She skis down the mountain."},
                   ["Words: ski, mountain"], "She skis down the mountain."),
    "dart": ({"tripleset": [["Mars", "COLOUR", "red"], ["Mars", "KIND", "planet"]], "subtree_was_extended": False,
              "annotations": {"source": ["WikiSQL"], "text": ["Mars\tis a red planet"]}},
             ["Facts: Mars | COLOUR | red; Mars | KIND | planet"], "Mars is a red planet"),
    "metamath_qa": ({"type": "GSM_Rephrased", "query": "What is 40 + 2?", "original_question": "40 + 2 = ?",
                     "response": "40 + 2 = 42.\nThe answer is: 42"}, ["Problem: What is 40 + 2?"], "42"),
    "natural_questions": ({"question": "who wrote it", "answer": ["Ann Lee", "Lee"]}, ["Question: who wrote it"],
                          "Ann Lee"),
    "gsm8k": ({"question": "Ann has 600 and buys twice as many. Total?", "answer": "2 * 600 = <<2*600=1200>>1,200\n"
               "So 1,800.\n#### 1,800"}, ["Problem: Ann has 600"], "1,800"),
    "bbh_navigate": ({"input": "If you follow these instructions ... ?\nOptions:\n- Yes\n- No", "target": "No"},
                     ["Options:\n- Yes\n- No"], "No"),
}
WITHOUT_A_LABEL = {
    "sst2": {"label": -1}, "qnli": {"label": -1}, "mnli": {"label": -1}, "piqa": {"label": -1},
    "cosmos_qa": {"label": -1}, "social_i_qa": {"label": ""}, "winogrande": {"answer": ""},
    "arc_easy": {"answerKey": ""}, "common_gen": {"target": ""}, "metamath_qa": {"response": "I do not know."},
    "gsm8k": {"answer": "no result"}, "natural_questions": {"answer": []},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def publish(folder, rows, config, style):
    """Rows per split in a folder as the Hub has them: parquet or JSON files, and a README that names them."""
    files = []
    for split, content in rows.items():
        name = f"{config or 'data'}/{split}/0000.{style}" if style == "parquet" else f"{split}.json"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if style == "parquet":
            datasets.Dataset.from_list(content).to_parquet(folder / name)
        else:
            (folder / name).write_text(json.dumps(content))
        files.append(f"  - split: {split}\n    path: {name}\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n"
                                      f"{''.join(files)}---\n")
    return str(folder)


def put_in_place(monkeypatch, name, folder, rows, style="parquet"):
    """The entry of a task with its repository replaced by a folder that holds these rows."""
    path = publish(folder / name, rows, HUB_TASKS[name].config, style)
    monkeypatch.setitem(HUB_TASKS, name, replace(HUB_TASKS[name], path=path, revision=None))


def test_every_entry_has_a_row_here_and_its_splits_keep_their_names():
    assert set(ROWS) == set(HUB_TASKS) - set(TASK_SETS["bbh"]) | {"bbh_navigate"}
    assert len(TASK_SETS["bbh"]) == 27
    for entry in HUB_TASKS.values():
        for ours, theirs in entry.splits.items():
            assert theirs in (ours, "validation_matched")  # only MNLI's has another name; none is renamed to test
    evaluated = {name: set(HUB_TASKS[name].splits) for name in HUB_TASKS}
    assert all(splits == {"test"} for name, splits in evaluated.items() if name.startswith("bbh_"))
    for name in ("sst2", "qnli", "winogrande", "social_i_qa", "piqa", "boolq"):
        assert "test" not in evaluated[name]  # its labels are not public


@pytest.mark.parametrize("name", ROWS)
def test_templates_on_real_columns(name):
    row, parts, target = ROWS[name]
    prompt, answer = HUB_TASKS[name].template(row)
    places = [prompt.index(part) for part in parts]
    assert places == sorted(places) and answer == target
    assert prompt.endswith(("\nAnswer:", "\nSentence:")) and "\n" not in answer


@pytest.mark.parametrize("name", WITHOUT_A_LABEL)
def test_rows_without_a_label_are_dropped(name):
    assert HUB_TASKS[name].template(ROWS[name][0] | WITHOUT_A_LABEL[name]) is None


def test_every_label_has_its_own_word_and_none_is_other():
    for name in ("sst2", "cola", "qqp", "mrpc", "qnli", "mnli"):
        count = 3 if name == "mnli" else 2
        words = [HUB_TASKS[name].template(ROWS[name][0] | {"label": label})[1] for label in range(count)]
        assert len(set(words)) == len(words) and "other" not in words
    assert [HUB_TASKS["boolq"].template(ROWS["boolq"][0] | {"answer": answer})[1] for answer in (False, True)] \
        == ["false", "true"]
    assert [HUB_TASKS["social_i_qa"].template(ROWS["social_i_qa"][0] | {"label": label})[1] for label in "123"] \
        == ["A", "B", "C"]
    assert [HUB_TASKS["winogrande"].template(ROWS["winogrande"][0] | {"answer": answer})[1] for answer in "12"] \
        == ["A", "B"]


def made_unique(row, mark):
    """The row with another prompt."""
    for column, value in row.items():
        if column in ("sentence", "question", "question1", "sentence1", "premise", "goal", "question_stem", "query",
                      "input"):
            return row | {column: f"{value} {mark}"}
    return row | ({"tripleset": [["a", "b", mark]]} if "tripleset" in row else {"concepts": ["ski", mark]})


@pytest.mark.parametrize("name", ROWS)
def test_loading_from_a_folder_in_the_hubs_format(tmp_path, monkeypatch, name):
    row, _, target = ROWS[name]
    rows = {theirs: [made_unique(row, f"{theirs} {i}") for i in range(30)]
            for theirs in HUB_TASKS[name].splits.values()}
    put_in_place(monkeypatch, name, tmp_path, rows)
    task, = load_tasks([name])
    sizes = {split: len(getattr(task, split)) for split in ("train", "validation", "test")}
    if name in ("gsm8k", "metamath_qa"):  # without a validation split of its own: a tenth of the training samples
        assert sizes["train"] == 27 and sizes["validation"] == 3
    else:
        assert all(sizes[split] == (30 if split in HUB_TASKS[name].splits else 0) for split in sizes)
    assert {answer for split in sizes for _, answer in getattr(task, split)} == {target}


def test_json_files_load_too_and_unlabelled_rows_are_gone(tmp_path, monkeypatch):
    rows = [{"question": f"q{i}", "sentence": "s", "label": i % 3 - 1, "idx": i} for i in range(30)]
    put_in_place(monkeypatch, "qnli", tmp_path, {"train": rows[:24], "validation": rows[24:]}, "json")
    task, = load_tasks(["qnli"])
    assert len(task.train) == 16 and len(task.validation) == 4 and task.labels == ("entailment", "not_entailment")
    with pytest.raises(ValueError, match="task 'qnli' has no test samples; it has: 16 train, 4 validation; --split"):
        require_samples([task], "train", "test")


@pytest.mark.parametrize("name", ["openbookqa", "arc_easy", "arc_challenge"])
def test_test_rows_are_not_in_training(tmp_path, monkeypatch, name):
    """Even where the published splits share a question."""
    key = "question_stem" if name == "openbookqa" else "question"
    rows = [ROWS[name][0] | {key: f"question {i}"} for i in range(20)]
    put_in_place(monkeypatch, name, tmp_path, {"train": rows[:12], "validation": rows[10:15], "test": rows[5:8]})
    task, = load_tasks([name])
    numbers = [[prompt.split("question ")[1].split("\n")[0] for prompt, _ in split]
               for split in (task.train, task.validation, task.test)]
    assert sorted(map(int, numbers[0])) == [0, 1, 2, 3, 4, 8, 9] and len(numbers[1]) == 5 and len(numbers[2]) == 3


def test_winogrande_reads_one_subset(tmp_path, monkeypatch):
    """Of two subsets in the folder, as the Hub has them, the larger one and nothing of the other."""
    rows = [ROWS["winogrande"][0] | {"sentence": f"_ {i}"} for i in range(9)]
    folder = tmp_path / "sets"
    publish(folder, {"train": rows[:2], "validation": rows[:1]}, "winogrande_xs", "parquet")
    first = (folder / "README.md").read_text()
    publish(folder, {"train": rows[2:], "validation": rows[1:3]}, "winogrande_xl", "parquet")
    second = (folder / "README.md").read_text().split("configs:\n")[1]
    (folder / "README.md").write_text(first.removesuffix("---\n") + second)
    monkeypatch.setitem(HUB_TASKS, "winogrande", replace(HUB_TASKS["winogrande"], path=str(folder)))
    sizes = {split: len(samples) for split, samples in hub_samples("winogrande").items()}
    assert sizes == {"train": 7, "validation": 2}


def test_a_converted_set_loads_from_its_own_layout(tmp_path, monkeypatch):
    """The Hub's parquet branch has no README: CosmosQA and DART are found by the folders' names."""
    for split in ("train", "validation"):
        folder = tmp_path / "cosmos" / "default" / split
        folder.mkdir(parents=True)
        datasets.Dataset.from_list([ROWS["cosmos_qa"][0]] * 3).to_parquet(folder / "0000.parquet")
    entry = replace(HUB_TASKS["cosmos_qa"], path=str(tmp_path / "cosmos"), revision=None)
    monkeypatch.setitem(HUB_TASKS, "cosmos_qa", entry)
    assert {split: len(samples) for split, samples in hub_samples("cosmos_qa").items()} == {"train": 3, "validation": 3}


def test_a_large_set_is_read_in_part_and_once(tmp_path, monkeypatch):
    """Drawn from all over the first rows; the second time nothing is read, so the network may be gone."""
    rows = [{"sentence": f"s {i}", "label": int(i >= POOL / 2), "idx": i} for i in range(POOL + 5000)]
    put_in_place(monkeypatch, "sst2", tmp_path, {"train": rows, "validation": rows[:10]})
    first = hub_samples("sst2")
    assert len(first["train"]) == TAKE["train"] == 2000 and len(first["validation"]) == 10
    assert max(int(prompt.split("s ")[-1].split("\n")[0]) for prompt, _ in first["train"]) < POOL
    assert 800 < sum(target == "positive" for _, target in first["train"]) < 1200

    def broken(*args, **kwargs):
        raise AssertionError("the set was read again")
    monkeypatch.setattr(datasets, "load_dataset", broken)
    assert hub_samples("sst2") == first


def test_a_set_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    class NoNetwork:
        def dataset_info(self, path, timeout):
            raise ConnectionError("no route to the Hub")
    monkeypatch.setattr(hub, "HfApi", NoNetwork)
    with pytest.raises(ValueError, match=r"task 'boolq' cannot be had from 'google/boolq' on the Hugging Face Hub "
                                         r"\(no route to the Hub\); without a network, give the path of a folder"):
        load_tasks(["boolq"])
    other = [{"text": "x", "label": 1}]
    put_in_place(monkeypatch, "sst2", tmp_path, {"train": other, "validation": other})
    with pytest.raises(ValueError, match="task 'sst2' cannot be had .*sentence"):
        load_tasks(["sst2"])
