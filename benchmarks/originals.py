r"""Accuracy on original images beside their JPEG versions, with intervals and a paired test.

    python benchmarks/originals.py pretrained/cnn.pt pretrained/vit.pt \
        --originals data/originals/original --jpeg data/originals/jpeg

Both folders have test/<class>/*, with the same names but for the suffix. Prints a row per
checkpoint and appends it to benchmarks/results/originals.jsonl. Intervals are Wilson's, of 95%. The
paired test is McNemar's exact one: under its hypothesis an image that is right in one version alone
is equally often right in either.

    python evaluate.py pretrained/cnn.pt pretrained/vit.pt --dataset cifar10 --data-dir data

measures the full original test split, which this downloads.
"""

from pathlib import Path

from common import DEVICE, add_results_flag, append

from cli import Parser, UserError, command, name_type, path_type, run
from metrics import mcnemar, wilson
from prepare import TrainedModel, load_data_for, load_models


def names(folder: Path) -> list[str]:
    """The images of folder/test, as class/name without suffix."""
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("test/*/*"))


def right(model: TrainedModel, folder: Path):
    """Whether each image is right, (N,), in the order of `names`."""
    data = load_data_for([model], "folder", folder)
    labels = data.test.labels[data.test.indices]
    return model.logits(data.test, data.classes).argmax(1) == labels


def with_interval(correct: int, total: int) -> list[float]:
    """The fraction of correct answers, and the ends of Wilson's 95% interval."""
    return [correct / total, *wilson(correct, total)]


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=name_type, metavar="CHECKPOINT", help="what to measure")
    add("--originals", type=path_type, required=True, metavar="DIR", help="images as they were")
    add("--jpeg", type=path_type, required=True, metavar="DIR", help="their JPEG versions")
    add_results_flag(parser, "originals.jsonl")
    args = parser.parse_args(argv)
    if names(args.originals) != names(args.jpeg) or not names(args.jpeg):
        raise UserError(f"--jpeg {args.jpeg}: not the images of {args.originals}: use its versions")
    for model in load_models(args.checkpoints, DEVICE):
        original, jpeg = (right(model, folder) for folder in (args.originals, args.jpeg))
        result = {"checkpoint": model.path, "images": len(jpeg)}
        for name, found in (("originals", original), ("jpeg", jpeg)):
            result[name] = with_interval(int(found.sum()), len(found))
            mean, low, high = result[name]
            print(f"{model.name}: {name} {mean:.1%} (95%: {low:.1%} to {high:.1%})")
        only = [int((original & ~jpeg).sum()), int((jpeg & ~original).sum())]
        p = mcnemar(*only)
        result |= {"right_in_one_only": only, "mcnemar_p": p}
        print(
            f"{model.name}: right only as original {only[0]}, only as JPEG {only[1]}; p = {p:.2g}"
        )
        append(args.results, result)


if __name__ == "__main__":
    run(main)
