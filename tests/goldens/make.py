"""Makes the fixtures beside it: tiny models of other implementations, and what those compute.

    pip install torch transformers safetensors xlstm rwkv     # in an environment of its own
    python tests/goldens/make.py [NAME ...]                   # all of them if none is named

The same versions give the same files. README.md says what is in a folder.
"""
# pyright: reportMissingImports=false

import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

HERE = Path(__file__).parent
VOCABULARY, LENGTH, PROMPT, CONTINUATION = 64, 33, 9, 16
MARGIN = 0.005  # logits between the likeliest token and the next one: rounding cannot swap them
DISTINCT = 5  # tokens in a continuation; the others would hide a state that does not move
ATTEMPTS = 100
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2}

CAUSAL: dict[str, Callable[[], hf.PreTrainedModel]] = {
    # Heads that do not fill the width, three query heads for each key, another activation and wavelength.
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **COMMON,
            hidden_size=24,
            num_hidden_layers=3,
            intermediate_size=40,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=6,
            hidden_act="gelu_pytorch_tanh",
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        )
    ),
    "llama-tied": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **COMMON,
            **SIZE,
            intermediate_size=56,
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(
            **COMMON,
            **SIZE,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=10,
            hidden_act="gelu",
            sliding_window=5,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **COMMON,
            n_embd=32,
            n_layer=2,
            n_head=8,
            n_inner=48,
            n_positions=40,
            activation_function="relu",
            layer_norm_epsilon=1e-3,
            tie_word_embeddings=False,
        )
    ),
    # ALiBi's slopes for a number of heads that is not a power of two.
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(**COMMON, hidden_size=30, n_layer=2, n_head=6, layer_norm_epsilon=1e-4)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **COMMON,
            hidden_size=24,
            num_hidden_layers=2,
            intermediate_size=20,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=6,
            num_local_experts=5,
            num_experts_per_tok=3,
            sliding_window=7,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(
            **COMMON,
            hidden_size=24,
            num_hidden_layers=3,
            state_size=5,
            expand=2,
            conv_kernel=3,
            time_step_rank=3,
            use_bias=True,
            use_conv_bias=False,
            tie_word_embeddings=False,
        )
    ),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            **COMMON,
            hidden_size=24,
            num_hidden_layers=3,
            state_size=7,
            expand=2,
            num_heads=6,
            head_dim=8,
            n_groups=3,
            conv_kernel=3,
            chunk_size=8,
            use_bias=True,
            use_conv_bias=False,
            tie_word_embeddings=True,
        )
    ),
    # Attention in blocks 2 and 5, experts in blocks 1, 3 and 5.
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **COMMON,
            hidden_size=16,
            num_hidden_layers=6,
            intermediate_size=12,
            num_attention_heads=4,
            num_key_value_heads=1,
            attn_layer_period=3,
            attn_layer_offset=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=3,
            mamba_d_state=6,
            mamba_d_conv=3,
            mamba_expand=3,
            mamba_dt_rank=2,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            tie_word_embeddings=True,
        )
    ),
    # At inference the residual stream is halved after every second block: no other logits may come of it.
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(
            **COMMON,
            hidden_size=24,
            intermediate_size=56,
            num_hidden_layers=3,
            rescale_every=2,
            context_length=64,
        )
    ),
    "xlstm-7b": lambda: hf.xLSTMForCausalLM(
        hf.xLSTMConfig(
            **COMMON,
            **SIZE,
            num_heads=2,
            qk_dim_factor=0.75,
            ffn_proj_factor=1.3,
            ffn_round_up_to_multiple_of=24,
            gate_soft_cap=4.0,
            output_logit_soft_cap=5.0,
            norm_eps=1e-5,
            chunk_size=16,
            autocast_kernel_dtype="float32",
        )
    ),
}

ENCODERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertModel(
        hf.BertConfig(
            vocab_size=VOCABULARY,
            **SIZE,
            num_attention_heads=8,
            intermediate_size=48,
            hidden_act="relu",
            max_position_embeddings=40,
            type_vocab_size=3,
            layer_norm_eps=1e-5,
        )
    ),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=3,
            n_heads=2,
            hidden_dim=40,
            activation="relu",
            max_position_embeddings=40,
            sinusoidal_pos_embds=True,
        )
    ),
    # Six blocks with three sets of parameters.
    "albert": lambda: hf.AlbertModel(
        hf.AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=20,
            hidden_size=24,
            num_hidden_layers=6,
            num_hidden_groups=3,
            num_attention_heads=3,
            intermediate_size=40,
            hidden_act="gelu",
            max_position_embeddings=40,
            type_vocab_size=1,
            layer_norm_eps=1e-6,
        )
    ),
}

