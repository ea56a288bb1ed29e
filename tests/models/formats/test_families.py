"""Every family's table, both ways, over the repository's fixtures and those of a folder beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from phyla.models.formats import FORMATS, fitting, named, open_source
from phyla.models.formats.folder import check_expressible, read_json, write_folder
from phyla.models.formats.source import load

PLACES = (Path(__file__).parents[2] / "goldens", Path(__file__).parents[4] / "shared" / "goldens")
FOLDERS = [config.parent for place in PLACES for config in sorted(place.glob("*/config.json"))]
FOLDERS = [folder for folder in FOLDERS if json.loads((folder / "config.json").read_text())["model_type"] in FORMATS]


@pytest.fixture(params=FOLDERS, ids=lambda folder: f"{folder.parents[1].name}-{folder.name}")
def folder(request):
    return request.param


def test_the_configuration_comes_back(folder):
    raw = read_json(folder / "config.json")
    layout = named(raw["model_type"])
    again = check_expressible(layout, layout.config(raw))
    assert layout.to_config(layout.config(again)) == again


@pytest.mark.parametrize("flag", ["no_such_flag", "quantization_config", "hidden_sizes"])
def test_an_unknown_flag_is_named(folder, flag):
    raw = read_json(folder / "config.json")
    with pytest.raises(ValueError, match=rf"unknown flag {flag} = \{{'bits': 4\}}"):
        named(raw["model_type"]).config(raw | {flag: {"bits": 4}})


def test_export_then_import_is_exact(folder, tmp_path):
    source = open_source(folder)
    parameters = {path: lazy.read() for path, lazy in load(source).items()}
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float32)}
    layout = named(read_json(folder / "config.json")["model_type"])
    write_folder(tmp_path / "out", layout, source.model, parameters)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == set(source.shapes) <= theirs.keys()
    for name, array in ours.items():
        # What a norm's scale exceeds 1 by has more digits than float32 has for the scale: equal as scales.
        one = np.float32(layout.name == "xlstm-original" and name.endswith("norm.weight"))
        np.testing.assert_array_equal(array + one, theirs[name] + one, name)
    again = open_source(tmp_path / "out")
    assert layout.to_config(again.model) == layout.to_config(source.model)
    for path, lazy in load(again).items():
        np.testing.assert_array_equal(lazy.read(), parameters[path], path)


def test_a_format_fits(folder):
    model = open_source(folder).model
    check_expressible(fitting(model), model)
