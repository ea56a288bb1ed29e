"""Are exported folders what transformers takes them for?

    pip install torch transformers safetensors xlstm     # in an environment of its own
    python tests/goldens/check_transformers.py FOLDER ...

Each FOLDER holds a config.json and safetensors that `phyla export` wrote from a model of one of the fixtures. The
fixture's inputs are those of FOLDER/io.safetensors or, without one, of the fixture of FOLDER's name beside this script.
Prints how far transformers' outputs are from the fixture's; exits with 1 if that is more than 2e-4 anywhere, or if a
tensor is missing, unexpected or of another shape.
"""
# pyright: reportMissingImports=false

import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file

HERE = Path(__file__).parent
TOLERANCE = 2e-4


def difference(folder: Path) -> float:
    """The largest difference of an output. Raises SystemExit if the tensors are not the model's."""
    io = load_file(folder / "io.safetensors" if (folder / "io.safetensors").exists() else fixture(folder))
    encoder = "logits" not in io
    kind = hf.AutoModel if encoder else hf.AutoModelForCausalLM
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: {wrong}")
    inputs = {"input_ids": io["input_ids"]}
    if encoder:
        output = model.eval()(**inputs, attention_mask=io["attention_mask"]).last_hidden_state
        return (output - io["last_hidden_state"]).abs().max().item()
    return (model.eval()(**inputs, use_cache=False).logits - io["logits"]).abs().max().item()


def fixture(folder: Path) -> Path:
    """The fixture of the folder's name. Raises SystemExit if there is none."""
    path = HERE / folder.resolve().name / "io.safetensors"
    if not path.exists():
        raise SystemExit(f"{folder} has no io.safetensors, and {path} does not exist")
    return path


@torch.no_grad()
def main(folders: list[str]) -> int:
    """Checks them all and returns the exit status."""
    if not folders:
        raise SystemExit(__doc__)
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    status = 0
    for folder in folders:
        largest = difference(Path(folder))
        right = largest <= TOLERANCE  # not so for a NaN
        print(f"{folder}: max |Δ| {largest:.1e}{'' if right else ' (wrong)'}")
        status = max(status, 0 if right else 1)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
