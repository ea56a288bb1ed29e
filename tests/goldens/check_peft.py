"""Are exported adapters what Hugging Face's PEFT takes them for?

    pip install torch transformers peft safetensors     # in an environment of its own
    python tests/goldens/check_peft.py BASE ADAPTER ...

BASE is a folder that `phyla export RUN BASE` wrote; each ADAPTER is one of `phyla export RUN ADAPTER --format peft`,
with an io.safetensors in it: input_ids, and the logits that `phyla logits RUN` gives.

Prints how far the logits of PEFT's model are from those; exits with 1 if that is more than 2e-4 anywhere, if an adapter
does nothing, or if one of its tensors is missing or unexpected.
"""
# pyright: reportMissingImports=false

import sys
import warnings
from pathlib import Path

import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

TOLERANCE = 2e-4


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Checks them all and returns the exit status."""
    if len(arguments) < 2:
        raise SystemExit(__doc__)
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    warnings.filterwarnings("error", message=".*unexpected keys.*")
    status = 0
    for folder in map(Path, arguments[1:]):
        io = load_file(folder / "io.safetensors")
        plain = hf.AutoModelForCausalLM.from_pretrained(arguments[0], dtype=torch.float32).eval()
        inputs = {"input_ids": io["input_ids"].long(), "use_cache": False}
        without = plain(**inputs).logits
        found = PeftModel.from_pretrained(plain, folder).eval()(**inputs).logits
        difference = (found - io["logits"]).abs().max().item()
        moved = (found - without).abs().max().item()
        right = difference <= TOLERANCE < moved  # not so for a NaN
        print(
            f"{folder}: max |Δ| {difference:.1e} (the adapter moves logits by {moved:.2g}){'' if right else ' wrong'}"
        )
        status = max(status, 0 if right else 1)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
