"""Tasks: the embedded ones, your own from JSON Lines, and the papers' from the Hugging Face Hub.

    from tinylora_mtl.data import load_tasks

Read `tasks.py` first: what a task is, and how names and paths become tasks. The rest can be skipped: `embedded.py`
generates the embedded tasks, `hub.py` has the papers' sets, `pretrain.py` is how the embedded model was made.
"""

from .tasks import load_tasks

__all__ = ["load_tasks"]
