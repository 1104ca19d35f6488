"""How faithful explanations are: deletion, insertion, SaCo and sanity checks, compared with chance.

    python faithfulness.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt

The image is cut into 8×8 cells, and a map ranks them. If the ranks are right, the probability of
the predicted class falls fast when the first cells are hidden (deletion), and rises fast when they
are shown first (insertion). Hidden cells get the mean colour or the blurred image; or, if they are
the patches of a ViT, they are dropped. Random order, a centred Gaussian and an edge detector are
measured too: a method must score above them to count as faithful.
SaCo with the mean colour favours occlusion, which hides cells in the same way.

Prints tables and writes into --out-dir:

    faithfulness.json                 all scores, with 95% intervals
    <checkpoint>_faithfulness.png     curves of deletion and insertion
"""

import argparse
import json
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

import cli
from attribution import (
    GRID,
    METHODS,
    forward_pass,
    methods_for,
    on_grid,
    rank_correlation,
    weights_of,
)
from batches import batch_size_without_training
from evaluate import table
from figures import in_our_style, plot_faithfulness
from metrics import interval
from models import build_model
from prepare import TrainedModel, load_data_for, load_models

SIDE, STEP = GRID, 4  # cells along each side; cells that are hidden at a time
CELLS = SIDE * SIDE
CONTROLS = ("random", "center", "edges")
RANDOM_ORDERS = 3  # random orders whose mean is chance
FEW = 10  # below, no ranking in words: bootstrap intervals of few images are too narrow

# ---------------------------------------------------------------- maps and ranks