XLSTM = {
    "model_type": "xlstm-original",
    "vocab_size": VOCABULARY,
    "embedding_dim": 24,
    "num_blocks": 3,
    "slstm_at": [0, 2],
    "num_heads": 2,
    "context_length": 40,
    "conv1d_kernel_size": 3,
    "qkv_proj_blocksize": 8,
    "mlstm_proj_factor": 1.5,
    "slstm_ffn_proj_factor": 1.1,
    "slstm_ffn_act": "relu",
    "norm": "LayerNorm",
}

RWKV7 = {
    "model_type": "rwkv7-reference",
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_layer": 3,
    "head_size": 8,
    "dim_ffn": 80,
}
RANKS = {"w": 4, "a": 6, "v": 5, "g": 9}


def perturb(model: torch.nn.Module, random: torch.Generator) -> None:
    """Makes every parameter one of its own: matrices drawn anew, the others moved from where they began."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim < 2 or "time_mix" in name or "A_log" in name:
                parameter.add_(0.2 * noise)
            else:
                # Blocks that are louder than the embedding: a tied head would else repeat the last token.
                parameter.copy_(
                    noise * ((1.0 if re.search("emb|wte|wpe|head", name) else 2.5) * parameter.shape[-1] ** -0.5)
                )


def xlstm_model() -> torch.nn.Module:
    """The package's language model; its kernels are plain PyTorch."""
    xlstm: Any = importlib.import_module("xlstm")  # not the folder of that name beside this file

    heads, conv = XLSTM["num_heads"], XLSTM["conv1d_kernel_size"]
    mlstm = xlstm.mLSTMLayerConfig(
        conv1d_kernel_size=conv,
        qkv_proj_blocksize=XLSTM["qkv_proj_blocksize"],
        num_heads=heads,
        proj_factor=XLSTM["mlstm_proj_factor"],
    )
    slstm = xlstm.sLSTMLayerConfig(
        conv1d_kernel_size=conv,
        num_heads=heads,
        backend="vanilla",
        dtype="float32",
        enable_automatic_mixed_precision=False,
    )
    feedforward = xlstm.FeedForwardConfig(proj_factor=XLSTM["slstm_ffn_proj_factor"], act_fn=XLSTM["slstm_ffn_act"])
    return xlstm.xLSTMLMModel(
        xlstm.xLSTMLMModelConfig(
            mlstm_block=xlstm.mLSTMBlockConfig(mlstm=mlstm),
            slstm_block=xlstm.sLSTMBlockConfig(slstm=slstm, feedforward=feedforward),
            context_length=XLSTM["context_length"],
            num_blocks=XLSTM["num_blocks"],
            embedding_dim=XLSTM["embedding_dim"],
            slstm_at=XLSTM["slstm_at"],
            vocab_size=VOCABULARY,
        )
    )


def rwkv7_tensors(random: torch.Generator) -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the shapes of BlinkDL's files."""
    d, ffn = RWKV7["n_embd"], RWKV7["dim_ffn"]

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * shape[-1] ** -0.5

    def vector(center: float, *shape: int) -> torch.Tensor:
        return center + 0.2 * torch.randn(shape, generator=random)

    tensors = {"emb.weight": matrix(VOCABULARY, d), "head.weight": matrix(VOCABULARY, d)}
    norms = ["ln_out", "blocks.0.ln0"]
    for i in range(RWKV7["n_layer"]):
        block, att, channel = f"blocks.{i}", f"blocks.{i}.att", f"blocks.{i}.ffn"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{att}.ln_x"]
        for name, center in {"w0": -1.0, "a0": 0.3, "v0": 0.5, "k_k": 0.8, "k_a": 0.9}.items():
            tensors[f"{att}.{name}"] = vector(center, 1, 1, d)
        for name, rank in RANKS.items():
            tensors[f"{att}.{name}1"], tensors[f"{att}.{name}2"] = matrix(d, rank), matrix(rank, d)
        for name in "rwkvag":
            tensors[f"{att}.x_{name}"] = vector(0.5, 1, 1, d)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{name}.weight"] = matrix(d, d)
        tensors[f"{att}.r_k"] = vector(0.1, d // RWKV7["head_size"], RWKV7["head_size"])
        tensors[f"{channel}.x_k"] = vector(0.5, 1, 1, d)
        tensors[f"{channel}.key.weight"], tensors[f"{channel}.value.weight"] = matrix(ffn, d), matrix(d, ffn)
    for norm in norms:
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = vector(1.0, d), vector(0.0, d)
    return tensors


def rwkv7_logits(tensors: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The package's model of these tensors, on sequences given whole."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0"}
    rwkv: Any = importlib.import_module("rwkv.model")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(tensors), f"{folder}/model.pth")
        model = rwkv.RWKV_x070(f"{folder}/model", "cpu fp32")
    return lambda ids: torch.stack([model.forward(row.tolist(), None, full_output=True)[0] for row in ids])


def drawn(random: torch.Generator) -> torch.Tensor:
    """Two sequences."""
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=random)


