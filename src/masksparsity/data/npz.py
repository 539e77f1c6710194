"""Sets that are arrays already: npz files, the embedded digits, a function of the user's."""

from pathlib import Path

from masksparsity.data.config import DataConfig
from masksparsity.data.imageset import ImageSet, Pixels, need_root
from masksparsity.data.loader import Data
from masksparsity.errors import MaskSparsityError
from masksparsity.userfunction import user_function


def digits(config: DataConfig) -> ImageSet:
    """1,797 handwritten digits of 8x8 pixels, 10 classes: scikit-learn's `load_digits`.

    They are the test part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
    UCI Machine Learning Repository, 1998. The values 0..16 are stored times 15, as uint8 0..240.
    Of every class, in the original order, each fifth image is a test image: 1,442 train, 355 test.
    """
    return _set(Path(__file__).with_name("digits.npz"), crop_padding=1)


def npz(config: DataConfig) -> ImageSet:
    """A file of uint8 images and integer labels: `x_train, y_train, x_test, y_test`, or `x, y`.

    With `x, y` alone it is a set to evaluate on.
    """
    return _set(need_root("npz", config.root))


def user(config: DataConfig) -> ImageSet | Data:
    """`module:function`, called with the config: returns arrays as in `npz`, or a `Data`."""
    function = user_function(config.name)
    try:
        made = function(config)
    except MaskSparsityError:
        raise
    except Exception as error:
        raise MaskSparsityError(
            f"{config.name}, called with the settings of the data, raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(made, Data):
        return made
    if not isinstance(made, tuple) or len(made) != 4:
        raise MaskSparsityError(
            f"{config.name} must return (x_train, y_train, x_test, y_test) or a Data, not "
            f"{type(made).__name__}"
        )
    train = Pixels.checked(made[0], made[1], f"{config.name}, training set")
    return _imageset(train, Pixels.checked(made[2], made[3], f"{config.name}, test set"))


def _set(path: Path, crop_padding: int = 0) -> ImageSet:
    import numpy as np

    if not path.is_file():
        raise MaskSparsityError(f"{path}: no such npz file")
    try:
        # Opened here, since NumPy leaves a file that it cannot read open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zip, zlib, numpy and the file system each raise their own
        raise MaskSparsityError(
            f"{path} is not a readable npz file of plain arrays: {error}"
        ) from error
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train = Pixels.checked(arrays["x_train"], arrays["y_train"], f"{path}, x_train and y_train")
        test = Pixels.checked(arrays["x_test"], arrays["y_test"], f"{path}, x_test and y_test")
        return _imageset(train, test, crop_padding)
    if {"x", "y"} <= arrays.keys():
        return _imageset(None, Pixels.checked(arrays["x"], arrays["y"], path))
    raise MaskSparsityError(
        f"{path} holds {', '.join(arrays) or 'nothing'}; it should hold x_train, y_train, x_test "
        "and y_test, or x and y to evaluate on"
    )


def _imageset(train: Pixels | None, test: Pixels, crop_padding: int = 0) -> ImageSet:
    classes = 1 + int(max(split.labels.max() for split in (train, test) if split))
    return ImageSet(train=train, test=test, classes=classes, crop_padding=crop_padding)
