"""The grader: it tests the student's package with the teacher's tests, and says what Gradescope reads."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

import tinylora_mtl
from tinylora_mtl.classroom import blank, grade

PACKAGE = Path(tinylora_mtl.__file__).parent


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class") / "a teacher"
    blank.main(["--teacher", str(folder)])
    return folder


@pytest.fixture
def work(tmp_path):
    """What a student handed in: here, all of it right."""
    shutil.copytree(PACKAGE, tmp_path / "work" / "tinylora_mtl", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "work"


def rewrite(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_what_a_teacher_has(teacher, tmp_path):
    """All that a student should not have, and none of it in the handout."""
    blank.main([str(tmp_path / "handout")])
    handout = {path.name for path in (tmp_path / "handout").rglob("*")}
    mine = {path.name for path in teacher.iterdir()}
    assert mine == {"conftest.py", "test_exercises.py", "test_hidden.py", "marks.json", "answers.md", "solutions.md",
                    "pytest.ini"}
    assert not handout & {"test_hidden.py", "marks.json", "answers.md", "solutions.md"}
    solutions = (teacher / "solutions.md").read_text(encoding="utf-8")
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for tag, name, first, last in blank.exercises(text):
            assert f"## {tag}: `{name}`" in solutions and "\n".join(text.splitlines()[first - 1:last]) in solutions
    with pytest.raises(FileExistsError, match="is there already"):
        blank.main(["--teacher", str(teacher)])


def test_the_marks(teacher, work, tmp_path, capsys):
    """One exercise wrong in a way that the student's own tests do not see, one still to be done, all else right."""
    rewrite(work / "tinylora_mtl" / "lora.py", "        return self.scaling * self.lora_B",
            "        return (3.0 if self.scaling == 3 else 2.0) * self.lora_B")  # as in the student's tests
    rewrite(work / "tinylora_mtl" / "meta.py", "        parameter -= inner_lr * gradient",
            '        raise NotImplementedError("exercise ex7, inner_step, is still to be done")')
    (work / "tests").mkdir()
    (work / "tests" / "conftest.py").write_text("raise SystemExit('the student settles it')")
    (work / "pytest.py").write_text("raise SystemExit('the student settles it')")  # never the student's grader
    results = grade.main([str(work), "--tests", str(teacher)])
    assert json.loads((work / "results.json").read_text()) == results
    marks = json.loads((teacher / "marks.json").read_text())
    assert sum(marks.values()) == 100
    lines = {tag: [line for line in results["tests"] if line["name"].startswith(f"{tag} ")] for tag in marks}
    for tag, most in marks.items():
        assert sum(line["max_score"] for line in lines[tag]) == pytest.approx(most)
        failed = [line for line in lines[tag] if line["status"] == "failed"]
        if tag == "ex2":
            assert failed and {line["visibility"] for line in failed} == {"hidden"}
            assert all("ΔW = s · B A" in line["output"] for line in failed)
        elif tag in ("ex7", "ex8"):  # ex8 takes its steps with ex7
            assert failed and any("ex7, inner_step, is still to be done" in line["output"] for line in failed)
        else:
            assert not failed
        assert all((line["score"] > 0) == (line["status"] == "passed") for line in lines[tag])
    assert results["score"] == pytest.approx(sum(line["score"] for line in results["tests"]), abs=0.01)
    cases = list(ElementTree.parse(work / "junit.xml").iter("testcase"))
    assert len(cases) == len(results["tests"])
    shown = capsys.readouterr().out
    assert "ex1  8 of 8 tests, 8 of 8" in shown and "ex7  0 of 5 tests, 0 of 4" in shown
    assert not [path for path in work.rglob("__pycache__")]


def test_a_package_that_cannot_be_imported_gets_nothing_and_is_told_why(teacher, work):
    rewrite(work / "tinylora_mtl" / "lora.py", "    def delta(self):", "    def delta(self)")
    results = grade.grade(work, teacher)
    assert results["score"] == 0 and len(results["tests"]) == 9
    assert all("SyntaxError" in line["output"] and "lora.py" in line["output"] for line in results["tests"])


@pytest.mark.slow
def test_a_loop_without_end_costs_its_own_exercise_alone(teacher, work, monkeypatch):
    monkeypatch.setattr(grade, "LIMIT", 25)
    rewrite(work / "tinylora_mtl" / "multihead.py", "    side_by_side = heads", "    while True:\n        pass\n    side_by_side = heads")
    few = {"ex1": 1, "ex3": 2}
    monkeypatch.setattr(grade.json, "loads", lambda text: few)
    results = grade.grade(work, teacher)
    assert [line["status"] for line in results["tests"] if line["name"].startswith("ex1")] == ["passed"] * 8
    assert [line for line in results["tests"] if line["name"].startswith("ex3")] == [
        {"name": "ex3", "score": 0, "max_score": 2, "status": "failed", "output": "the tests did not end within 25 seconds"}]


@pytest.mark.parametrize("there", [(), ("tinylora_mtl",)])
def test_folders_that_are_not_what_they_should_be(tmp_path, there):
    for name in there:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="there is no"):
        grade.grade(tmp_path, tmp_path)
