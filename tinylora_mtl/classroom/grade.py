"""Grade what a student handed in: python -m tinylora_mtl.classroom.grade DIR --tests TEACHER

DIR is the handout, filled in; TEACHER is what `blank --teacher` wrote (left out: the tests of this copy of the source).
Only the package in DIR is the student's: it is copied aside and tested there, by the teacher's tests, so that no test
or setting of the student's counts. Writes DIR/results.json, as Gradescope reads it, and DIR/junit.xml. An exercise's
marks are shared out among its tests. The student's code runs as you: grade where it can do no harm.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from .blank import PACKAGE, make_teachers_folder

LIMIT = 120  # seconds; if the tests have not ended by then, each exercise is tested alone, for as long


def grade(folder, tests):
    """Test the package in a folder; returns what is in results.json. ValueError for folders that are not what they
    should be."""
    folder, tests = Path(folder).resolve(), Path(tests).resolve()
    for needed in (folder / PACKAGE.name, tests / "marks.json"):
        if not needed.exists():
            raise ValueError(f"there is no {needed}")
    marks = json.loads((tests / "marks.json").read_text(encoding="utf-8"))
    with TemporaryDirectory() as aside:
        shutil.copytree(folder / PACKAGE.name, Path(aside) / "package" / PACKAGE.name)
        cases = run_tests(tests, Path(aside), marks)
    report = ElementTree.Element("testsuites")
    ElementTree.SubElement(report, "testsuite", name="exercises").extend(cases)
    ElementTree.ElementTree(report).write(folder / "junit.xml", encoding="utf-8")
    results = {"tests": [line for tag, most in marks.items() for line in lines_of(tag, most, cases)]}
    results["score"] = round(sum(line["score"] for line in results["tests"]), 2)
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def run_tests(tests, aside, marks):
    """The test cases of pytest's report, XML elements; of an exercise whose tests do not end there are none."""
    def cases(limit, *options):
        environment = os.environ | {"PYTHONPATH": str(aside / "package"), "OMP_NUM_THREADS": "1",
                                    "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tests}",
                   f"--junitxml={aside / 'junit.xml'}", *options, str(tests)]
        (aside / "junit.xml").unlink(missing_ok=True)
        done = subprocess.run(command, cwd=aside, env=environment, capture_output=True, text=True, timeout=limit)
        if (aside / "junit.xml").is_file():
            return list(ElementTree.parse(aside / "junit.xml").iter("testcase"))
        case = ElementTree.Element("testcase", name="the package", classname="")  # pytest could not even import it
        ElementTree.SubElement(case, "error").text = done.stdout + done.stderr
        return [case]
    try:
        return cases(LIMIT)
    except subprocess.TimeoutExpired:
        found = []
    for tag in marks:
        try:
            found += cases(LIMIT, "-m", tag)
        except subprocess.TimeoutExpired:
            pass
    return found


def lines_of(tag, most, cases):
    """Gradescope's entries for an exercise: one for each of its tests, or one that says why there are none."""
    own = [case for case in cases if re.match(rf"test_{tag}_", case.get("name"))]
    if not own:
        broken = [said for case in cases for said in case.iter("error")]
        why = broken[0].text.strip()[-1500:] if broken else f"the tests did not end within {LIMIT} seconds"
        return [{"name": tag, "score": 0, "max_score": most, "status": "failed", "output": why}]
    lines = []
    for case in own:
        wrong = [said for kind in ("failure", "error") for said in case.iter(kind)]
        said = [f"{part.get('message') or ''}\n{part.text or ''}".strip()[:3000] for part in wrong]
        lines.append({"name": case.get("name").removeprefix("test_").replace("_", " "),
                      "score": 0 if wrong else most / len(own), "max_score": most / len(own),
                      "status": "failed" if wrong else "passed", "output": "\n".join(said),
                      "visibility": "hidden" if "test_hidden" in case.get("classname") else "visible"})
    return lines


def main(argv=None):
    """Grade, and print a line for each exercise."""
    parser = argparse.ArgumentParser(prog="python -m tinylora_mtl.classroom.grade", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="the handout, filled in")
    parser.add_argument("--tests", help="the teacher's folder")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as own:
        results = grade(args.dir, args.tests or make_teachers_folder(Path(own) / "teacher"))
    for tag in dict.fromkeys(line["name"].split()[0] for line in results["tests"]):
        lines = [line for line in results["tests"] if line["name"].split()[0] == tag]
        print(f"{tag}  {sum(line['status'] == 'passed' for line in lines)} of {len(lines)} tests, "
              f"{sum(line['score'] for line in lines):.4g} of {sum(line['max_score'] for line in lines):.4g}")
    print(f"{results['score']:g} in all; results.json and junit.xml are in {args.dir}")
    return results


if __name__ == "__main__":
    from ..run.cli import run_command
    run_command(main)
