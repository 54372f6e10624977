"""For teachers: `blank.py` writes a handout, the package with the bodies of its exercises taken out.

    python -m tinylora_mtl.classroom.blank DIR

An exercise is a function whose docstring begins with [ex1], [ex2], …; whoever does not teach can pass this room by.
"""
