"""Runs whose weights are coded on disk, factors, or packed: that they are written and read as what they are."""

from pathlib import Path

import jax
import numpy as np
import pytest

from phyla.cli import main
from phyla.compression.matrices import weights
from phyla.compression.recipes import parse
from phyla.models.lowrank import LowRank
from phyla.models.packed import Packed
from phyla.training import run
from phyla.training.checkpoints import CODED
from phyla.training.compress import compress_run, show
from phyla.training.saved import load
from tests.training.test_compress import equal


def on_disk(folder: Path, step: int) -> int:
    files = [*(folder / "checkpoints" / str(step)).rglob("*"), folder / CODED]
    parts = [path for path in files if path.is_file() and ({"params", "frozen", CODED} & {*path.parts})]
    return sum(path.stat().st_size for path in parts)


def test_a_run_in_huffman_codes(trained, tmp_path, capsys):
    """The same bits, in what the report says; its codes are in no other file; and it can be written again."""
    plain = compress_run(trained, parse("magnitude-90%+kmeans-16"), tmp_path / "plain")
    capsys.readouterr()
    coded = compress_run(tmp_path / "plain", parse("huffman"), tmp_path / "coded")
    show(tmp_path / "coded", coded)
    before, after = load(tmp_path / "plain"), load(tmp_path / "coded")
    equal(before.params, after.params)
    assert run.read_record(tmp_path / "coded")["compression"] == "magnitude-90%+kmeans-16+huffman"
    for record, folder in ((plain, "plain"), (coded, "coded")):
        assert record["steps"][-1]["bytes_on_disk"] == on_disk(tmp_path / folder, before.step)
    assert plain["huffman"] is None
    codes = [leaf for leaf in jax.tree.leaves(after.params) if leaf.dtype.itemsize == 1]
    assert sum(each["raw"] for each in coded["huffman"].values()) == sum(leaf.nbytes for leaf in codes)
    assert all(each["entropy"] < each["coded"] for each in coded["huffman"].values())
    header = 1000 * len(codes)
    assert (tmp_path / "coded" / CODED).stat().st_size < header + sum(s["coded"] for s in coded["huffman"].values())
    for folder in ("plain", "coded"):
        stored = [path.read_text() for path in (tmp_path / folder / "checkpoints").rglob("_METADATA")]
        assert any("'codes'" in text for text in stored) == (folder == "plain")
    assert "their entropy is" in capsys.readouterr().out
    assert coded["parameters"].keys() <= plain["parameters"].keys()
    assert coded["steps"][-1]["bits_per_byte"] == plain["steps"][-1]["bits_per_byte"]


@pytest.mark.parametrize(
    ("chain", "kind", "recorded"),
    [
        ("svd-60%@mixer+int8", LowRank, "svd-r"),
        pytest.param("sparsegpt-2:4+pack-2:4+nf4", Packed, "sparsegpt-2:4+pack-2:4+nf4", marks=pytest.mark.slow),
        pytest.param("asvd-0.5+kmeans-16+huffman", LowRank, "asvd-0.5+kmeans-16+huffman", marks=pytest.mark.slow),
    ],
)
def test_what_is_made_of_others(trained, tmp_path, chain, kind, recorded):
    """Each weight is accounted for by its own name, with all that was done to its parts; and is as it was saved."""
    record = compress_run(trained, parse(chain), tmp_path / "out")
    saved = load(tmp_path / "out")
    assert run.read_record(tmp_path / "out")["compression"].startswith(recorded)
    names = {".".join(map(str, path)) for path in weights(load(trained).model())}
    assert record["parameters"].keys() | record["left"].keys() == names
    assert not record["parameters"].keys() & record["left"].keys()
    held = {".".join(map(str, path)): weight for path, weight in weights(saved.model()).items()}
    some = [name for name, weight in held.items() if isinstance(weight, kind)]
    assert some
    for name in some:
        done = record["parameters"][name]
        assert done["recipes"][0] == chain.split("+")[0]
        assert done["bits_per_weight"] == pytest.approx(held[name].bits_per_weight)
    last = record["steps"][-1]
    assert last["bytes_in_memory"] == sum(leaf.nbytes for leaf in jax.tree.leaves(saved.params))
    total = sum(row["parameters"] * row["bits_per_weight"] for row in record["coverage"].values())
    assert total == pytest.approx(8 * last["bytes_in_memory"])
    assert np.isfinite(last["kl"])


@pytest.mark.parametrize(
    ("chain", "error"),
    [
        (["huffman"], "nothing in this model has few bits, and floats are not coded; nearest: int4+huffman"),
        (["int8+huffman", "svd-0.5"], "huffman is how the run is written, hence the last"),
        (["svd-r99"], "factors of rank 99 would not be smaller"),
        (["pack-2:4"], "that are not zero; nearest: magnitude-2:4+pack-2:4"),
    ],
)
def test_refusals(trained, tmp_path, capsys, chain, error):
    assert main(["compress", str(trained), *chain, "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
