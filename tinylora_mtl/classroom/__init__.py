"""For teachers; whoever does not teach can pass this room by.

    python -m tinylora_mtl.classroom.blank handout             # for students: the package with nine gaps, their tests
    python -m tinylora_mtl.classroom.blank --teacher teacher   # solutions, answers to questions, more tests, the marks
    python -m tinylora_mtl.classroom.grade handout --tests teacher
    python -m tinylora_mtl.classroom.notebook walkthrough.ipynb

An exercise is a function whose docstring begins with [ex1], [ex2], …. `grade` writes results.json, in Gradescope's
format, and junit.xml, in some ten seconds, by the teacher's tests alone. Solutions are on the web, in this very
package, so the marks reward who learns by writing them and cannot tell who copied; a method of one's own, the project
at the end of the walkthrough, can.
"""
