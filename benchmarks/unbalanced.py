"""Does --balance help where some classes have few images?

    python benchmarks/unbalanced.py

Handwritten digits, of which the classes 5 to 9 keep every twentieth training image. The CNN is
trained with and without --balance, with several seeds. Prints the recall of the rare and of the
common classes on the balanced test images.
"""

import json
import tempfile
from pathlib import Path
from statistics import fmean

from common import SCRIPTS
from PIL import Image

import evaluate
from cli import Parser, command, integer, run
from data import load_data

RARE, KEPT = range(5, 10), 20


def write_digits(folder: Path) -> None:
    """The digits as PNG files; of the training images of rare classes one in `KEPT`."""
    digits, seen = load_data("digits", folder), [0] * 10
    for part in ("train", "val", "test"):
        split = getattr(digits, part)
        for i in range(len(split)):
            (image,), (label,) = split.rows(slice(i, i + 1))
            seen[label] += part == "train"
            if part == "train" and label in RARE and seen[label] % KEPT:
                continue
            file = folder / part / str(label.item()) / f"{i:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--epochs", type=integer(1), default=20, metavar="N", help="of training")
    add("--seeds", type=integer(1), default=3, metavar="N", help="how many")
    args = parser.parse_args(argv)
    rows = [["", "seed", "recall of rare classes", "of common classes", "macro F1"]]
    with tempfile.TemporaryDirectory() as name:
        images, out_dir = Path(name) / "images", Path(name) / "run"
        write_digits(images)
        flags = ["--dataset", "folder", "--data-dir", images, "--recipe", "plain", "--no-flip"]
        flags += ["--shift", 2, "--batch-size", 32, "--epochs", args.epochs, "--pictures", "off"]
        for balance in ("--no-balance", "--balance"):
            for seed in range(args.seeds):
                run_flags = ["--seed", seed, balance, "--out-dir", out_dir, "--overwrite"]
                SCRIPTS["cnn"].main([*map(str, [*flags, *run_flags])])
                evaluate.main([str(out_dir / "best.pt"), "--out-dir", str(out_dir / "scores")])
                (row,) = json.loads((out_dir / "scores" / "metrics.json").read_text()).values()
                recall = [row["per_class"][str(digit)]["recall"] for digit in range(10)]
                parts = [fmean(recall[i] for i in ids) for ids in (RARE, range(5))]
                scores = [*(f"{part:.1%}" for part in parts), f"{row['macro_f1']:.3f}"]
                rows.append([balance, str(seed), *scores])
    print(evaluate.table(rows))


if __name__ == "__main__":
    run(main)
