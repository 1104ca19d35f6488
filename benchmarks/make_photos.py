"""Make a small folder of photographs for --dataset folder.

    pip install -r benchmarks/requirements.txt
    python benchmarks/make_photos.py photos

Three photographs of surfaces (CC0, from scikit-image) are cut into overlapping squares of 64
pixels: train/<class>/*.png from the upper three quarters, test/<class>/*.png from the lowest one,
so that no pixel is in both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import skimage
from PIL import Image

from cli import Parser, UserError, command, path_type, run

SIDE, STEP = 64, 32  # pixels


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("target", type=path_type, help="folder to make")
    target = parser.parse_args(argv).target
    if target.exists():
        raise UserError(f"{target} exists already: remove it first, or choose another name")
    for name in ("brick", "grass", "gravel"):
        photo = Image.fromarray(getattr(skimage.data, name)())  # 512×512
        for part, top, bottom in (("train", 0, 384), ("test", 384, 512)):
            folder = target / part / name
            folder.mkdir(parents=True)
            for y in range(top, bottom - SIDE + 1, STEP):
                for x in range(0, photo.width - SIDE + 1, STEP):
                    photo.crop((x, y, x + SIDE, y + SIDE)).save(folder / f"{y:03}-{x:03}.png")


if __name__ == "__main__":
    run(main)
