"""The settings of the papers' own scripts, as far as they are known: --recipe NAME, each field to be overridden.

A recipe is what the authors' script sets, under the names of `TrainConfig`; what neither script nor paper tells is said
and left at the default. The tasks are those of --tasks, which no script names.
"""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
RECIPES = {
    # github.com/jinda-liu/R-LoRA, fine-tuning.sh: 6 samples on a device, 16 accumulated; 512 tokens, as here
    "rlora-paper": {
        "settings": {"model": "Qwen/Qwen2.5-0.5B", "method": "rlora", "rank": 4, "alpha": 32.0, "dropout": 0.1,
                     "heads": 5, "targets": PROJECTIONS, "lr": 2e-4, "warmup": 0.03, "batch_size": 96,
                     "accumulation": 16},
        "unknown": "steps, seed and the mixture of tasks; its random start is that of the paper, the released code has "
                   "another one (--method rlora_released)"},
    # github.com/jinda-liu/Align-LoRA, train.py: 5 samples on a device, one of each task, 10 accumulated; one epoch
    "align-paper": {
        "settings": {"model": "Qwen/Qwen2.5-7B", "method": "align", "align": "kl", "align_weight": 0.2, "rank": 8,
                     "alpha": 32.0, "dropout": 0.1, "targets": PROJECTIONS, "lr": 2e-4, "batch_size": 50,
                     "accumulation": 10, "dtype": "bfloat16", "gradient_checkpointing": True},
        "unknown": "steps (one epoch over its tasks), seed, warm-up and length; the paper adds up over pairs of tasks, "
                   "its code and this package take the mean"},
}


def recipe(name):
    """The settings of a recipe, {field: value}; ValueError for a name that is none. Prints what is not known of it."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}")
    print(f"{name}: not known of it: {RECIPES[name]['unknown']}")
    return dict(RECIPES[name]["settings"])
