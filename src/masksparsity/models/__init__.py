"""Networks by name: our CIFAR ResNets and VGG, torchvision's, timm's, or a user's function."""

from masksparsity.models.registry import Constructor, constructor, create
from masksparsity.models.weights import load_weights

__all__ = ["Constructor", "constructor", "create", "load_weights"]
