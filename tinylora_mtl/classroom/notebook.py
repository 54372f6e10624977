"""The walkthrough as a notebook: python -m tinylora_mtl.classroom.notebook walkthrough.ipynb

Write it beside walkthrough.md, for its pictures are found from there.
"""

import json
import re
import sys
from pathlib import Path

WALKTHROUGH = Path(__file__).parents[2] / "walkthrough.md"
TO_RUN = re.compile(r"(?<!-->\n)```(python|bash)\n(.*?)```\n", re.DOTALL)  # after a comment stands what is only shown


def cells(text):
    """The cells of a notebook: a document's text, and between it the blocks that a reader runs."""
    found, parts = [], TO_RUN.split(text)  # text, language, block, text, …
    for content, language, block in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""]):
        found.append({"cell_type": "markdown", "source": content.strip("\n")})
        if language == "bash":  # with the Python that runs the notebook
            block = "import sys\n" + re.sub(r"^python -m", "!{sys.executable} -m", block, flags=re.MULTILINE)
        found.append({"cell_type": "code", "source": block.strip("\n"), "outputs": [], "execution_count": None})
    found = [cell for cell in found if cell["source"]]
    return [cell | {"id": f"cell-{number}", "metadata": {}} for number, cell in enumerate(found)]


def main(argv=None):
    """Write the notebook."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not arguments[0].endswith(".ipynb"):
        raise ValueError("one file is to be named: python -m tinylora_mtl.classroom.notebook walkthrough.ipynb")
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"language_info": {"name": "python"}},
               "cells": cells(WALKTHROUGH.read_text(encoding="utf-8"))}
    Path(arguments[0]).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{len(content['cells'])} cells are in {arguments[0]}")


if __name__ == "__main__":
    from ..run.cli import run_command
    run_command(main)
