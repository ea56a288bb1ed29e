"""The other side of `phyla bench models --peers PYTHON`: transformers' models, timed when asked to.

Runs under another interpreter, one that has torch and transformers (and mambapy, without which they scan Mamba's state
one token at a time), and imports nothing else. A request is a line of JSON on standard input, its answer a line on
standard output:

    {"do": "build", "config": {…}, "batch": 4, "length": 512}      -> {"parameters": …}
    {"do": "train"} | {"do": "prefill"}                            -> {"seconds": …}
    {"do": "decode", "prompt": 32, "tokens": 64}                   -> {"seconds": …}
    {"do": "memory"}                                               -> {"peak": …} or null
"""
# pyright: reportMissingImports=false

import ctypes
import gc
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from typing import Any

import torch
import transformers


class Peer:
    """One model at a time, in float32 on the CPU."""

    model: Any = None
    optimizer: Any = None

    def build(self, config: dict, batch: int, length: int) -> dict:
        """Makes the model of a config.json, with AdamW; forgets the one before."""
        self.model = self.optimizer = None
        gc.collect()
        self.before = resident("VmRSS", trim=True)
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w") as file:
                json.dump(config, file)
            settings = transformers.AutoConfig.from_pretrained(folder)
        for name, value in fastest(settings).items():
            setattr(settings, name, value)
        torch.manual_seed(0)
        self.model = getattr(transformers, config["architectures"][0])(settings).float()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        self.ids = torch.randint(0, settings.vocab_size, (batch, length))
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def train(self) -> dict:
        """One step: loss, gradient, clipping, update."""
        self.mode("train")
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"seconds": time.perf_counter() - begin}

    @torch.no_grad()
    def prefill(self) -> dict:
        """The likeliest next tokens after the whole batch, and the cache; an encoder's hidden vectors."""
        self.mode("inference")
        encoder = not self.model.can_generate()
        begin = time.perf_counter()
        hidden = self.model.base_model(input_ids=self.ids, use_cache=not encoder)[0]
        if not encoder:
            self.model.get_output_embeddings()(hidden[:, -1]).argmax(-1)
        return {"seconds": time.perf_counter() - begin}

    @torch.no_grad()
    def decode(self, prompt: int, tokens: int) -> dict:
        """Seconds of the tokens after the first one."""
        self.mode("inference")
        output = self.model(input_ids=self.ids[:1, :prompt], use_cache=True)
        begin = time.perf_counter()
        for _ in range(tokens):
            name = next(name for name in ("past_key_values", "cache_params", "state") if output.get(name) is not None)
            token = output.logits[:, -1:].argmax(-1)
            output = self.model(input_ids=token, use_cache=True, **{name: output[name]})
        return {"seconds": time.perf_counter() - begin}

    def memory(self) -> dict:
        """Bytes by which this process has grown, at most, since before the model."""
        peak = resident("VmHWM")
        return {"peak": None if peak is None or self.before is None else peak - self.before}

    def mode(self, mode: str) -> None:
        """For training or inference; xLSTM has a switch of its own in the configuration of each layer."""
        self.model.train(mode == "train")
        for module in self.model.modules():
            if hasattr(getattr(module, "config", None), "chunkwise_kernel"):
                module.config.mode = mode


def fastest(settings: transformers.PreTrainedConfig) -> dict:
    """Flags that make the same model comparable and as fast as it can be: float32 kernels, no dropout, a scan."""
    flags: dict[str, object] = {name: 0.0 for name in vars(settings) if re.search("drop", name)}
    if hasattr(settings, "use_mambapy"):
        if importlib.util.find_spec("mambapy") is None:
            raise ModuleNotFoundError("No module named 'mambapy'")
        flags["use_mambapy"] = True
    if hasattr(settings, "autocast_kernel_dtype"):
        flags["autocast_kernel_dtype"] = "float32"
    return flags


def resident(field: str, *, trim: bool = False) -> int | None:
    """Bytes of /proc/self/status; None where there is none. `trim` gives back what is free and forgets the peak."""
    try:
        if trim:
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            found = re.search(rf"{field}:\s+(\d+)", file.read())
    except (OSError, AttributeError):
        return None
    return 1024 * int(found[1]) if found else None


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    transformers.utils.logging.set_verbosity_error()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), file=answers)
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(peer, request.pop("do"))(**request)), file=answers)


if __name__ == "__main__":
    main()