def control_maps(images: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Maps (B, 8, 8) that know nothing of a network, for images (B, 3, H, W)."""
    B, away = len(images), torch.linspace(-1, 1, SIDE) ** 2
    grey = F.pad(images.mean(1, keepdim=True).cpu(), (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
    slopes = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])  # (B, 2, H, W)
    return {
        "random": torch.rand(B, SIDE, SIDE, generator=generator),
        "center": (-2 * (away[:, None] + away)).exp().expand(B, SIDE, SIDE),
        "edges": on_grid(slopes.norm(dim=1)),
    }


def ranked(maps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cells (B, 64) from the highest value of maps (B, 8, 8) to the lowest; ties are random."""
    shuffled = torch.rand(len(maps), CELLS, generator=generator).argsort(1)
    values = maps.flatten(1).gather(1, shuffled)
    return shuffled.gather(1, values.argsort(dim=1, descending=True, stable=True))


# ---------------------------------------------------------------- hiding cells


class Hiding:
    """The probability of a class when cells of B images are hidden.

    `with_all` and `with_none` (B,) are the probabilities with all and with no cells shown.

    Args:
        model: a network in eval mode.
        images: (B, 3, H, W), normalised.
        goal: (B,), the output to watch.
        fill: what hidden cells get: "mean" (0, the mean colour of the data set), "blur" (the image
            blurred by a Gaussian of an eighth of its side) or "dropped": patches are left out.
    """

    def __init__(self, model, images, goal, fill: str):
        self.model, self.images, self.goal, self.fill = model, images, goal, fill
        size = images.shape[-1]
        self.filling = torch.zeros_like(images)
        if fill == "blur":
            self.filling = gaussian_blur(images, [size // 2 // 2 * 2 + 1] * 2, [size / 8] * 2)
        cells = torch.arange(CELLS).expand(len(images), -1)
        self.with_all, self.with_none = self(cells[:, :0]), self(cells)

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Probabilities (B,), on the CPU, with the cells `hidden` (B, n) hidden from each image."""
        shown = torch.ones(len(hidden), CELLS).scatter(1, hidden, 0.0).to(self.images.device)
        size, found = batch_size_without_training(self.images.shape[-1]), []
        for rows in torch.arange(len(hidden)).split(size):
            images, part = self.images[rows], shown[rows]
            if self.fill == "dropped":
                count = CELLS - hidden.shape[1]
                keep = part.argsort(dim=1, descending=True, stable=True)[:, :count]
                features = self.model.forward_features(images, keep=keep)
                logits = self.model.forward_head(features)
            else:
                part = F.interpolate(part.view(-1, 1, SIDE, SIDE), images.shape[2:])  # nearest
                logits = self.model(images * part + self.filling[rows] * (1 - part))
            found.append(logits.float().softmax(1).gather(1, self.goal[rows, None])[:, 0])
        return torch.cat(found).cpu()


def fills_for(model: TrainedModel) -> list[str]:
    """The ways to hide cells from a network; patches are dropped where they are the cells."""
    features = getattr(model.network, "forward_features", model.network.forward)
    drops = getattr(model.network, "grid", 0) == SIDE and "keep" in signature(features).parameters
    return ["mean", "blur", *["dropped"] * drops]


def curve(order: torch.Tensor, probability: Hiding) -> torch.Tensor:
    """Probabilities (B, 17) when none, 4, 8, ..., all 64 cells of `order` (B, 64) are hidden.

    Deletion (Petsiuk et al. 2018, arXiv 1806.07421); insertion is the curve of the reversed order.
    """
    between = [probability(order[:, :n]) for n in range(STEP, CELLS, STEP)]
    return torch.stack([probability.with_all, *between, probability.with_none], dim=1)


def area(curves: torch.Tensor) -> torch.Tensor:
    """Area under curves (B, n) over an axis from 0 to 1, by trapezoids: (B,)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def saco(values: torch.Tensor, falls: torch.Tensor) -> torch.Tensor:
    """SaCo (Wu et al. 2024, arXiv 2404.01415) from -1 to 1, per image: (B,).

    Of two groups of cells, the one with the higher value should matter more. Equal ones count for
    the map, as in the paper; without any, chance is 0.

    Args:
        values: (B, G), the sum of the map over each group, from the highest to the lowest.
        falls: (B, G), how much the probability falls when one group is hidden.
    """
    first, second = torch.triu_indices(values.shape[1], values.shape[1], offset=1)
    weight = values[:, first] - values[:, second]  # >= 0
    sign = torch.where(falls[:, first] >= falls[:, second], 1.0, -1.0)
    return (sign * weight).sum(1) / weight.sum(1).clamp(min=1e-30)


def curves_of(order: torch.Tensor, probability: Hiding) -> dict[str, torch.Tensor]:
    """Both curves (B, 17) for an order of cells (B, 64)."""
    insertion = curve(order.flip(1), probability).flip(1)
    return {"deletion": curve(order, probability), "insertion": insertion}


def score(maps: torch.Tensor, order: torch.Tensor, probability: Hiding, chance: dict) -> dict:
    """Scores (B,) of one method, and its curves; in every score higher is better.

    Args:
        maps: (B, 8, 8).
        order: its cells from the highest to the lowest, (B, 64).
        probability: of the class when cells are hidden.
        chance: curves of random orders; the scores of curves are differences from their areas.
    """
    curves = curves_of(order, probability)
    groups = order.split(STEP, dim=1)
    values = torch.stack([maps.flatten(1).gather(1, group).sum(1) for group in groups], dim=1)
    left = [curves["deletion"][:, 1], *map(probability, groups[1:])]  # without one group each
    falls = torch.stack([probability.with_all - p for p in left], dim=1)
    return {
        "curves": curves,
        "deletion": area(chance["deletion"]) - area(curves["deletion"]),
        "insertion": area(curves["insertion"]) - area(chance["insertion"]),
        "SaCo": saco(values, falls),
    }


# ---------------------------------------------------------------- a network


def maps_of(model: TrainedModel, network, split, methods: list[str]) -> tuple[dict, torch.Tensor]:
    """Maps (n, 8, 8) by each method of the class that the model predicts, and that class (n,).

    network: the model's own, or one of the same kind with other weights.
    """
    maps, goals = {name: [] for name in methods}, []
    for images, _ in tqdm(model.batches(split, explain=True), "maps", leave=False, disable=None):
        with torch.inference_mode():
            goal = model.network(images).argmax(1)
        forward = forward_pass(network, images)
        weights = weights_of(goal, None, forward.logits)
        for name in methods:
            heat = METHODS[name].compute(forward, weights, -1).detach().cpu()
            maps[name].append(on_grid(heat))
        goals.append(goal)
    return {name: torch.cat(parts) for name, parts in maps.items()}, torch.cat(goals)


def measure(model: TrainedModel, split, methods: list[str]) -> tuple[dict, dict]:
    """Scores of methods and controls with each fill, and the maps that were scored.

    Scores: {fill: {method: {"deletion": (n,), "insertion": (n,), "SaCo": (n,), "curves": ...}}}.
    Two methods with the same order of cells in every image are scored once.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([images for images, _ in model.batches(split)])
    maps, goals = maps_of(model, model.network, split, methods)
    maps |= control_maps(images, generator)
    orders = {name: ranked(maps[name], torch.Generator().manual_seed(0)) for name in maps}
    noise = torch.rand(RANDOM_ORDERS, len(split), SIDE, SIDE, generator=generator)
    references = [ranked(part, generator) for part in noise]
    for name in list(orders):
        first = next(other for other in orders if torch.equal(orders[other], orders[name]))
        if first != name:
            print(f"{model.name}: {name} ranks all cells as {first} does; it is scored once")
            del orders[name]
    scores = {}
    for fill in fills_for(model):
        hiding = Hiding(model.network, images, goals, fill)
        title = f"{model.name}, {fill}"
        orders_at_random = tqdm(references, f"{title}, chance", leave=False, disable=None)
        curves = [curves_of(order, hiding) for order in orders_at_random]
        chance = {key: sum(c[key] for c in curves) / RANDOM_ORDERS for key in curves[0]}
        scores[fill] = {"chance": {"curves": chance}}
        for name, order in tqdm(orders.items(), title, leave=False, disable=None):
            scores[fill][name] = score(maps[name], order, hiding, chance)
    return scores, maps


def check_sanity(model: TrainedModel, split, maps: dict) -> dict[str, dict[str, float]]:
    """Mean absolute rank correlation of each map with two others of the same method.

    "random_weights": the map of the same image by the same network, untrained, of another seed. If
    a method shows what was learned, its maps must change (Adebayo et al. 2018, arXiv 1810.03292). A
    constant map counts as unchanged. "another_image": how alike unrelated maps are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(model.checkpoint["settings"].get("seed", 0) + 1)
        random = build_model(model.checkpoint["model_name"], model.checkpoint["model_config"])
    random.to(next(model.network.parameters()).device)
    others, _ = maps_of(model, random, split, [name for name in maps if name in METHODS])
    others["edges"] = maps["edges"]  # of the images alone
    found = {"random_weights": {}, "another_image": {}}
    for name, other in others.items():
        for rho, second in zip(found.values(), (other, maps[name].roll(1, dims=0)), strict=True):
            values = np.nan_to_num(rank_correlation(maps[name], second), nan=1)
            rho[name] = float(abs(values).mean())
    return found


# ---------------------------------------------------------------- command line


def summarise(scores: dict) -> dict:
    """{method: {score: {fill: {"mean", "low", "high"}}}} of what `measure` returns."""
    summary = {}
    for fill, methods in scores.items():
        for name, values in methods.items():
            for kind in ("deletion", "insertion", "SaCo") if name != "chance" else ():
                numbers = dict(zip(("mean", "low", "high"), interval(values[kind]), strict=True))
                summary.setdefault(name, {}).setdefault(kind, {})[fill] = numbers
    return summary


def mean_curves(scores: dict) -> dict:
    """{fill: {method: {"deletion" or "insertion": 17 mean probabilities}}} of the same."""
    return {
        fill: {name: {kind: curve.mean(0).tolist() for kind, curve in values["curves"].items()}
               for name, values in methods.items()}
        for fill, methods in scores.items()
    }  # fmt: skip


def print_scores(name: str, scores: dict, summary: dict) -> None:
    """A table; in words what is best, and what is not significantly above a control (95%)."""
    columns = [(kind, fill) for kind in ("deletion", "insertion", "SaCo") for fill in scores]
    kinds, fills = zip(*columns, strict=True)
    rows = [[name, *kinds], ["hidden parts", *fills]]
    for method, numbers in summary.items():
        cells = [numbers[kind][fill] for kind, fill in columns]
        texts = [f"{c['mean']:+.2f} ±{(c['high'] - c['low']) / 2:.2f}" for c in cells]
        rows.append([method, *texts])
    print(table(rows))
    if len(next(iter(scores.values()))["random"]["SaCo"]) < FEW:
        print(f"  (fewer than {FEW} images: too few to say which method is better)")
        return
    for kind, fill in columns:
        own = {method: scores[fill][method][kind] for method in summary}
        methods = [method for method in own if method not in CONTROLS]
        best = max(methods, key=lambda method: own[method].mean())
        chance, center = own["random"] if kind == "SaCo" else 0, own.get("center", 0)
        lists = {
            "not significantly better than": [m for m in methods if not above(own[best], own[m])],
            "not significantly above chance": [m for m in methods if not above(own[m], chance)],
            "not significantly above center": [m for m in methods if not above(own[m], center)],
        }
        lists["not significantly better than"].remove(best)
        said = [f"{text}: {', '.join(names)}" for text, names in lists.items() if names]
        print("; ".join([f"  {kind}, {fill}: best {best}", *said]))
    print("  (95% intervals of each difference alone, not corrected for their number)")


def above(one: torch.Tensor, other) -> bool:
    """Whether scores (n,) are higher in the mean than others of the same images."""
    return interval(one - other)[1] > 0


def print_sanity(name: str, found: dict[str, dict[str, float]]) -> None:
    """A row for each method. The edge detector is a control: it does not depend on the network."""
    print(f"{name}: mean absolute rank correlation with the map of")
    columns = [[f"{value:.3f}" for value in rho.values()] for rho in found.values()]
    rows = map(list, zip(found["random_weights"], *columns, strict=True))
    print(table([["", "random weights", "another image"], *rows]))


@cli.command
@in_our_style
def main(argv=None):
    # 1. Check.
    args = parse_arguments(argv)
    models = load_models(args.checkpoints, cli.use_device(args))
    methods = {}
    for model in models:
        _, reasons = methods_for(model.network, model.checkpoint["dataset"]["image_size"])
        wanted, possible = args.method or METHODS, [n for n in METHODS if n not in reasons]
        methods[model.name] = [name for name in possible if name in wanted]
        for name in [n for n in args.method or () if n in reasons]:
            problem = f"{name}: {model.name} {reasons[name]}"
            if not methods[model.name]:
                raise cli.UserError(f"--method {problem}; use {', '.join(possible)}")
            print(problem)
    dataset = args.dataset or models[0].checkpoint["dataset"]["name"]
    cli.make_out_dir(args.out_dir, args.data_dir if dataset == "folder" else None, curves=False)

    # 2. Gather: the same random images for all models.
    data = load_data_for(models, args.dataset, args.data_dir, args.split)
    split = getattr(data, args.split)
    if len(split) < 2:
        raise cli.UserError(f"--split {args.split}: there is one image; two are needed")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    split = split.subset(order[: args.count])
    note = f"; {cli.printable(data.note)}" if data.note else ""
    print(f"{data.name}: {len(split)} of {len(order):,} {args.split} images{note}")

    # 3. Measure, write and print, one network after the other.
    results, file = {}, args.out_dir / "faithfulness.json"
    found = {"images": len(split), "split": args.split, "data": data.name, "checkpoints": results}
    for model in models:
        scores, maps = measure(model, split, methods[model.name])
        summary, curves = summarise(scores), mean_curves(scores)
        sanity = check_sanity(model, split, maps)
        results[model.path] = {"scores": summary, **sanity, "curves": curves}
        with cli.writing(file):
            file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        picture = args.out_dir / cli.file_name(f"{model.name}_faithfulness", ".png")
        with cli.writing(picture):
            title = f"{model.name}, {len(split)} {args.split} images"
            plot_faithfulness(curves, title).savefig(picture, dpi=110)
        print_scores(model.name, scores, summary)
        print_sanity(model.name, sanity)
        print(f"written to {args.out_dir}: {file.name}, {picture.name}")


def parse_arguments(argv) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=cli.name_type, metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    cli.add_data_flags(parser, from_checkpoint=True)
    add = parser.add_argument
    add("--split", choices=("test", "val"), default="test", help="which images")
    add("--count", type=cli.integer(2), default=100, metavar="N", help="how many images")
    add("--method", nargs="+", choices=METHODS, metavar="NAME",
        help=f"{', '.join(METHODS)} (default: all that the network allows)")  # fmt: skip
    add("--out-dir", type=cli.path_type, default=Path("runs/faithfulness"), metavar="DIR",
        help="for the results; earlier ones are replaced")  # fmt: skip
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
