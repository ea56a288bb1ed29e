"""llama2.c's files: one written here from a fixture, and a real one beside the repository."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from phyla.models.errors import UserError
from phyla.models.formats import open_source
from phyla.models.formats.source import load

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = SIZES = 12, 20, 2, 3, 1, 7, 5
HEAD_DIM = WIDTH // HEADS


def write(path, *, tied):
    """Random tensors; returns them by name, [layers, ...] where there is one a layer."""
    rng = np.random.default_rng(0)
    each = LAYERS, WIDTH
    order = {"embedding": (VOCAB, WIDTH), "att": each, "wq": (*each, WIDTH)}
    order |= {"wk": (LAYERS, KV_HEADS * HEAD_DIM, WIDTH), "wv": (LAYERS, KV_HEADS * HEAD_DIM, WIDTH)}
    order |= {"wo": (*each, WIDTH), "ffn": each, "w1": (LAYERS, HIDDEN, WIDTH), "w2": (*each, HIDDEN)}
    order |= {"w3": (LAYERS, HIDDEN, WIDTH), "final": (WIDTH,), "rotations": (2, LENGTH, HEAD_DIM // 2)}
    order |= {} if tied else {"wcls": (VOCAB, WIDTH)}
    arrays = {name: rng.standard_normal(shape).astype("<f4") for name, shape in order.items()}
    header = struct.pack("<7i", WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB if tied else -VOCAB, LENGTH)
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    return arrays


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_has_its_place(tied, tmp_path):
    arrays = write(tmp_path / "model.bin", tied=tied)
    source = open_source(tmp_path / "model.bin")
    assert (source.model.tie_embeddings, source.vocabulary) == (tied, None)
    found = {path.removeprefix("periods.blocks.0."): lazy.read() for path, lazy in load(source).items()}
    same = {
        "embedding.weight": "embedding",
        "norm.scale": "final",
        "mixer_norm.scale": "att",
        "channel_norm.scale": "ffn",
    }
    for ours, theirs in same.items():
        np.testing.assert_array_equal(found.pop(ours), arrays[theirs])
    matrices = {"mixer.v": "wv", "mixer.o": "wo", "channel.gate": "w1", "channel.down": "w2", "channel.up": "w3"}
    matrices |= {} if tied else {"head": "wcls"}
    for ours, theirs in matrices.items():
        np.testing.assert_array_equal(found.pop(f"{ours}.weight"), arrays[theirs].swapaxes(-1, -2))
    # Their pair (2i, 2i + 1) turns by the angle that turns our pair (i, i + H/2).
    for ours, theirs in {"mixer.q": "wq", "mixer.k": "wk"}.items():
        turned = found.pop(f"{ours}.weight").swapaxes(-1, -2).reshape(LAYERS, -1, HEAD_DIM, WIDTH)
        expected = arrays[theirs].reshape(LAYERS, -1, HEAD_DIM, WIDTH)
        for i in range(HEAD_DIM // 2):
            np.testing.assert_array_equal(turned[:, :, i], expected[:, :, 2 * i])
            np.testing.assert_array_equal(turned[:, :, i + HEAD_DIM // 2], expected[:, :, 2 * i + 1])
    assert not found


def test_what_is_no_llama2c_file_is_refused(tmp_path):
    path = tmp_path / "model.bin"

    def fails(message):
        with pytest.raises(UserError, match=message) as caught:
            open_source(path)
        assert str(path) in str(caught.value)

    write(path, tied=True)
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    fails(f"has {len(data) - 4:,} bytes; as a llama2.c file it would have {len(data):,}")
    path.write_bytes(b"24ka" + data[4:])
    fails("not a llama2.c file of the first format")
    path.write_bytes(data[:20])
    fails("too short")
    path.write_bytes(b"PK\x03\x04" + data)
    fails("is a pickle")
    path.write_bytes(pickle.dumps({"a": 1}))
    fails("is a pickle")
    write(path, tied=True)
    (tmp_path / "tokenizer.bin").write_bytes(b"\x07\0\0\0nonsense")
    with pytest.raises(UserError, match=r"tokenizer\.bin is not a llama2\.c tokenizer of 7 tokens"):
        open_source(path)


STORIES = Path(__file__).parents[4] / "shared" / "data" / "stories260K" / "stories260K.bin"


@pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}")
def test_it_tells_its_story(tmp_path, capsys):
    from phyla.cli import main

    assert main(["import", str(STORIES), str(tmp_path / "run")]) == 0
    prompt = ["--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "48"]
    assert main(["generate", str(tmp_path / "run"), *prompt]) == 0
    story = capsys.readouterr().out.split("\n", 1)[1]
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
