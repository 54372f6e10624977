"""What the heads and features of a run look like inside: python -m tinylora_mtl.lab.heads --run runs/rlora-mini-seed0

For each adapted layer: how alike the heads are (the figure of R-LoRA's paper), how alike the tasks' features A x are,
and how far apart, at the start of the run and at its end. For routed adapters: how the router weighs the heads for each
task. All on the real tokens of validation samples. Numbers go to heads.json in the run folder and, where matplotlib is
installed, pictures beside it.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ..adapters import add_adapters, find_adapters, remove_adapters
from ..align import VARIANCE_EPS, collect_features, of_every_token, real_tokens
from ..batching import collate, encode
from ..config import adapter_config
from ..data.tasks import load_tasks, require_samples
from ..evaluate import length_buckets
from ..loss import label_logits
from ..run import adapter_files, cli, files, fingerprints, models, settings
from ..run.likeness import cosines, head_cosines, mean_of_pairs
from ..run.methods import typed_method
from ..run.scoring import tell_task
from .pictures import by_kind, draw_heads

SAMPLES = 50  # validation samples of each task whose features are looked at


def open_finished(folder, device="auto", tasks=None):
    """(config, tasks, model with the trained adapter, tokenizer) of a run folder; ValueError if it is not finished.

    tasks: where its tasks are now, if they have been moved.
    """
    config = settings.read_config(folder, finished=True)
    tasks = load_tasks(tasks or config.tasks)
    require_samples(tasks, "validation")
    model, tokenizer, _ = models.load_model(config.model, device, config.dtype)
    stored = fingerprints.read_fingerprints(folder)
    for line in [*fingerprints.changes(stored, tasks, ["validation"]),
                 *fingerprints.base_changes(stored, model, tokenizer, config.method, weights=False)] if stored else ():
        print(line)  # of other weights the adapter itself warns
    adapter_files.load_adapter(model, Path(folder) / "adapter")
    return config, tasks, model, tokenizer


def back_to_start(model, config):
    """Put the adapters that the run started with, the same numbers on the same device, in place of those it has."""
    start = replace(adapter_config(config), tasks=model.adapter_config.tasks)
    remove_adapters(model)
    torch.manual_seed(config.seed)
    add_adapters(model, start)
    model.eval()


@torch.no_grad()
def collect(model, tokenizer, tasks, max_length, part="lora_A"):
    """(for each task a list of [length, layers, width], one for each of its first SAMPLES samples; the layers' names).

    part: "lora_A" for the features A x, "router" for the router's scores; at the real tokens, prompt and target, in
    float32 and on the CPU. Layers that do not see every token (experts) are left out. Raises ValueError if none is
    left, FloatingPointError for numbers that are not finite.
    """
    found = []
    for task in tasks:
        tell_task(model, task)
        samples, kept = task.validation[:SAMPLES], []
        for chosen in length_buckets(samples, 32):
            rows = [encode(tokenizer, samples[i], max_length) for i in chosen]
            batch = collate(rows, [0] * len(rows), tokenizer.pad_token_id)
            with collect_features(model, part) as outputs:
                label_logits(model, batch)
            outputs = {name: z for name, z in outputs.items() if of_every_token(name, z, batch)}
            if not outputs:
                raise ValueError("no adapted layer has features A x of every token, so there are none to compare")
            z, _ = real_tokens(outputs, batch)  # [tokens, layers, width]
            if not torch.isfinite(z).all():
                raise FloatingPointError("the features A x are not finite, so nothing can be said of them")
            kept += z.float().cpu().split(batch["attention_mask"].sum(1).tolist())
        found.append(kept)
    return found, list(outputs)


def symmetric_kl(mean, variance, other_mean, other_variance):
    """The symmetric KL divergence ½ (KL(t‖t') + KL(t'‖t)) of two diagonal Gaussians, summed over the features.

    All four [r] -> a scalar. Per feature, with means μ and μ' and variances v and v',
        KL(t‖t') = ½ [ log(v'/v) + (v + (μ - μ')²) / v' - 1 ]
    and in the sum of both ways the logarithms cancel: D = ¼ [ v/v' + v'/v - 2 + (μ - μ')² (1/v + 1/v') ].
    """
    ratio = variance / other_variance + other_variance / variance - 2  # [r]
    shift = (mean - other_mean).square() * (1 / variance + 1 / other_variance)  # [r]
    return (ratio + shift).sum() / 4


def of_each_task(features, statistic):
    """[layers, T, width]: statistic(z [tokens, layers, width]) of what `collect` found for each task."""
    return torch.stack([statistic(torch.cat(samples)) for samples in features], dim=1)


def task_distances(features):
    """[layers, T, T]: the symmetric KL divergence of every pair of tasks; `kl_alignment` is its mean over pairs."""
    means = of_each_task(features, lambda z: z.mean(0))  # [layers, T, r]
    variances = of_each_task(features, lambda z: z.var(0, correction=0) + VARIANCE_EPS)
    return torch.tensor([[[symmetric_kl(*one, *other) for other in zip(*layer)] for one in zip(*layer)]
                         for layer in zip(means, variances)])


def task_cosines(features):
    """[layers, T, T]: the cosine between the tasks' mean features."""
    return torch.stack([cosines(means) for means in of_each_task(features, lambda z: z.mean(0))])


def router_weights(scores):
    """[layers, T, N]: the mean weight softmax(W_r x) of each head over the tokens of each task."""
    return of_each_task(scores, lambda z: z.softmax(-1).mean(0))


def principal_components(features):
    """([samples, 2] coordinates, the tasks' ids [samples], the two shares of the variance) by PCA.

    A sample is the mean over its tokens of A x, all layers side by side.
    """
    owner = torch.tensor([i for i, samples in enumerate(features) for _ in samples])
    points = torch.stack([z.mean(0).flatten() for samples in features for z in samples])  # [samples, layers · r]
    u, s, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    return u[:, :2] * s[:2], owner, (s.square() / s.square().sum())[:2].tolist()


def inspect_run(folder, device="auto", tasks=None):
    """(what heads.json holds, what `draw_heads` needs beside it) of a finished run; tasks: as in `open_finished`."""
    config, tasks, model, tokenizer = open_finished(folder, device, tasks)
    adapters, names = find_adapters(model), [task.name for task in tasks]

    def state():  # of the adapters that are in the model
        features, seen = collect(model, tokenizer, tasks, config.max_length)
        return features, seen, task_distances(features), head_cosines(model).get("head_cosine", [None] * len(adapters))

    def of_pairs(matrices):  # None where there is only one task, or the layer does not see every token
        found = {name: mean_of_pairs(matrix).item() for name, matrix in zip(seen, matrices) if len(matrix) > 1}
        return [found.get(name) for name in adapters]

    features, seen, apart, heads_alike = state()
    left_out = [name for name in adapters if name not in seen]
    if left_out:
        print(f"{len(left_out)} layers do not see every token once (experts, say), so their features are left out: "
              f"{', '.join(left_out[:3])}{', …' if left_out[3:] else ''}")
    heads = [cosines(adapter.heads.detach().flatten(1).cpu()) for adapter in adapters.values()
             if len(getattr(adapter, "heads", ())) > 1]
    router = []
    if any(getattr(adapter, "router", None) for adapter in adapters.values()):
        router = router_weights(collect(model, tokenizer, tasks, config.max_length, "router")[0]).mean(0).tolist()
    back_to_start(model, config)
    features_at_start, _, apart_at_start, heads_alike_at_start = state()
    columns = {"layer": adapters, "head_cosine_start": heads_alike_at_start, "head_cosine": heads_alike,
               "task_cosine": of_pairs(task_cosines(features)), "distance_start": of_pairs(apart_at_start),
               "distance": of_pairs(apart)}
    findings = {"run": str(folder), "method": config.method,
                "layers": [dict(zip(columns, layer)) for layer in zip(*columns.values())],
                "distances": {name: dict(zip(names, row)) for name, row in zip(names, apart.mean(0).tolist())},
                "router": dict(zip(names, router))}
    return findings, (heads, [principal_components(found) for found in (features_at_start, features)])


def findings_text(findings):
    """Lines of text: a row for each kind of layer, then the tasks' distances and the router's weights."""
    def row(name, values, digits=2):
        return f"{name:38}" + "".join(f"{'-' if value is None else f'{value:.{digits}f}':>9}" for value in values)

    def means(layers):  # of each column, where there is something
        columns = zip(*([value for name, value in layer.items() if name != "layer"] for layer in layers))
        found = [[value for value in column if value is not None] for column in columns]
        return [sum(column) / len(column) if column else None for column in found]

    lines = [f"{'':38}{'heads alike':>18}{'tasks':>9}{'tasks apart':>18}",
             f"{'mean of the layers of a kind':38}{'start':>9}{'now':>9}{'now':>9}{'start':>9}{'now':>9}"]
    lines += [row(kind[-37:], means(layers)) for kind, layers in by_kind(findings["layers"]).items()]
    lines += [row("all", means(findings["layers"])), "",
             "heads alike: mean cosine between heads, -: none, or heads of zeros; tasks: mean cosine between the",
              "tasks' mean features; tasks apart: mean KL divergence between their features, in nats"]
    if len(findings["distances"]) > 1:
        lines += ["", "how far apart the tasks are, in the same order, mean of the layers"]
        lines += [f"{task[-26:]:26}" + "".join(f"{value:7.2f}" for value in distances.values())
                  for task, distances in findings["distances"].items()]
    if findings["router"]:
        lines += ["", "the router's weight for each head, mean of the layers"]
        lines += [row(task[-37:], weights, 3) for task, weights in findings["router"].items()]
    return "\n".join(lines)


def main(argv=None):
    """Look into a run, print, write heads.json and the pictures; returns what heads.json holds."""
    parser = cli.Parser("lab.heads", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="a finished run folder of train")
    parser.add_argument("--method", default="", metavar="FILE.py", help="the run's method, if it is a file of yours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    typed_method(args.method)
    findings, more = inspect_run(args.run, args.device)
    files.write_json(args.run / "heads.json", findings)
    print(findings_text(findings))
    print("\nwritten:", args.run / "heads.json", *draw_heads(findings, *more, args.run), sep="\n")
    return findings


if __name__ == "__main__":
    cli.run_command(main)
