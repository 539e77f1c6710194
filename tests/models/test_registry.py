import copy
import sys

import pytest
import torch
from torch import nn

from masksparsity.errors import MaskSparsityError
from masksparsity.models import Constructor, constructor, create
from masksparsity.models.registry import _OURS


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        *((name, {}, 32) for name in _OURS),
        ("vgg16_bn", {"width": 8, "num_classes": 10}, 8),
        ("torchvision/mobilenet_v3_small", {"num_classes": 10}, 64),
        ("torchvision/googlenet", {"num_classes": 10, "aux_logits": False}, 64),
        ("torchvision/inception_v3", {"num_classes": 10, "aux_logits": False}, 75),
        ("timm/test_resnet", {"num_classes": 10}, 64),
    ],
)
def test_every_name_builds_runs_and_rebuilds(name: str, kwargs: dict, size: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = create(name, **kwargs)
    assert model.training
    assert model.eval()(torch.randn(2, 3, size, size)).shape == (2, 10)
    built = constructor(copy.deepcopy(model))
    assert built is not None
    again = Constructor.from_untrusted(built.name, built.kwargs).build()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in again.state_dict().items()}
    assert constructor(again) == built


def test_a_model_of_the_users_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "mynet_for_test.py").write_text(
        "from torch import nn\ndef tiny(width): return nn.Conv2d(3, width, 1)\ndef no(): return 1\n"
    )
    (tmp_path / "broken_for_test.py").write_text("import nosuchmodule_for_test\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = create("mynet_for_test:tiny", width=5)
    assert constructor(model) == Constructor("mynet_for_test:tiny", {"width": 5})
    with pytest.raises(MaskSparsityError, match="returned <class 'int'>"):
        create("mynet_for_test:no")
    with pytest.raises(MaskSparsityError, match="no function 'absent'"):
        create("mynet_for_test:absent")
    with pytest.raises(MaskSparsityError, match="PYTHONPATH"):
        create("nosuchmodule_for_test:tiny")
    with pytest.raises(ModuleNotFoundError, match="nosuchmodule_for_test"):
        create("broken_for_test:tiny")
    assert constructor(nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet65", "resnet56"),
        ("resnet50", "torchvision/resnet50"),
        ("torchvision/resnet5", "torchvision/resnet50"),
        ("torchvision/fcn_resnet50", "torchvision/"),
        ("nothing like it", "vgg16_bn"),
    ],
)
def test_an_unknown_name_gets_close_matches(name: str, hint: str) -> None:
    with pytest.raises(MaskSparsityError, match=hint):
        create(name)


@pytest.mark.parametrize("name", ["resnet20", "torchvision/resnet18", "timm/test_resnet"])
def test_weights_come_from_our_files_alone(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(MaskSparsityError, match="pretrained"):
        create(name, pretrained=True)


def test_timm_is_optional(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MaskSparsityError, match="pip install timm"):
        create("timm/resnet18")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("os:system", {}),
        ("timm/hf-hub:someone/something", {}),
        ("unheard_of", {}),
        (7, {}),
        ("resnet20", []),
        ("timm/resnet18", {"pretrained": True}),
        ("timm/resnet18", {"checkpoint_path": "somewhere"}),
        ("torchvision/resnet18", {"weights": "DEFAULT"}),
        ("resnet20", {"num_classes": [10]}),
        ("resnet20", {7: 7}),
    ],
)
def test_a_file_may_not_choose_what_code_runs(name, kwargs) -> None:
    with pytest.raises(MaskSparsityError):
        Constructor.from_untrusted(name, kwargs)
