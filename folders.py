"""A folder of images: which files it holds, how they are decoded, and the cache of the result."""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from cli import UserError, composed, locked, naming, printable, quoted, warn, writing

SPLITS = {  # names of the folders of a split
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
DECODER = 1  # in the name of the cache: raise it when images are decoded in another way
HIDDEN = (".", "@eaDir")  # such as ._x.jpg of macOS; thumbnails of Synology
MAX_NAMED = 10  # files in a message
DARK = 2**14  # of 65,535: 16-bit images below look black, and hold fewer bits
BITS, PHOTOMETRIC, SAMPLES, PLANES, SAMPLE_FORMAT = 258, 262, 277, 284, 339  # tags of a TIFF
# What Pillow raises for damaged files and metadata: found by damaging half a million.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, EOFError, struct.error)
DAMAGED += (Image.DecompressionBombError,)

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # some editors write texts of megabytes


class BadImageError(UserError):
    """An image file that cannot be used."""


class ImageFile(NamedTuple):
    """An image file of a folder. There may be very many, so it holds little."""

    path: str
    part: str  # the split
    class_name: str

    @property
    def name(self) -> str:  # the same on every system
        return f"{self.part}/{self.class_name}/{composed(Path(self.path).name)}"

    @property
    def stamp(self) -> str:  # changes when the file does
        fields = "{0.st_size} {0.st_mtime_ns} {0.st_ctime_ns} {0.st_ino}"
        return fields.format(Path(self.path).stat())


@dataclasses.dataclass
class Listing:
    """The image files of a folder, before any is decoded."""

    files: list[ImageFile]
    parts: dict[str, range]  # positions in `files` of each split; "all" without such folders
    notes: list[str]  # what the reader should know, e.g. how many files were skipped


# ---------------------------------------------------------------- which files


def list_images(root: Path, *, test_alone: bool = False) -> Listing:
    """All images in `root/<split>/<class>/`, or in `root/<class>/`.

    `test_alone`: `root/train` may be missing.

    Raises UserError: no such folder, no images, or images that would be ignored.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "there is no such folder"
        raise UserError(f"--data-dir {root}: {what}")
    files, parts, skipped = [], {}, collections.Counter()
    splits = _split_folders(root, test_alone)
    for folder in {root, *splits.values()}:
        for path in folder.iterdir():
            skipped["links to missing files"] += path.is_symlink() and not path.exists()
            skipped["images outside class folders"] += path.is_file() and _is_image(path.name)
    for part, folder in splits.items():
        found = [file for each in _folders(folder) for file in _images(each, part, skipped)]
        if not found:
            raise UserError(f"--data-dir {root}: no images in {folder}/<class>/, such as cat/1.jpg")
        parts[part] = range(len(files), len(files) + len(found))
        files += found
    notes = [f"skipped {reason}: {count}" for reason, count in skipped.items() if count]
    unused = {path.name for path in _folders(root)} - {path.name for path in splits.values()}
    if unused and "all" not in splits:
        notes.append(f"not used: {quoted(unused)}")
    return Listing(files, parts, notes)


def _split_folders(root: Path, test_alone: bool) -> dict[str, Path]:
    """The folder of each split; {"all": root} if the folders in `root` are classes."""
    folders = _folders(root)
    found = {part: [f for f in folders if f.name.lower() in SPLITS[part]] for part in SPLITS}
    nested = any(_folders(folder) for same in found.values() for folder in same)
    if not nested:  # then another spelling, such as Training, is a class
        found = {part: [f for f in folders if f.name == part] for part in SPLITS}
    splits = {part: same[0] for part, same in found.items() if same}
    for part, same in found.items():
        if len(same) > 1:
            both = f"{same[0].name}/ and {same[1].name}/ are both {part} images"
            raise UserError(f"--data-dir {root}: {both}: keep one")
    # Where train/ has no folders in it, and others are beside it, a class is called train.
    if not nested and (len(folders) > len(splits) or not {"train", "test"} & set(splits)):
        return {"all": root}
    if ("train" not in splits and not test_alone) or "test" not in splits:
        missing = "test" if "train" in splits else "train"
        advice = "add it, or put the classes' folders directly there"
        if (root / missing).is_symlink():
            advice = "it is a link to a missing folder"
        elif "val" in splits:
            advice = f"add it, for example with some of the images of {splits['val'].name}/"
        raise UserError(
            f"--data-dir {root}: there is no folder {missing}/<class>/ beside "
            f"{next(iter(splits.values())).name}/: {advice}"
        )
    return splits


def holds_images(root: Path) -> bool:
    """Whether there are images in two folders `root/<class>/` or `root/train/<class>/`."""
    found = [path for pattern in ("*/*", "train/*/*") for path in root.glob(pattern)]
    return len({path.parent for path in found if _is_image(path.name)}) > 1


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."


def _folders(folder: Path) -> list[Path]:
    seen = (path for path in folder.iterdir() if not path.name.startswith(HIDDEN))
    return sorted(filter(Path.is_dir, seen), key=lambda path: composed(path.name))


def _images(directory: Path, part: str, skipped: collections.Counter) -> list[ImageFile]:
    """The images directly in a class's folder, sorted; `skipped` counts other files, by reason.

    Raises UserError: there are none, or some in folders below, or an unprintable class name.
    """
    if printable(directory.name) != directory.name:
        raise UserError(
            f"{directory.parent}: the folder name {directory.name!r} cannot be printed; rename it"
        )
    class_name, found, others = composed(directory.name), [], collections.Counter()
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: composed(entry.name)):
            if entry.name.startswith(HIDDEN):
                others["hidden files"] += 1
            elif entry.is_symlink() and not Path(entry.path).exists():
                others["links to missing files"] += 1
            elif entry.is_dir():
                deep = sum(_is_image(f) for _, _, files in os.walk(entry.path) for f in files)
                if deep:
                    raise UserError(
                        f"{entry.path}: images a level too deep: {deep}. --data-dir is the folder "
                        "above the classes, or above train/ and test/: use that, or move images"
                    )
            elif not _is_image(entry.name) or not entry.is_file():
                others[f"files that are not {' '.join(IMG_EXTENSIONS)}"] += 1
            else:
                found.append(ImageFile(entry.path, part, class_name))
    if not found:
        there = "".join(f"; {reason}: {count}" for reason, count in others.items())
        none = f"no images ({' '.join(IMG_EXTENSIONS)}{there})"
        raise UserError(f"{directory}: {none}: add some, or remove the folder")
    skipped.update(others)
    return found


# ---------------------------------------------------------------- cache


def decoded_images(root: Path, listing: Listing, size: int) -> tuple[torch.Tensor, str]:
    """Decode the files once; later read them from a cache, whose name changes with the files.

    It is in `root` or, where that cannot be written, in PyTorch's own cache.

    Returns:
        (images uint8 (M, 3, size, size), memory-mapped; a hash of the files' names and content).

    Raises UserError: files cannot be read, or the cache cannot be written or is damaged.
    """
    stamps = digest_of(f"{file.name} {file.stamp}" for file in listing.files)
    name, shape = f".cache-{size}-{DECODER}-{stamps}.bin", (len(listing.files), 3, size, size)
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
                variable = " (TORCH_HOME)" if folder != root else ""
                with naming(f"--data-dir {root}:", variable), writing(cache):
                    raise
        if folder != root:
            listing.notes.append(f"decoded images are kept in {folder}")
        break
    facts = None
    with contextlib.suppress(ValueError, FileNotFoundError):
        facts = json.loads(cache.with_suffix(".json").read_text())
    whole = isinstance(facts, dict) and {"content", "remarks"} <= set(facts)
    if not whole or cache.stat().st_size != math.prod(shape):
        raise UserError(f"{cache}: damaged; remove it, and it will be made again")
    for remark in facts["remarks"]:
        warn(remark)
    return torch.from_numpy(np.memmap(cache, np.uint8, "c", shape=shape)), facts["content"]


def _make_cache(cache: Path, listing: Listing, size: int) -> None:
    """Decode all files into `cache`, and write what was found on the way beside it, as JSON."""
    for old in cache.parent.glob(f".cache-{size}-*"):
        with contextlib.suppress(OSError):  # in use on Windows
            old.unlink()  # of other files, or of a program that was killed
    partial = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            facts = _decode(listing, size, file)
            file.flush()
            os.fsync(file.fileno())
        cache.with_suffix(".json").write_text(json.dumps(facts))
        partial.replace(cache)
    finally:
        partial.unlink(missing_ok=True)


def _decode(listing: Listing, size: int, target) -> dict:
    """Write the pixels of all files into `target`; return their hash, and remarks on them.

    Raises UserError: files that cannot be read; up to ten are named.
    """
    digests, bad, remarks, largest = [], [], [], []
    for file in tqdm(listing.files, "decoding", unit=" images", disable=None):
        try:
            image = read_image(file.path, size, remarks)
        except BadImageError as error:
            bad.append(error)
            if len(bad) == MAX_NAMED:
                break
            continue
        largest += [image.info["largest"]] if "largest" in image.info else []
        target.write(np.asarray(image).transpose(2, 0, 1).tobytes())
        digests.append(image.info["digest"])
    if bad:
        first = "the first " if len(bad) == MAX_NAMED else ""
        several = f"{first}{len(bad)} files that cannot be used: {', '.join(map(str, bad))}"
        raise bad[0] if len(bad) == 1 else UserError(several)
    if largest and max(largest) < DARK:
        remarks.insert(0, dark_remark(f"{len(largest)} images", max(largest)))
    if len(remarks) > MAX_NAMED:
        remarks[MAX_NAMED:] = [f"... and {len(remarks) - MAX_NAMED} more"]
    lines = (f"{f.name} {d.hex()}" for f, d in zip(listing.files, digests, strict=True))
    return {"content": digest_of(lines), "remarks": remarks}


def digest_of(lines) -> str:
    """A short hash of lines of text, joined by line breaks."""
    text = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


# ---------------------------------------------------------------- one file


def read_image(path, size: int | None = None, remarks: list[str] | None = None) -> Image.Image:
    """Read an image file as RGB, upright. With `size`: shorter side to `size`, then centre crop.

    Of an animation the first frame is read. The result's `info` has the `largest` value of a file
    of 16 bits, and a `digest` of the file. `remarks` is a list that gets what Pillow warns of.

    Raises BadImageError: the file is missing, or not an image that Pillow can read.
    """
    data = b""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)  # such as "Corrupt EXIF data"
            data = Path(path).read_bytes()
            image, found = _load(data)
    except DAMAGED as error:
        raise BadImageError(f"{path}: {_reason(error, data)}") from None
    found += [str(warning.message) for warning in caught]
    if remarks is not None:
        remarks += [f"{path}: {text}" for text in found]
    try:
        image = to_rgb(image)
    except ValueError as error:
        raise BadImageError(f"{path}: {error}; convert it to 8 bits") from None
    image.info["digest"] = hashlib.sha256(data).digest()
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return image


def _reason(error: Exception, data: bytes) -> str:
    """Why a file with the content `data` cannot be read, and what to do."""
    if isinstance(error, UnidentifiedImageError | ValueError):
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return "a TIFF of bands or bits that Pillow does not read; save it as 8-bit RGB"
        if data[4:11] in (b"ftyphei", b"ftypmif"):
            return "a HEIC image; save it as JPEG or PNG"
    return {
        FileNotFoundError: "no such file; check its name",
        IsADirectoryError: "is a folder; name image files",
        PermissionError: "may not be read; change its permissions",
        Image.DecompressionBombError: "more than 178 megapixels; make it smaller",
        UnidentifiedImageError: "not an image; replace it, or remove it",
    }.get(type(error), f"cannot be read ({error}); replace it, or remove it")


def _load(data: bytes) -> tuple[Image.Image, list[str]]:
    """An image with its pixels, upright, and what is left out of it."""
    with Image.open(io.BytesIO(data)) as image:
        is_16_bit = image.mode[0] == "I" or ";16" in str(image.tile)  # known before it is read
        pages = image.n_frames if image.format == "TIFF" else 1
        image.load()
        with contextlib.suppress(*DAMAGED, AttributeError):
            ImageOps.exif_transpose(image, in_place=True)
        found, bands, tags = [], len(image.getbands()), getattr(image, "tag_v2", {})
        samples, bits = tags.get(SAMPLES, bands), max(tags.get(BITS, (16,)))
        if samples > bands:
            found.append(f"only {bands} of its {samples} bands are used")
        if pages > 1:
            found.append(f"only the first of its {pages} pages is used")
        if is_16_bit:  # Pillow keeps 8 of the 16 bits of colours
            grey = image.mode[0] == "I"
            values = np.asarray(image if grey else image.convert("RGB"))
            image.info["largest"] = int(values.max()) * (2 ** max(0, 16 - bits) if grey else 257)
    return image, found


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: 16 bits become 8, transparent pixels are laid over white.

    Raises ValueError: the range of its values is unknown.
    """
    tags, info = dict(getattr(image, "tag_v2", {})), image.info
    kinds, bits = tags.get(SAMPLE_FORMAT, ()), max(tags.get(BITS, (16,)))
    if image.mode == "F" or 3 in kinds:
        raise ValueError("its values are floating-point numbers, whose range is unknown")
    # In files of these formats "I" is unsigned and scaled to 16 bits.
    unsigned = image.mode[:4] == "I;16" or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if 2 in kinds or (image.mode[0] == "I" and not unsigned):
        raise ValueError("its values are signed or 32-bit integers, whose range is unknown")
    if tags.get(PLANES) == 2 and bits > 8 and "largest" not in info:
        raise ValueError("its planes of 16 bits are read wrong by Pillow")
    if unsigned:
        values = np.asarray(image).astype(np.float32)
        clear = values == info.get("transparency", -1)
        values = (values * (255 / (2**bits - 1))).round().clip(0, 255)
        values = 255 - values if tags.get(PHOTOMETRIC) == 0 else values  # 0 is white
        image = Image.fromarray(np.where(clear, 255, values).astype(np.uint8))
    elif "largest" in info and isinstance(info.get("transparency"), tuple):
        info["transparency"] = tuple(value >> 8 for value in info["transparency"])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    image.info = {key: info[key] for key in ("largest",) if key in info}
    return image


def dark_remark(what, largest: int) -> str:
    """What to say of images of 16 bits that are all below `DARK`."""
    bits = f"{what} of 16 bits: the largest value is {largest} of 65,535"
    return f"{bits}; if they hold fewer bits, convert them to 8 bits first"
