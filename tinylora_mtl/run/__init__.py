"""Everything around the training loop, for people who run it; the methods are in the files above this folder.

Read `training.py` first: a run from its settings to its results. `loop.py` is what happens between two steps (log,
checkpoints, signals, steps passed over), `gradients.py` a step in micro-batches or shared by processes, `scoring.py`
accuracies with their intervals and the command `evaluate` (`ranking.py`: answers chosen among labels). The rest serves
these and can be skipped: flags and checks (`settings.py`), what is amiss with samples (`samples.py`) or has changed
(`fingerprints.py`), models, adapter files, checkpoints, the run folder, processes, files, command lines. README.md
beside this tells what a user sees of all that.
"""
