import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from masksparsity.data import Data, DataConfig, create
from masksparsity.data import decode as decode_module
from masksparsity.errors import MaskSparsityError

CLASSES = ("cat", "dog")


def write(root: Path, *, test: str = "test", size: int = 8, count: int = 3) -> Path:
    """`count` images per class and split, grey of value 10 * number + class."""
    for split in ("train", test):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (size, size), (10 * number + label,) * 3)
                image.save(folder / f"{number}.png")
    (root / "train" / "cat" / "._0.png").write_bytes(b"litter of another system")
    (root / "notes.txt").write_text("not an image")
    return root


def read(root: Path, **settings) -> Data:
    own = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, **settings}
    config = DataConfig(name="folder", root=root, **own)
    return create(config, batch_size=2, device=torch.device("cpu"), seed=0)


def first_pixels(data: Data) -> list[tuple[int, int]]:
    return [
        (int(image[0, 0, 0].round()), int(label))
        for images, labels in data.test.epoch()
        for image, label in zip(images, labels, strict=True)
    ]


EXPECTED = [(0, 0), (10, 0), (20, 0), (1, 1), (11, 1), (21, 1)]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("test", ["test", "val"])
def test_directories(tmp_path: Path, test: str, resident: bool) -> None:
    data = read(write(tmp_path, test=test), resident=resident, workers=0)
    assert (data.classes, data.channels, data.size) == (2, 3, (8, 8))
    assert first_pixels(data) == EXPECTED
    for images, labels in data.training().epoch(0):
        assert images.shape == (2, 3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        centre = images[:, 0, 4, 4].round().long()
        assert torch.equal(centre % 10, labels)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("top", ["", "./", "animals/"])
def test_archives_are_read_where_they_are(tmp_path, suffix: str, top: str, resident: bool) -> None:
    path = tmp_path / f"animals{suffix}"
    with tarfile.open(path, "w:gz" if suffix == ".tar.gz" else "w") as archive:
        for folder in sorted(write(tmp_path / "x").iterdir(), reverse=True):
            archive.add(folder, arcname=f"{top}{folder.name}")
    if suffix == ".tar.gz" and not resident:
        with pytest.raises(MaskSparsityError, match="unpack it"):
            read(path, resident=resident)
        return
    assert first_pixels(read(path, resident=resident, workers=0)) == EXPECTED


def test_workers_do_not_change_what_is_read(tmp_path: Path) -> None:
    def epoch(workers: int) -> list[torch.Tensor]:
        data = read(tmp_path, resident=False, image_size=64, workers=workers)
        return [tensor for batch in data.training().epoch(3) for tensor in batch]

    write(tmp_path, size=70, count=2)
    noise = np.random.default_rng(0).integers(256, size=(90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "dog" / "1.png")
    before = torch.get_rng_state()
    alone, shared = epoch(0), epoch(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert alone[0].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("resident", [True, False])
def test_image_size_scales_and_cuts_out_the_centre(tmp_path: Path, resident: bool) -> None:
    write(tmp_path)
    wide = Image.new("RGB", (160, 80), (255, 0, 0))
    wide.paste((7, 7, 7), (40, 0, 120, 80))
    wide.save(tmp_path / "test" / "cat" / "0.png")
    data = read(tmp_path, image_size=16, resident=resident, workers=0)
    image = next(iter(data.test.epoch()))[0][0]
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, :, 1:-1], torch.full((3, 16, 14), 7.0))


def test_sets_to_evaluate_on_need_no_training_images(tmp_path: Path) -> None:
    shutil.rmtree(write(tmp_path) / "train")
    data = read(tmp_path)
    assert data.train is None
    assert data.test.samples == 6


def test_images_of_16_bits_lose_the_lower_8(tmp_path: Path) -> None:
    write(tmp_path)
    values = np.full((8, 8), 200 * 256 + 7, np.uint16)
    Image.fromarray(values).save(tmp_path / "test" / "cat" / "0.png")
    assert first_pixels(read(tmp_path)) == [(200, 0), *EXPECTED[1:]]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(MaskSparsityError, match="nowhere: there is no such file or directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(MaskSparsityError, match="no images; expected train/<class>"):
        read(tmp_path)
    write(tmp_path)
    other = tmp_path / "test" / "dog" / "1.png"
    Image.new("RGB", (9, 8)).save(other)
    with pytest.raises(MaskSparsityError, match=r"1\.png has 8x9 pixels.*--data\.image-size"):
        read(tmp_path)
    other.write_bytes(b"no image")
    with pytest.raises(MaskSparsityError, match=r"1\.png is no image of a known format"):
        read(tmp_path)
    for workers in (0, 1):
        with pytest.raises(MaskSparsityError, match=r"1\.png is no image of a known format$") as e:
            first_pixels(read(tmp_path, resident=False, workers=workers))
        assert str(e.value).startswith(str(other))
    Image.new("F", (9, 8)).save(other.with_suffix(".tiff"))
    other.unlink()
    with pytest.raises(
        MaskSparsityError, match=r"1\.tiff is not a readable image.* mode F have no"
    ):
        read(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(MaskSparsityError, match="dog, wolf"):
        read(tmp_path)
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(MaskSparsityError, match="no test images"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"no archive")
    with pytest.raises(MaskSparsityError, match=f"{name} is not a readable tar archive"):
        read(path)
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(write(tmp_path / "x"), arcname="")
    path.write_bytes(path.read_bytes()[:-200] if name.endswith("gz") else path.read_bytes()[:5000])
    with pytest.raises(MaskSparsityError, match=name):
        read(path)


@pytest.mark.parametrize("inside", [0, 100])
def test_an_archive_cut_at_a_header_is_no_smaller_set(tmp_path: Path, inside: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(write(tmp_path / "x"), arcname="")
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset + inside])
    with pytest.raises(MaskSparsityError, match=r"a\.tar is not a readable tar.*cut short"):
        read(path)


def test_long_decoding_says_how_far_it_is(tmp_path: Path, monkeypatch, capsys) -> None:
    ticks = iter(range(0, 100, 3))
    monkeypatch.setattr(decode_module.time, "monotonic", lambda: next(ticks))
    read(write(tmp_path))
    assert "of 6 images" in capsys.readouterr().err


def test_the_jpeg_copy_of_cifar(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.tar"
    with (
        tarfile.open(shared_data / "cifar10-jpeg.tar.gz") as source,
        tarfile.open(path, "w") as few,
    ):
        members = (member for member in source if member.isfile())
        for member in itertools.islice(members, 20):
            stream = source.extractfile(member)
            assert stream is not None
            content = stream.read()
            for split in ("train", "test"):
                copy = tarfile.TarInfo(member.name.replace("train", split))
                copy.size = len(content)
                few.addfile(copy, io.BytesIO(content))
    data = read(path)
    assert (data.classes, data.channels, data.size) == (1, 3, (32, 32))
    resident = torch.cat([images for images, _ in data.test.epoch()])
    streamed = torch.cat([images for images, _ in read(path, resident=False).test.epoch()])
    assert resident.shape == (20, 3, 32, 32)
    assert torch.equal(resident, streamed)
    assert len(resident.round().unique()) > 200
