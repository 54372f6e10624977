"""What the heads and features of a run look like inside: python -m tinylora_mtl.lab.heads --run runs/rlora-mini-seed0

For each adapted layer: how alike the heads are (the figure of R-LoRA's paper), how alike the tasks' features A x are,
and how far apart, at the start of the run and at its end. For routed adapters: how the router weighs the heads for each
task. All on the real tokens of validation samples. Numbers go to heads.json in the run folder and, where matplotlib is
installed, pictures beside it.
"""

from pathlib import Path

import torch

from ..adapters import add_adapters, find_adapters, load_adapter, remove_adapters
from ..align import VARIANCE_FLOOR, collect_features, real_tokens, symmetric_kl
from ..batching import collate, encode, label_logits
from ..run.cli import Parser, run_command
from ..evaluate import like_lengths
from ..run.files import write_json
from ..run.models import load_model
from ..multihead import cosines, head_cosines, mean_of_pairs
from .pictures import draw_heads, say_missing
from ..run.settings import adapter_config, read_config
from ..data.tasks import load_tasks, require_samples

SAMPLES = 50  # validation samples of each task whose features are looked at


def open_finished(folder, device="auto"):
    """(config, tasks, model with the trained adapter, tokenizer) of a run folder; ValueError if it is not finished."""
    config = read_config(folder, finished=True)
    tasks = load_tasks(config.tasks)
    require_samples(tasks, "validation")
    model, tokenizer, _ = load_model(config.model, device, config.dtype)
    load_adapter(model, Path(folder) / "adapter")
    return config, tasks, model, tokenizer


def back_to_start(model, config):
    """Put the adapters that the run started with, the same numbers on the same device, in place of those it has."""
    remove_adapters(model)
    torch.manual_seed(config.seed)
    add_adapters(model, adapter_config(config))
    model.eval()


@torch.no_grad()
def collect(model, tokenizer, tasks, max_length, part="lora_A"):
    """{layer: for each task, a list of [length, width] for each of its first SAMPLES samples}, in float32 on the CPU.

    part: "lora_A" for the features A x, "router" for the router's scores; at the real tokens, prompt and target.
    """
    found = {}
    for task in tasks:
        samples, kept = task.validation[:SAMPLES], {}
        for chosen in like_lengths(samples, 32):
            rows = [encode(tokenizer, samples[i], max_length) for i in chosen]
            batch = collate(rows, [0] * len(rows), tokenizer.pad_token_id)
            with collect_features(model, part) as outputs:
                label_logits(model, batch)
            lengths = batch["attention_mask"].sum(1).tolist()
            for name, z in real_tokens(outputs, batch).items() if outputs else ():
                kept.setdefault(name, []).extend(z.float().cpu().split(lengths))
        for name, values in kept.items():
            found.setdefault(name, []).append(values)
    return found


def task_distances(features):
    """{layer: [T, T], the symmetric KL divergence of every pair of tasks}, of what `collect` returns.

    The mean over pairs is what `kl_alignment` is of the same features.
    """
    def gaussian(samples):
        z = torch.cat(samples)  # [tokens, r]
        return z.mean(0), z.var(0, unbiased=False) + VARIANCE_FLOOR
    found = {}
    for name, tasks in features.items():
        gaussians = [gaussian(samples) for samples in tasks]
        found[name] = torch.tensor([[symmetric_kl(*one, *other) for other in gaussians] for one in gaussians])
    return found


def task_cosines(features):
    """{layer: [T, T], the cosine between the tasks' mean features}."""
    return {name: cosines(torch.stack([torch.cat(samples).mean(0) for samples in tasks]))
            for name, tasks in features.items()}


def router_weights(scores):
    """{layer: [T, N], the mean weight softmax(W_r x) of each head over the tokens of each task}."""
    return {name: torch.stack([torch.cat(samples).softmax(-1).mean(0) for samples in tasks])
            for name, tasks in scores.items()}


def principal_components(features):
    """([samples, 2] coordinates, the tasks' ids [samples], the two shares of the variance) by PCA.

    A sample is the mean over its tokens of A x, all layers side by side.
    """
    layers = [torch.stack([z.mean(0) for samples in tasks for z in samples]) for tasks in features.values()]
    owner = torch.tensor([i for i, samples in enumerate(next(iter(features.values()))) for _ in samples])
    table = torch.cat(layers, dim=1)  # [samples, layers · r]
    u, s, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    return u[:, :2] * s[:2], owner, (s.square() / s.square().sum())[:2].tolist()


