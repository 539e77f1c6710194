from pathlib import Path

import numpy as np
import pytest
import torch

from masksparsity.data import Data, DataConfig, create
from masksparsity.data.npz import digits
from masksparsity.errors import MaskSparsityError

CPU = torch.device("cpu")
IMAGES = np.arange(6 * 3 * 4 * 5, dtype=np.uint8).reshape(6, 3, 4, 5)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def read(path: Path, **settings) -> Data:
    config = DataConfig(name="npz", root=path, **settings)
    return create(config, batch_size=2, device=CPU, seed=0)


def test_digits_are_scikit_learns() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    is_test = np.zeros(len(source.target), bool)
    for label in range(10):
        is_test[np.flatnonzero(source.target == label)[4::5]] = True
    made = digits(DataConfig())
    for split, chosen in ((made.train, ~is_test), (made.test, is_test)):
        assert np.array_equal(split.images[:, 0].numpy(), source.images[chosen] * 15)
        assert np.array_equal(split.labels.numpy(), source.target[chosen])


@pytest.mark.parametrize("last", [False, True])
def test_four_arrays_are_a_whole_set(tmp_path: Path, last: bool) -> None:
    images = np.moveaxis(IMAGES, 1, 3) if last else IMAGES
    np.savez(tmp_path / "a.npz", x_train=images, y_train=LABELS, x_test=images, y_test=LABELS)
    data = read(tmp_path / "a.npz")
    assert (data.classes, data.channels, data.size) == (3, 3, (4, 5))
    assert data.training().samples == 6
    x = torch.cat([x for x, _ in data.test.epoch()]).double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        x.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_labels_may_be_unsigned(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "a.npz", x=IMAGES, y=LABELS.astype(dtype))
    data = read(tmp_path / "a.npz", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(torch.cat([y for _, y in data.test.epoch()]), torch.from_numpy(LABELS))


def test_two_arrays_are_a_set_to_evaluate_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=IMAGES, y=LABELS)
    with pytest.raises(MaskSparsityError, match=r"--data\.mean"):
        read(tmp_path / "a.npz")
    data = read(tmp_path / "a.npz", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert data.train is None
    assert data.test.samples == 6
    with pytest.raises(MaskSparsityError, match="may not be trained on"):
        data.training()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": IMAGES}, "holds x; it should hold"),
        ({"x": IMAGES / 255, "y": LABELS}, "uint8"),
        ({"x": IMAGES[:, 0], "y": LABELS}, "uint8"),
        ({"x": IMAGES[:, :2], "y": LABELS}, "no axis of 1 or 3"),
        ({"x": IMAGES, "y": LABELS[:5]}, "labels must be"),
        ({"x": IMAGES, "y": LABELS / 2}, "labels must be"),
        ({"x": IMAGES, "y": LABELS * 1j}, "labels must be"),
        ({"x": IMAGES, "y": LABELS - 1}, "a negative label, -1"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "no images"),
        ({"x": IMAGES, "y": np.array(list("abcabc"))}, "not arrays of numbers"),
        ({"x": IMAGES, "y": np.array([{}] * 6, object)}, "not a readable npz"),
    ],
)
def test_unfit_arrays_are_named(tmp_path: Path, arrays: dict, match: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MaskSparsityError, match=match) as caught:
        read(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


def test_damaged_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(MaskSparsityError, match="no such npz file"):
        read(path)
    np.savez_compressed(path, x=IMAGES, y=LABELS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MaskSparsityError, match="not a readable npz"):
        read(path)
