"""A folder of images: which files it holds, how they are decoded, and the cache of the result."""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import struct
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from cli import UserError, locked, printable, quoted, warn, writing

SPLITS = {  # names of the folders of a split
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
MOST_NAMED = 10  # files in a message
SAMPLE_FORMAT, PHOTOMETRIC, SAMPLES = 339, 262, 277  # tags of a TIFF
# What Pillow raises for damaged files and metadata: found by damaging half a million.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, EOFError, struct.error)
DAMAGED += (Image.DecompressionBombError,)
ADVICE = "replace it, or remove it"
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long texts are no reason to refuse


class BadImageError(UserError):
    """A file that cannot be used: its path, the reason, and what to do."""

    def __init__(self, path, reason: str, advice: str):
        self.reason = f"{path}: {reason}"
        super().__init__(f"{self.reason}; {advice}")


class ImageFile(NamedTuple):
    """An image file of a folder."""

    path: str
    name: str  # split/class/file: the same on every system
    class_name: str
    stamp: str  # changes when the file does


@dataclasses.dataclass
class Listing:
    """The image files of a folder, before any is decoded."""

    files: list[ImageFile]
    parts: dict[str, range]  # positions in `files` of each split; "all" without such folders
    classes: list[str]
    notes: list[str]  # what the reader should know, e.g. how many files were skipped

    @property
    def labels(self) -> list[int]:
        """A class number per file."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [numbers[file.class_name] for file in self.files]


# ---------------------------------------------------------------- which files


def list_images(root: Path, classes: list[str] | None = None) -> Listing:
    """All images in `root/<split>/<class>/`, or in `root/<class>/`.

    Args:
        root: the folder.
        classes: those of the networks to measure. Then `root/train` may be missing, and there may
            be fewer classes, but no others. None: the classes of the training images.

    Raises:
        UserError: no such folder, no images, one class, a class that is not known, or images that
            would be ignored.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "there is no such folder"
        raise UserError(f"--data-dir {root}: {what}")
    archive = root if (root / "batches.meta").exists() else root / "cifar-10-batches-py"
    if archive.is_dir() and not holds_images(root):
        advice = f"use --dataset cifar10 --data-dir {archive.parent}"
        raise UserError(f"--data-dir {root}: this is CIFAR-10 itself: {advice}")
    files, parts, skipped = [], {}, collections.Counter()
    splits = _split_folders(root, classes)
    for part, folder in splits.items():
        found = [file for each in _folders(folder) for file in _images(each, part, skipped)]
        if not found:
            raise UserError(f"--data-dir {root}: no images in {folder}/<class>/, such as cat/1.jpg")
        parts[part] = range(len(files), len(files) + len(found))
        files += found
        for path in folder.iterdir():
            skipped["links to missing files"] += path.is_symlink() and not path.exists()
            skipped["images in no class's folder"] += path.is_file() and _is_image(path.name)
    notes = [f"skipped {reason}: {count}" for reason, count in skipped.items() if count]
    unused = {path.name for path in _folders(root)} - {path.name for path in splits.values()}
    if unused and "all" not in splits:
        notes.append(f"not used: {quoted(unused)}")
    first = parts[next(iter(parts))]  # train/, or all
    known = classes or sorted({files[row].class_name for row in first})
    if len(known) < 2:
        raise UserError(f"--data-dir {root}: there is one class, {known[0]!r}; two are needed")
    for part, rows in parts.items():
        others = {files[row].class_name for row in rows} - set(known)
        if others and classes:
            raise UserError(
                f"--data-dir {root}: the checkpoint's {len(classes)} classes do not have "
                f"{quoted(others)}: choose its own data (--dataset, --data-dir)"
            )
        if others:
            raise UserError(
                f"--data-dir {root}: class {min(others)!r} is in {part}/ but not in train/: add it "
                "there, or remove it"
            )
    return Listing(files, parts, known, notes)


def _split_folders(root: Path, classes: list[str] | None) -> dict[str, Path]:
    """The folder of each split; {"all": root} if the folders in `root` are classes."""
    folders, splits = _folders(root), {}
    for part, names in SPLITS.items():
        # Without folders in it, only these very names are splits: "Training" may be a class.
        found = [f for f in folders if f.name == part or (f.name.lower() in names and _folders(f))]
        if len(found) > 1:
            both = f"{found[0].name}/ and {found[1].name}/ are both {part} images"
            raise UserError(f"--data-dir {root}: {both}: keep one")
        if found:
            splits[part] = found[0]
    # Without train/ and test/ the folders are classes. So they are if train/ has no folders in it
    # and other folders are beside it: then a class is called train.
    nested = any(_folders(folder) for folder in splits.values())
    if not {"train", "test"} & set(splits) or (len(folders) > len(splits) and not nested):
        return {"all": root}
    if ("train" not in splits and classes is None) or "test" not in splits:
        missing = "test" if "train" in splits else "train"
        advice = "add it, or put the classes' folders directly there"
        if "val" in splits:
            advice = f"add it, for example with some of the images of {splits['val'].name}/"
        raise UserError(
            f"--data-dir {root}: there is no folder {missing}/<class>/ beside "
            f"{next(iter(splits.values())).name}/: {advice}"
        )
    return splits


def holds_images(root: Path) -> bool:
    """Whether there are images in `root/<class>/` or `root/train/<class>/`."""
    found = (path.name for pattern in ("*/*", "train/*/*") for path in root.glob(pattern))
    return any(map(_is_image, found))


def _composed(name: str) -> str:
    """A name from disk in Unicode's composed form (NFC); macOS may use the other one."""
    return unicodedata.normalize("NFC", name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(found, key=lambda path: _composed(path.name))


def _images(directory: Path, part: str, skipped: collections.Counter) -> list[ImageFile]:
    """The images directly in a class's folder, sorted; `skipped` counts other files, by reason.

    Raises:
        UserError: there are none, or some in folders below, or the class's name is unprintable.
    """
    if printable(directory.name) != directory.name:
        raise UserError(
            f"{directory.parent}: the folder name {directory.name!r} cannot be printed; rename it"
        )
    class_name = _composed(directory.name)
    found = []
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: _composed(entry.name)):
            if entry.name.startswith("."):  # such as the ._x.jpg of macOS
                skipped["hidden files"] += 1
            elif entry.is_dir():
                deep = sum(_is_image(f) for _, _, files in os.walk(entry.path) for f in files)
                if deep:
                    raise UserError(
                        f"{entry.path}: images a level too deep: {deep}. Move them up into "
                        f"{directory}, or give --data-dir the folder above the classes"
                    )
            elif entry.is_symlink() and not Path(entry.path).exists():
                skipped["links to missing files"] += 1
            elif not _is_image(entry.name) or not entry.is_file():
                skipped[f"files that are not {' '.join(IMG_EXTENSIONS)}"] += 1
            else:
                stat = entry.stat()
                stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
                name = f"{part}/{class_name}/{_composed(entry.name)}"
                found.append(ImageFile(entry.path, name, class_name, stamp))
    if not found:
        raise UserError(
            f"{directory}: no images ({' '.join(IMG_EXTENSIONS)}): add some, or remove the folder"
        )
    return found


# ---------------------------------------------------------------- cache


def decoded_images(root: Path, listing: Listing, size: int) -> tuple[torch.Tensor, str]:
    """Decode the files once; later read them from a cache, whose name changes with the files.

    The cache is in `root` or, where that cannot be written, in PyTorch's own cache.

    Returns:
        (images uint8 (M, 3, size, size), memory-mapped; a hash of the files' names and content).

    Raises:
        UserError: files cannot be read, or the cache cannot be written or is damaged.
    """
    stamps = digest_of([f"{file.name} {file.stamp}" for file in listing.files])
    name = f".cache-{size}-{stamps}.npy"
    elsewhere = Path(torch.hub.get_dir()).parent / "images" / digest_of([str(root.resolve())])
    for folder in (root, elsewhere):
        cache = folder / name
        if not cache.exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with locked(folder, wait=True):
                    if not cache.exists():  # another program may have made it meanwhile
                        _make_cache(cache, listing, size)
            except OSError as error:
                if folder == root and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    continue
                with writing(cache):
                    raise
        if folder != root:
            listing.notes.append(f"decoded images are kept in {folder}")
        break
    try:
        facts = json.loads(cache.with_suffix(".json").read_text())
        images = np.load(cache, mmap_mode="c")  # copy-on-write: PyTorch warns of read-only arrays
    except (ValueError, EOFError, FileNotFoundError):
        raise UserError(f"{cache}: damaged; remove it, and it will be made again") from None
    for remark in facts["remarks"]:
        warn(remark)
    return torch.from_numpy(images), facts["content"]


def _make_cache(cache: Path, listing: Listing, size: int) -> None:
    """Decode all files into `cache`, and write what was found on the way beside it, as JSON."""
    for old in cache.parent.glob(f".cache-{size}-*"):
        old.unlink(missing_ok=True)  # of other files, or of a program that was killed
    partial = cache.with_suffix(".tmp")
    try:
        with partial.open("wb") as file:
            shape = (len(listing.files), 3, size, size)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            cache.with_suffix(".json").write_text(json.dumps(_decode(listing, size, file)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(cache)
    finally:
        partial.unlink(missing_ok=True)


def _decode(listing: Listing, size: int, target) -> dict:
    """Write the pixels of all files into `target`; return their hash, and remarks on them.

    Raises:
        UserError: files that cannot be read; up to ten are named.
    """
    contents, bad, remarks, deep = [], [], [], []
    for file in tqdm(listing.files, "decoding", unit=" images", disable=None):
        try:
            image = read_image(file.path, size, remarks)
        except BadImageError as error:
            bad.append(error)
            if len(bad) == MOST_NAMED:
                break
            continue
        deep += [image.info["largest"]] if "largest" in image.info else []
        target.write(np.asarray(image).transpose(2, 0, 1).tobytes())
        with Path(file.path).open("rb") as source:
            contents.append(f"{file.name} {hashlib.file_digest(source, 'sha256').hexdigest()}")
    if bad:
        reasons = ", ".join(error.reason for error in bad)
        several = f"{len(bad)} files cannot be used; replace or remove them: {reasons}"
        raise bad[0] if len(bad) == 1 else UserError(several)
    if deep and max(deep) < 2**14:
        text = f"{len(deep)} images have 16 bits, but their largest value is {max(deep)} of 65,535"
        remarks.insert(0, f"{text}: if they hold fewer bits, convert them to 8 bits first")
    if len(remarks) > MOST_NAMED:
        remarks[MOST_NAMED:] = [f"... and {len(remarks) - MOST_NAMED} more"]
    return {"content": digest_of(contents), "remarks": remarks}


def digest_of(lines: list[str]) -> str:
    """A short hash of some lines of text."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


# ---------------------------------------------------------------- one file


def read_image(path, size: int | None = None, remarks: list[str] | None = None) -> Image.Image:
    """Read an image file as RGB, upright. With `size`: shorter side to `size`, then centre crop.

    Of an animation the first frame is read. The result's `info` has the `largest` value of a file
    of 16 bits. `remarks` is a list that gets what Pillow warns of.

    Raises:
        BadImageError: the file is missing, or not an image that Pillow can read.
    """
    try:
        with warnings.catch_warnings(record=True) as caught, Image.open(path) as image:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)  # such as "Corrupt EXIF data"
            deep = ";16" in str(image.tile)  # before the file is read
            image.load()
            with contextlib.suppress(*DAMAGED):  # its pixels count, not its metadata
                ImageOps.exif_transpose(image, in_place=True)
    except DAMAGED as error:
        raise BadImageError(path, *_reason(error, path)) from None
    found = [str(warning.message) for warning in caught]
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(SAMPLES, 1) > len(image.getbands()):
        found.append(f"only {len(image.getbands())} of its {tags[SAMPLES]} bands are used")
    if remarks is not None:
        remarks += [f"{path}: {text}" for text in found]
    try:
        largest = _largest(image) if deep else None
        image = to_rgb(image, tags)
    except ValueError as error:
        raise BadImageError(path, str(error), "convert it to 8 bits") from None
    image.info = {} if largest is None else {"largest": largest}
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return image


def _reason(error: Exception, path) -> tuple[str, str]:
    """Why a file cannot be read, and what to do."""
    if isinstance(error, UnidentifiedImageError):
        with Path(path).open("rb") as file:
            start = file.read(12)
        if start[:4] in (b"II*\0", b"MM\0*"):
            return "a TIFF of bands or bits that Pillow does not read", "save it as 8-bit RGB"
        if start[4:11] in (b"ftyphei", b"ftypmif"):
            return "a HEIC image", "save it as JPEG or PNG"
        return "not an image", ADVICE
    known = {
        FileNotFoundError: ("no such file", "check its name"),
        IsADirectoryError: ("is a folder", "name image files"),
        PermissionError: ("may not be read", "change its permissions"),
        Image.DecompressionBombError: ("more than 178 megapixels", "make it smaller"),
    }
    return known.get(type(error), (f"cannot be read ({error})", ADVICE))


def _largest(image: Image.Image) -> int:
    """The largest value, of 65,535, in a file of 16 bits; Pillow has colours of 8 bits of them."""
    extrema = np.array(image.getextrema()).reshape(-1, 2)[:, 1]
    colors = [n for band, n in zip(image.getbands(), extrema, strict=True) if band != "A"]
    return int(max(colors)) * (1 if image.mode[0] == "I" else 257)


def to_rgb(image: Image.Image, tags=()) -> Image.Image:
    """An image of any mode as RGB: 16 bits become 8, transparent pixels are laid over white.

    `tags` are those of a TIFF.

    Raises:
        ValueError: the range of its values is unknown.
    """
    tags = dict(tags)
    kinds = tags.get(SAMPLE_FORMAT, ())
    if image.mode == "F" or 3 in kinds:
        raise ValueError("its values are floating-point numbers, whose range is unknown")
    # In files of these formats "I" is unsigned and scaled to 16 bits.
    wide = image.mode[:4] == "I;16" or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if 2 in kinds or (image.mode[:1] == "I" and not wide):
        raise ValueError("its values are signed or 32-bit integers, whose range is unknown")
    if wide:
        values = np.asarray(image).astype(np.float32) / 257  # 65,535 / 255
        values = values.round().clip(0, 255)
        values = 255 - values if tags.get(PHOTOMETRIC) == 0 else values  # 0 is white
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
