"""Tasks: the embedded ones, your own from JSON Lines, and the papers' from the Hugging Face Hub.

    from tinylora_mtl.data import load_tasks

Read `tasks.py` first: what a task is, and how names and paths become tasks. `embedded.py` generates the tasks of the
embedded model, `hub.py` has the papers' sets and templates, and `pretrain.py`, which few need, made the embedded model.
"""

from .tasks import load_tasks

__all__ = ["load_tasks"]
