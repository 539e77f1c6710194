import torch

from masksparsity.models import create


def test_vgg16_has_13_convolutions_and_313_million_macs() -> None:
    model = create("vgg16_bn").eval()
    macs = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda module, _, out: macs.append(module.weight.numel() * out[0, 0].numel())
            )
    model(torch.randn(1, 3, 32, 32))
    assert len(macs) == 13
    assert sum(macs) + model.classifier.weight.numel() == 313_201_664
    assert sum(p.numel() for p in model.parameters()) == 14_724_042
