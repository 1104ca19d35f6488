"""A folder of images: which files it holds, how they are decoded, and the cache of the result."""

import contextlib
import dataclasses
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from cli import UserError, quoted

SPLITS = ("train", "val", "test")


@dataclasses.dataclass
class Listing:
    """The image files of a folder, before any is decoded."""

    files: list[tuple[str, str]]  # path, and a stamp that changes when the file does
    labels: list[int]  # a class number per file
    parts: dict[str, range]  # positions in `files` of each split; "all" without such folders
    classes: list[str]
    notes: list[str]  # what the reader should know, e.g. how many files were skipped

    def digest(self, root: Path) -> str:
        """A short hash of the files' relative paths and sizes; copying a folder keeps it."""
        return digest_of(
            [f"{os.path.relpath(path, root)} {s.split()[0]}" for path, s in self.files]
        )


def list_images(root: Path, *, test_alone: bool = False) -> Listing:
    """All images in `root/<split>/<class>/`, or in `root/<class>/`.

    Args:
        root: the folder.
        test_alone: `root/train` may be missing.

    Raises:
        UserError: no such folder, no images, one class, or a class that train/ lacks.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "there is no such folder"
        raise UserError(f"--data-dir {root}: {what}")
    splits, unused = _split_folders(root, test_alone)
    files, parts, skipped = [], {}, 0
    for part in splits or [""]:
        found, others = _scan(root / part)
        if not found:
            raise UserError(
                f"--data-dir {root}: no images in {root / part}/<class>/, such as cat/1.jpg"
            )
        parts[part or "all"] = range(len(files), len(files) + len(found))
        files, skipped = files + found, skipped + others

    names = [Path(path).parent.name for path, _ in files]
    names_of = {part: {names[row] for row in rows} for part, rows in parts.items()}
    classes = sorted(next(iter(names_of.values())))  # those of train/, which comes first
    if len(classes) < 2:
        raise UserError(f"--data-dir {root}: there is one class, {classes[0]!r}; two are needed")
    for part, found in names_of.items():
        if found - set(classes):
            raise UserError(
                f"--data-dir {root}: class {min(found - set(classes))!r} is in {part}/ but not in "
                "train/: add it there, or remove it"
            )
    notes = [f"skipped files: {skipped} (not {' '.join(IMG_EXTENSIONS)})"] if skipped else []
    if unused:
        notes.append(f"not used: {quoted(unused)}")
    missing = set(classes) - names_of.get("test", set(classes))
    if missing:
        notes.append(f"no test images of {quoted(missing)}")
    return Listing(files, [classes.index(name) for name in names], parts, classes, notes)


def _split_folders(root: Path, test_alone: bool) -> tuple[list[str], set[str]]:
    """Which of train/, val/ and test/ hold classes, and which folders are not used."""
    folders = [folder.name for folder in _folders(root)]
    splits = [part for part in SPLITS if part in folders]
    nested = any(_folders(root / part) for part in splits)
    # Without train/ and test/ the folders are classes. So they are if train/ has no folders in it
    # and other folders are beside it: then a class is called train.
    if not {"train", "test"} & set(splits) or (len(folders) > len(splits) and not nested):
        return [], set()
    if not {"train", "test"} <= set(splits) and not (test_alone and "test" in splits):
        missing = "test" if "train" in splits else "train"
        raise UserError(
            f"--data-dir {root}: there is no folder {missing}/<class>/ beside {splits[0]}/: add "
            "it, or put the classes' folders directly there"
        )
    return splits, set(folders) - set(splits)


def digest_of(lines: list[str]) -> str:
    """A short hash of some lines of text."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _scan(folder: Path):
    """All images in `folder/<class>/`, as (path, stamp), sorted; and how many files are skipped."""
    found, skipped = [], 0
    for directory in _folders(folder):
        if not directory.name.isprintable():
            raise UserError(
                f"{folder}: the folder name {directory.name!r} cannot be printed; rename it"
            )
        before = len(found)
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                hidden = entry.name.startswith(".")  # such as the ._x.jpg of macOS
                if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file() and not hidden:
                    stat = entry.stat()
                    found.append((entry.path, f"{stat.st_size} {stat.st_mtime_ns}"))
                else:
                    skipped += 1
        if len(found) == before:
            raise UserError(
                f"{directory}: no images ({' '.join(IMG_EXTENSIONS)}): add some, or "
                "remove the folder"
            )
    return found, skipped


def decoded_images(root: Path, files: list[tuple[str, str]], size: int) -> torch.Tensor:
    """The images uint8 (M, 3, size, size), memory-mapped; decoded once, then read from a cache.

    The name of the cache changes with the files.

    Raises:
        UserError: a file cannot be read, or the cache cannot be written or is damaged.
    """
    digest = digest_of([f"{os.path.relpath(path, root)} {stamp}" for path, stamp in files])
    cache = root / f".cache-{size}-{digest}.npy"
    if not cache.exists():
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False}
                header["shape"] = (len(files), 3, size, size)
                np.lib.format.write_array_header_1_0(file, header)
                for path, _ in tqdm(files, "decoding", unit=" images", disable=None):
                    pixels = np.asarray(read_image(path, size))  # (size, size, 3)
                    file.write(pixels.transpose(2, 0, 1).tobytes())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(cache)
            for old in root.glob(f".cache-{size}-*.npy"):
                if old != cache:
                    old.unlink(missing_ok=True)
        except PermissionError as error:
            raise UserError(
                f"--data-dir {root}: the decoded images cannot be kept there ({error.strerror}): "
                "make it writable, or use a copy"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    try:
        images = np.load(cache, mmap_mode="c")  # copy-on-write: PyTorch warns of read-only arrays
    except (ValueError, EOFError):
        raise UserError(f"{cache}: damaged; remove it, and it will be made again") from None
    return torch.from_numpy(images)


def read_image(path: str | Path, size: int | None = None) -> Image.Image:
    """Read an image file as RGB, upright. With `size`: shorter side to `size`, then centre crop.

    Of an animation the first frame is read.

    Raises:
        UserError: the file is missing, or not an image that Pillow can read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                image = to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name image files") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; replace it, or remove it") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than 178 megapixels; make it smaller") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: cannot be read ({error}); replace it, or remove it") from None
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: 16 bits become 8, transparent pixels are laid over white.

    Raises:
        ValueError: its values are floating-point numbers, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers")
    if image.mode.startswith("I"):  # up to 65,535
        values = np.asarray(image).astype(np.float32) / 257  # 65,535 / 255
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
