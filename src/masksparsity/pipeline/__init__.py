"""The whole way from a network to a smaller one, stage by stage, each from files to files."""

from masksparsity.pipeline.config import Config
from masksparsity.pipeline.runner import execute, run
from masksparsity.pipeline.workspace import Workspace

__all__ = ["Config", "Workspace", "execute", "run"]
