"""Makes the adapters beside it: of the fixture llama, trained by Hugging Face's PEFT for a few steps.

    pip install torch transformers peft safetensors     # in an environment of its own
    python tests/goldens/make_peft.py

Each folder llama-NAME holds what PEFT's `save_pretrained` writes, and io.safetensors with the logits of the model with
the adapter, as it is read from the folder again.
"""
# pyright: reportMissingImports=false

import json
import shutil
from pathlib import Path

import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BASE = HERE / "llama"
STEPS = 20

ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    "rslora": LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["k_proj", "gate_proj"]),
    "dora": LoraConfig(r=2, lora_alpha=8, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def base() -> hf.PreTrainedModel:
    """Of the fixture."""
    return hf.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def make(name: str) -> None:
    """One adapter, trained to repeat the fixture's tokens backwards; every number of it has moved."""
    torch.manual_seed(0)
    config = ADAPTERS[name]
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base(), config)
    io = load_file(BASE / "io.safetensors")
    ids = io["input_ids"].flip(1)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=3e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    folder = HERE / f"llama-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text())
    said |= {"base_model_name_or_path": "llama", "target_modules": sorted(said["target_modules"])}
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    again = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        logits = again(input_ids=io["input_ids"], use_cache=False).logits
    save_file({"input_ids": io["input_ids"], "logits": logits.contiguous()}, folder / "io.safetensors")
    for each in folder.iterdir():
        each.chmod(0o644)
    moved = (logits - io["logits"]).abs().max().item()
    size = sum(each.stat().st_size for each in folder.iterdir())
    print(f"{folder.name:<12} {size / 1000:6.1f} kB, the adapter moves logits by up to {moved:.2f}")


if __name__ == "__main__":
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    for each in ADAPTERS:
        make(each)
