"""Make the JPEG copy of CIFAR-10 that README's figures were measured on.

    python benchmarks/make_jpeg_copy.py data data/cifar10-jpeg

Takes the official CIFAR-10 (downloads it into the first folder if it is not there) and writes each
image as a JPEG of quality 75, Pillow's default with 4:2:0 chroma, to the second folder:
train/<class>/0000.jpg and test/<class>/0000.jpg, in the official order within each class. The
copy behind the figures was made with other encoder settings for most images: about one file in six
is the same, and the pixels of the others differ slightly. So expect accuracies that agree within
the spread of seeds, not to the last digit.
"""

import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchvision.datasets import CIFAR10
from tqdm import tqdm

from cli import Parser, UserError, command, path_type, run


def write_copy(source, target: Path) -> None:
    """Write the (image, label) pairs of `source`, which has `classes`, below `target`."""
    counts = collections.Counter()
    for name in source.classes:
        (target / name).mkdir(parents=True)
    for image, label in tqdm(source, str(target), disable=None):
        path = target / source.classes[label] / f"{counts[label]:04}.jpg"
        image.save(path)
        counts[label] += 1


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", type=path_type, help="folder of CIFAR-10 as torchvision keeps it")
    parser.add_argument("target", type=path_type, help="folder to make")
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target} exists already: remove it first, or choose another name")
    for part in ("train", "test"):
        try:
            source = CIFAR10(args.source, train=part == "train", download=True)
        except RuntimeError as error:  # a bad checksum; no network is an OSError
            raise UserError(f"{args.source}: {error}") from None
        write_copy(source, args.target / part)


if __name__ == "__main__":
    run(main)
