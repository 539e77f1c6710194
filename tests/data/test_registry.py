import pytest
import torch

from masksparsity.data import Data, DataConfig, create
from masksparsity.errors import MaskSparsityError


def make(config: DataConfig = DataConfig(), **kwargs) -> Data:  # noqa: B008
    defaults = {"batch_size": 64, "device": torch.device("cpu"), "seed": 0}
    return create(config, **{**defaults, **kwargs})


def test_digits_are_the_default() -> None:
    data = make()
    assert (data.classes, data.channels, data.size, data.name) == (10, 1, (8, 8), "digits")
    assert data.training().samples == 1442 // 64 * 64
    assert data.test.samples == 355
    images = torch.cat([x for x, _ in make(DataConfig(crop_padding=0)).training().epoch(0)])
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_a_resumed_run_reads_what_the_first_would_have_read() -> None:
    first, second = make().training(), make().training()
    list(first.epoch(0))
    for (x, y), (x2, y2) in zip(first.epoch(1), second.epoch(1), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "digit"}, "did you mean digits"),
        ({"name": "folder"}, "--data.root"),
        ({"resident": False}, "only folder can stream"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "1 channels"),
        ({"mean": (0.5,)}, "go together"),
        ({"mean": (0.5,), "std": (0.0,)}, "positive"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"name": "nosuchmodule_for_test:f"}, "no module"),
    ],
)
def test_mistakes_are_named(settings: dict, match: str) -> None:
    with pytest.raises(MaskSparsityError, match=match):
        make(DataConfig(**settings))


def test_a_function_of_the_users_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "mydata_for_test.py").write_text(
        "import torch\n"
        "x, y = torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2), torch.arange(5)\n"
        "def arrays(config): return x, y, x.movedim(1, 3), y\n"
        "def floats(config): return x / 255, y, x, y\n"
        "def fewer(config): return x, y\n"
        "def sizes(config): return x, y, x[..., :1], y\n"
        "def ready(config):\n"
        "    from masksparsity.data import DataConfig, create\n"
        "    return create(DataConfig(), batch_size=8, device=torch.device('cpu'), seed=0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = make(DataConfig(name="mydata_for_test:arrays"))
    assert (data.classes, data.channels, data.size) == (5, 3, (2, 2))
    ((x, y),) = data.test.epoch(0)
    ((train, order),) = data.training().epoch(0)
    assert torch.equal(train[order.argsort()], x)
    assert y.tolist() == list(range(5))
    assert len(make(DataConfig(name="mydata_for_test:ready")).training()) == 1442 // 8
    for function, match in (("floats", "uint8"), ("fewer", "must return"), ("sizes", "shapes")):
        with pytest.raises(MaskSparsityError, match=match):
            make(DataConfig(name=f"mydata_for_test:{function}"))


def test_flags_are_generated_from_the_fields() -> None:
    import tyro

    args = ["--name", "folder", "--root", "x", "--mean", "0.5", "0.4", "--std", "1", "1"]
    config = tyro.cli(DataConfig, args=[*args, "--crop-padding", "2", "--resident", "False"])
    assert config == DataConfig(
        name="folder",
        root=config.root,
        mean=(0.5, 0.4),
        std=(1.0, 1.0),
        crop_padding=2,
        resident=False,
    )
