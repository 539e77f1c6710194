import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the networks here are small, and tests run side by side


@pytest.fixture
def real_data() -> Path:
    """The folder of real data and third-party weights that MASKSPARSITY_DATA names."""
    folder = os.environ.get("MASKSPARSITY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set MASKSPARSITY_DATA to the folder that holds it")
    return Path(folder)
