"""Do the methods find a planted shortcut? A sanity check with a known answer.

    python benchmarks/shortcut.py

Handwritten digits, but the images of class 0 are other digits with a small red square at a random
place. So nothing but the square tells that an image is of class 0. Both networks are trained for a
short time. For the test images of class 0 that they get right, counts how often the highest value
of each method's map is on the square, in the 8×8 grid of `faithfulness.py`: chance is 1 in 64.
"Near" also counts the cells around it, 9 in 64 or fewer.
"""

import tempfile
from pathlib import Path

import torch
from common import SCRIPTS
from PIL import Image

import faithfulness
from attribution import METHODS, methods_for
from cli import Parser, command, integer, run
from data import load_data
from evaluate import table
from faithfulness import SIDE
from prepare import load_data_for, load_models


def plant(images, labels, generator: torch.Generator):
    """Replace the images of class 0, in place, by other digits with a red square in one cell."""
    places = torch.full((len(labels),), -1)  # the cell of the square
    cell = images.shape[-1] // SIDE
    others = images[labels > 0].clone()
    for i in (labels == 0).nonzero()[:, 0]:
        images[i] = others[torch.randint(len(others), (), generator=generator)]
        places[i] = torch.randint(SIDE * SIDE, (), generator=generator)
        y, x = divmod(places[i].item(), SIDE)
        square = images[i, :, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
        square[:] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    return places


def find_squares(images: torch.Tensor) -> torch.Tensor:
    """The cells (n,) of the red squares in uint8 images (n, 3, H, W)."""
    red = (images[:, 0].int() - images[:, 1].int()).float()
    return faithfulness.on_grid(red).flatten(1).argmax(1)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--epochs", type=integer(1), default=8, metavar="N", help="of training")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    rows = [["", "method", "images", "on the square", "near"]]
    with tempfile.TemporaryDirectory() as folder:
        digits, root = load_data("digits", folder), Path(folder)
        for part in ("train", "test"):
            split = getattr(digits, part)
            images, labels = (x.clone() for x in split.rows(torch.arange(len(split))))
            plant(images, labels, generator)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                target = root / "images" / part / str(label.item()) / f"{i:04}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(target)
        common = ["--dataset", "folder", "--data-dir", str(root / "images")]
        common += ["--no-flip", "--shift", "2", "--epochs", str(args.epochs), "--batch-size", "32"]
        for name, script in SCRIPTS.items():
            script.main([*common, "--out-dir", str(root / name)])
            (model,) = load_models([str(root / name / "best.pt")], "cpu")
            data = load_data_for([model], None, None)
            split = data.test.subset((data.test.labels[data.test.indices] == 0).nonzero()[:, 0])
            right = model.logits(split, data.classes).argmax(1) == 0
            split = split.subset(right.nonzero()[:, 0])
            squares = find_squares(split.rows(torch.arange(len(split)))[0])
            usable = [key for key in METHODS if key not in methods_for(model.network, 32)[1]]
            maps, _ = faithfulness.maps_of(model, model.network, split, usable)
            for method, heat in maps.items():
                top = heat.flatten(1).argmax(1)
                away = torch.stack([top // SIDE - squares // SIDE, top % SIDE - squares % SIDE])
                near = (away.abs().amax(0) <= 1).float().mean()
                on = (top == squares).float().mean()
                rows.append([name, method, str(len(split)), f"{on:.0%}", f"{near:.0%}"])
    print(table(rows))


if __name__ == "__main__":
    run(main)
