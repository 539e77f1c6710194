"""Images by name: embedded digits, CIFAR, class folders and archives, npz files, user functions."""

from masksparsity.data.config import DataConfig
from masksparsity.data.loader import Data, Loader
from masksparsity.data.registry import create

__all__ = ["Data", "DataConfig", "Loader", "create"]
