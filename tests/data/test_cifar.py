import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from masksparsity.data import Data, DataConfig, create
from masksparsity.errors import MaskSparsityError

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def batch(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(count, 3072), dtype=np.uint8), list(range(count))


def python2_pickle(images: np.ndarray, label_key: bytes, labels: list[int]) -> bytes:
    """{"data": images, label_key: labels} as Python 2 and its NumPy wrote it, opcode by opcode."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = integer(images.shape[0]) + integer(images.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    array += string(b"b") + b"\x87R(K\x01" + shape + dtype + b"\x89"
    array += b"T" + struct.pack("<i", images.nbytes) + images.tobytes() + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}" + string(b"data") + array + b"s" + string(label_key) + numbers + b"s" + b"."


def write(root: Path, name: str, binary: bool) -> None:
    """4 training images per file and 3 test images."""
    hundred = name == "cifar100"
    folder = {
        ("cifar10", True): "cifar-10-batches-bin",
        ("cifar10", False): "cifar-10-batches-py",
        ("cifar100", True): "cifar-100-binary",
        ("cifar100", False): "cifar-100-python",
    }[name, binary]
    (root / folder).mkdir()
    train, test = (["train"], "test") if hundred else (TRAIN, "test_batch")
    for seed, file in enumerate((*train, test)):
        images, labels = batch(3 if file == test else 4, seed)
        if binary:
            heads = [bytes([99, label] if hundred else [label]) for label in labels]
            records = (head + image.tobytes() for head, image in zip(heads, images, strict=True))
            (root / folder / f"{file}.bin").write_bytes(b"".join(records))
        else:
            key = b"fine_labels" if hundred else b"labels"
            (root / folder / file).write_bytes(python2_pickle(images, key, labels))


def read(root: Path | None, name: str = "cifar10") -> Data:
    config = DataConfig(name=name, root=root, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    return create(config, batch_size=4, device=torch.device("cpu"), seed=0)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_of_both_sets(tmp_path: Path, name: str, binary: bool) -> None:
    write(tmp_path, name, binary)
    data = read(tmp_path, name)
    hundred = name == "cifar100"
    assert (data.classes, data.channels, data.size) == (100 if hundred else 10, 3, (32, 32))
    assert data.training().samples == (4 if hundred else 20)
    ((x, y),) = data.test.epoch()
    images, labels = batch(3, 1 if hundred else 5)
    assert torch.equal(x.to(torch.uint8), torch.from_numpy(images).view(-1, 3, 32, 32))
    assert y.tolist() == labels
    assert read(next(tmp_path.iterdir()), name).test.samples == 3


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_poisoned_batch_does_not_run(tmp_path: Path) -> None:
    write(tmp_path, "cifar10", binary=False)
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(pickle.dumps({b"data": Malicious(tmp_path / "it_ran")}))
    with pytest.raises(MaskSparsityError, match=r"data_batch_3: refused.*mkdir"):
        read(tmp_path)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("binary", [False, True])
def test_a_truncated_batch_is_named(tmp_path: Path, binary: bool) -> None:
    write(tmp_path, "cifar10", binary)
    bad = sorted(next(tmp_path.iterdir()).iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:5000])
    with pytest.raises(MaskSparsityError, match=rf"{bad.stem}.* is not a CIFAR file"):
        read(tmp_path)


def test_where_to_look_instead(tmp_path: Path) -> None:
    with pytest.raises(MaskSparsityError, match=r"cifar-10-batches-py.*--data\.download"):
        read(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(MaskSparsityError, match=r"--data\.name folder"):
        read(tmp_path)
    with pytest.raises(MaskSparsityError, match=r"--data\.root"):
        read(None)
