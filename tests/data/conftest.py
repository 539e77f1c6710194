import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party files, see MASKSPARSITY_DATA."""
    if "MASKSPARSITY_DATA" not in os.environ:
        pytest.skip("MASKSPARSITY_DATA does not name the folder of third-party weights and images")
    return Path(os.environ["MASKSPARSITY_DATA"])