def head_matrices(model):
    """{layer: [N, N], the cosines between vec(B_i)}, of a model with several heads; {} of any other."""
    return {name: cosines(adapter.heads.detach().flatten(1).cpu()) for name, adapter in find_adapters(model).items()
            if len(getattr(adapter, "heads", ())) > 1}


def look(folder, device="auto"):
    """(what heads.json holds, what `draw_heads` needs beside it) of a finished run."""
    config, tasks, model, tokenizer = open_finished(folder, device)
    features = collect(model, tokenizer, tasks, config.max_length)
    matrices, alike, apart = head_matrices(model), task_cosines(features), task_distances(features)
    now = dict(zip(matrices, head_cosines(model).get("head_cosine", ())))
    router = router_weights(collect(model, tokenizer, tasks, config.max_length, "router"))
    back_to_start(model, config)
    start = dict(zip(matrices, head_cosines(model).get("head_cosine", ())))
    apart_at_start = task_distances(collect(model, tokenizer, tasks, config.max_length))
    several = len(tasks) > 1
    layers = [{"layer": name, "head_cosine_start": start.get(name), "head_cosine": now.get(name),
               "task_cosine": mean_of_pairs(alike[name]).item() if several else None,
               "distance_start": mean_of_pairs(apart_at_start[name]).item() if several else None,
               "distance": mean_of_pairs(apart[name]).item() if several else None} for name in features]
    names = [task.name for task in tasks]
    distances = torch.stack(list(apart.values())).mean(0).tolist()
    weights = torch.stack(list(router.values())).mean(0).tolist() if router else []
    report = {"run": str(folder), "method": config.method, "layers": layers,
              "distances": {name: dict(zip(names, row)) for name, row in zip(names, distances)},
              "router": dict(zip(names, weights))}
    return report, (matrices, principal_components(features), names)


def show(report):
    """Lines of text: a row for each layer, then the router's weights."""
    def cell(value, digits=2):
        return f"{'-' if value is None else f'{value:.{digits}f}':>9}"

    columns = [name for name in report["layers"][0] if name != "layer"]
    short = {"head_cosine": "now", "head_cosine_start": "start", "task_cosine": "now", "distance": "now",
             "distance_start": "start"}
    lines = [f"{'':38}{'heads alike':>18}{'tasks':>9}{'tasks apart':>18}",
             f"{'layer':38}" + "".join(f"{short[name]:>9}" for name in columns)]
    rows = report["layers"] + [{"layer": "mean of the layers"} | {name: mean_of([row[name] for row in report["layers"]])
                                                                  for name in columns}]
    lines += [f"{row['layer'][-37:]:38}" + "".join(cell(row[name]) for name in columns) for row in rows]
    lines += ["", "heads alike: mean cosine between heads, -: none, or heads of zeros; tasks: mean cosine between the",
              "tasks' mean features; tasks apart: mean KL divergence between their features, in nats"]
    if len(report["distances"]) > 1:
        lines += ["", "how far apart the tasks are, in the same order, mean of the layers"]
        lines += [f"{task[-26:]:26}" + "".join(f"{value:7.2f}" for value in row.values())
                  for task, row in report["distances"].items()]
    if report["router"]:
        lines += ["", "the router's weight for each head, mean of the layers"]
        lines += [f"{task[-37:]:38}" + "".join(cell(value, 3) for value in row)
                  for task, row in report["router"].items()]
    return "\n".join(lines)


def mean_of(values):
    """The mean of a list of numbers; None if one is None."""
    return None if None in values else sum(values) / len(values)


def main(argv=None):
    """Look into a run, print, write heads.json and the pictures; returns what heads.json holds."""
    parser = Parser("lab.heads", __doc__)
    parser.add_argument("--run", required=True, help="a finished run folder of train")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    report, more = look(args.run, args.device)
    write_json(Path(args.run) / "heads.json", report)
    print(show(report))
    written = [] if say_missing() else draw_heads(report, *more, Path(args.run))
    print("\nwritten:", *[Path(args.run) / "heads.json", *written], sep="\n")
    return report


if __name__ == "__main__":
    run_command(main)
