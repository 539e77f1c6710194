"""Class folders, on disk or inside a tar archive: `train/<class>/...`, `val|test/<class>/...`."""

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from masksparsity.data.config import DataConfig
from masksparsity.data.decode import ImageFile, decode_all
from masksparsity.data.imageset import Files, ImageSet, Pixels, Split, existing_root
from masksparsity.errors import MaskSparsityError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_LAYOUT = "train/<class>/<image> and val/<class>/<image> (or test/...)"
_RESIDENT_BYTES = 2 << 30

Labelled = list[tuple[str, ImageFile]]  # class and image


def folder(config: DataConfig) -> ImageSet:
    """RGB images in class folders; the test images are those of `val`, or of `test` without it.

    Classes are numbered in the order of their names. A directory, or a .tar, .tar.gz, ... of one,
    is read where it is, with the splits at its top or one level down. Decoded at once where the
    pixels fit (`resident`), else in every epoch anew, which a compressed archive cannot serve.

    Raises:
        MaskSparsityError: no images in this layout, other classes in test than in training,
            images of different sizes without `image_size`, or an unreadable image.
    """
    root = existing_root("folder", config.root)
    splits: dict[str, Labelled] = defaultdict(list)
    for path, file in _archive(root) if root.is_file() else _directory(root):
        if place := _place(path):
            splits[place[0]].append((place[1], file))
    train, test = splits["train"], splits["val"] or splits["test"]
    if not test:
        raise MaskSparsityError(
            f"{root}: {'no test images' if train else 'no images'}; expected {_LAYOUT}"
        )
    classes = sorted({name for name, _ in train or test})
    if differing := {name for name, _ in test} ^ set(classes):
        raise MaskSparsityError(
            f"{root}: training and test images are not of the same classes: "
            f"{', '.join(sorted(differing)[:5])} in one of the two only"
        )

    if config.image_size:
        size = (config.image_size, config.image_size)
    else:
        first = test[0][1].decode()
        size = (first.height, first.width)
    decoded_bytes = 3 * size[0] * size[1] * (len(train) + len(test))
    resident = decoded_bytes <= _RESIDENT_BYTES if config.resident is None else config.resident
    if not resident and test[0][1].content is not None:
        raise MaskSparsityError(
            f"{root}: a compressed archive cannot be streamed, and {decoded_bytes >> 20} MiB of "
            "pixels are not to be resident: unpack it, or allow it with --data.resident True"
        )

    def split(images: Labelled) -> Split:
        number = {name: label for label, name in enumerate(classes)}
        images = sorted(images, key=lambda image: (image[0], image[1].name))
        files = tuple(file for _, file in images)
        labels = tuple(number[name] for name, _ in images)
        if not resident:
            return Files(files, labels, size, config.image_size)
        return Pixels(decode_all(files, size, config.image_size, root), torch.tensor(labels))

    return ImageSet(
        train=split(train) if train else None,
        test=split(test),
        classes=len(classes),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_padding=min(size) // 8 if min(size) < 64 else 0,
        flip=True,
    )


def _place(path: PurePosixPath) -> tuple[str, str] | None:
    """Split and class of a file, from its path under the root."""
    if path.suffix.lower() not in _SUFFIXES or path.name.startswith("."):
        return None
    for level in (0, 1):
        parts = path.parts[level:]
        if len(parts) > 2 and parts[0] in ("train", "val", "test"):
            return parts[0], parts[1]
    return None


def _directory(root: Path) -> Iterator[tuple[PurePosixPath, ImageFile]]:
    for parent, _, names in os.walk(root, followlinks=True):
        relative = PurePosixPath(Path(parent).relative_to(root).as_posix())
        for name in names:
            yield relative / name, ImageFile(os.path.join(parent, name))


def _archive(path: Path) -> Iterator[tuple[PurePosixPath, ImageFile]]:
    plain = path.suffix == ".tar"
    try:
        with tarfile.open(path, "r:" if plain else "r:*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if plain:
                    file = ImageFile(str(path), member.name, member.offset_data, member.size)
                else:  # going back in a compressed file means starting over: keep what passes by
                    stream = archive.extractfile(member)
                    content = stream.read() if stream else b""
                    file = ImageFile(str(path), member.name, content=content)
                yield PurePosixPath(member.name), file
            # tarfile takes a cut or damaged header for the end, which is zeros.
            if plain and archive.fileobj is not None:
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no block of zeros ends it; is it cut short?")
    except Exception as error:  # tarfile and each of the compressions raise their own
        raise MaskSparsityError(f"{path} is not a readable tar archive: {error}") from error