def continued(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor | None:
    """The prompt and its greedy continuation; None if a token hangs by a thread, or the tokens hardly change."""
    ids = ids[:1, :PROMPT]
    for _ in range(CONTINUATION):
        best = logits(ids)[0, -1].topk(2)
        if best.values[0] - best.values[1] < MARGIN:
            return None
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return ids if len(set(ids[0, PROMPT:].tolist())) >= DISTINCT else None


def write(name: str, io: dict[str, torch.Tensor]) -> None:
    """The outputs, and a line about them."""
    folder = HERE / name
    save_file({key: value.contiguous() for key, value in io.items()}, folder / "io.safetensors")
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name:<12} {size / 1000:6.1f} kB", flush=True)


def save(name: str, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """A model that is not transformers'."""
    (HERE / name).mkdir()
    (HERE / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / name / "model.safetensors")


def save_transformers(name: str, model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Writes a transformers model and reads it again, so that its outputs are those of the files."""
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    again, found = type(model).from_pretrained(HERE / name, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return again.eval()


def make_causal(name: str, random: torch.Generator) -> bool:
    """One language model of transformers."""
    model = CAUSAL[name]()
    perturb(model, random)
    model = save_transformers(name, model)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    ids = drawn(random)
    generated = continued(logits, ids)
    if generated is None:
        return False
    if name != "xlstm-7b":  # transformers gives its cache other shapes where a factor is no multiple of 64
        model.generation_config.eos_token_id = None
        mask = torch.ones_like(ids[:1, :PROMPT])
        cached = model.generate(ids[:1, :PROMPT], attention_mask=mask, do_sample=False, max_new_tokens=CONTINUATION)
        assert torch.equal(cached, generated), (cached, generated)
    write(name, {"input_ids": ids, "logits": logits(ids), "generated": generated})
    return True


def make_encoder(name: str, random: torch.Generator) -> bool:
    """One encoder of transformers; the second sequence ends early."""
    model = ENCODERS[name]()
    perturb(model, random)
    model = save_transformers(name, model)
    ids, mask = drawn(random), torch.ones(2, LENGTH, dtype=torch.int64)
    ids[1, 20:], mask[1, 20:] = 0, 0
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    write(name, {"input_ids": ids, "attention_mask": mask, "last_hidden_state": hidden})
    return True


def make_xlstm(name: str, random: torch.Generator) -> bool:
    """The xLSTM of the package xlstm."""
    model = xlstm_model().eval()
    perturb(model, random)
    save(name, XLSTM, model.state_dict())
    ids = drawn(random)
    generated = continued(model, ids)
    if generated is None:
        return False
    state, stepped = None, []
    for i in range(LENGTH):
        one, state = model.step(ids[:, i : i + 1], state)
        stepped.append(one)
    logits = model(ids)
    assert (torch.cat(stepped, dim=1) - logits).abs().max() < 1e-4
    write(name, {"input_ids": ids, "logits": logits, "generated": generated})
    return True


def make_rwkv7(name: str, random: torch.Generator) -> bool:
    """The RWKV-7 of the package rwkv."""
    tensors = rwkv7_tensors(random)
    save(name, RWKV7, tensors)
    logits, ids = rwkv7_logits(tensors), drawn(random)
    generated = continued(logits, ids)
    if generated is None:
        return False
    write(name, {"input_ids": ids, "logits": logits(ids), "generated": generated})
    return True


MAKE = dict.fromkeys(CAUSAL, make_causal) | dict.fromkeys(ENCODERS, make_encoder)
MAKE |= {"xlstm": make_xlstm, "rwkv7": make_rwkv7}


@torch.no_grad()
def main(names: list[str]) -> None:
    """Makes the named models with the first seed whose continuation is a good test."""
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    for name in names or MAKE:
        for attempt in range(ATTEMPTS):
            shutil.rmtree(HERE / name, ignore_errors=True)
            seed = zlib.crc32(f"{name} {attempt}".encode())
            torch.manual_seed(seed)
            if MAKE[name](name, torch.Generator().manual_seed(seed)):
                break
        else:
            raise SystemExit(f"{name}: no seed of {ATTEMPTS} gives a continuation that is a good test")


if __name__ == "__main__":
    main(sys.argv[1:])
