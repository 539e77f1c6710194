"""Recipes, and configs in files."""

import json
from pathlib import Path
from typing import Any

import pytest

from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline import Config
from masksparsity.recipes import RECIPES, digits_resnet20


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str, tmp_path: Path) -> None:
    config = RECIPES[name]()
    assert config.recipe == name
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.as_json()))
    assert Config.read(path) == config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"sede": 1}, "no setting is called sede"),
        ({"seed": "one"}, "seed cannot be 'one'"),
        ({"baseline": {"epochs": 3}}, "baseline.*lr"),
        ({"baseline": {"epochs": -3, "lr": 0.1}}, "negative"),
        ({"device": "tpu"}, "device cannot be 'tpu'"),
        ({"mask": {"ignore": [1]}}, "mask.ignore cannot be 1"),
        ({"finetune": None}, "finetune cannot be None"),
    ],
)
def test_an_edited_config_is_checked(edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(digits_resnet20().as_json() | edit))
    with pytest.raises(MaskSparsityError, match=message) as error:
        Config.read(path)
    assert str(path) in str(error.value)
