"""Published models under their names: their sizes, to train from nothing on your own data (`phyla train gpt2 …`).

Parameter counts are checked against the published figures in tests/configs/test_published.py. Checkpoints of these
models come in by `phyla import`, not from here.
"""

import dataclasses

from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mlstm import MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.moe import MoEConfig
from phyla.training.config import Experiment, LoopConfig, OptimizerConfig
from phyla.training.data.config import DataConfig


def _experiment(name: str, model: ModelConfig) -> Experiment:
    return Experiment(
        name=name,
        model=model,
        objective="masked-token" if model.bidirectional else "next-token",
        data=DataConfig(sequence_length=model.learned_positions or 1024),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        loop=LoopConfig(steps=10_000, batch_size=8, eval_every=1000, checkpoint_every=1000),
    )


def gpt2() -> Experiment:
    """GPT-2 small (Radford et al. 2019)."""
    mixer = AttentionConfig(heads=12, positions="none", qkv_bias=True, out_bias=True)
    model = ModelConfig(
        width=768,
        layers=12,
        vocab_size=50257,
        pattern=(BlockConfig(mixer=mixer, channel=MLPConfig(activation="gelu_tanh", bias=True)),),
        learned_positions=1024,
        norm="layernorm",
    )
    return _experiment("gpt2", model)


def _bert(name: str, **fields) -> Experiment:
    mixer = AttentionConfig(heads=12, positions="none", causal=False, qkv_bias=True, out_bias=True)
    common = {
        "width": 768,
        "vocab_size": 30522,
        "pattern": (BlockConfig(mixer=mixer, channel=MLPConfig(bias=True)),),
        "learned_positions": 512,
        "token_types": 2,
        "embedding_norm": True,
        "head_transform": "gelu",
        "head_bias": True,
        "norm": "layernorm",
        "norm_epsilon": 1e-12,
        "norm_position": "post",
        "final_norm": False,
    }
    return _experiment(name, ModelConfig(**(common | fields)))


def bert_base() -> Experiment:
    """BERT base, uncased (Devlin et al. 2019), with the masked-token head."""
    return _bert("bert-base", layers=12, pooler=True)


def distilbert() -> Experiment:
    """DistilBERT base, uncased (Sanh et al. 2019), with the masked-token head."""
    return _bert("distilbert", layers=6, token_types=0)


def albert_base() -> Experiment:
    """ALBERT base v2 (Lan et al. 2020), with the masked-token head."""
    return _bert(
        "albert-base",
        layers=12,
        groups=1,
        vocab_size=30000,
        embedding_width=128,
        pooler=True,
        head_transform="gelu_tanh",
    )


def bloom_560m() -> Experiment:
    """BLOOM 560M (BigScience 2022)."""
    mixer = AttentionConfig(heads=16, positions="alibi", qkv_bias=True, out_bias=True)
    model = ModelConfig(
        width=1024,
        layers=24,
        vocab_size=250880,
        pattern=(BlockConfig(mixer=mixer, channel=MLPConfig(activation="gelu_tanh", bias=True)),),
        embedding_norm=True,
        norm="layernorm",
    )
    return _experiment("bloom-560m", model)


def _llama(name: str, *, heads: int, kv_heads: int, hidden: int, rope_base: float, **fields) -> Experiment:
    mixer = AttentionConfig(heads=heads, kv_heads=kv_heads, rope_base=rope_base)
    block = BlockConfig(mixer=mixer, channel=GatedMLPConfig(expand=hidden / fields["width"]))
    return _experiment(name, ModelConfig(pattern=(block,), **fields))


def llama_3_8b() -> Experiment:
    """Llama 3 8B (Grattafiori et al. 2024, table 3)."""
    return _llama(
        "llama-3-8b",
        heads=32,
        kv_heads=8,
        hidden=14336,
        rope_base=500_000.0,
        width=4096,
        layers=32,
        vocab_size=128256,
        tie_embeddings=False,
    )


def smollm2_135m() -> Experiment:
    """SmolLM2 135M (Ben Allal et al. 2025)."""
    return _llama(
        "smollm2-135m", heads=9, kv_heads=3, hidden=1536, rope_base=100_000.0, width=576, layers=30, vocab_size=49152
    )


def _mamba(name: str, width: int, layers: int) -> Experiment:
    model = ModelConfig(width=width, layers=layers, vocab_size=50280, pattern=(BlockConfig(mixer=MambaConfig()),))
    return _experiment(name, model)


def mamba_130m() -> Experiment:
    """Mamba 130M (Gu and Dao 2023, table 12)."""
    return _mamba("mamba-130m", 768, 24)


def mamba_370m() -> Experiment:
    """Mamba 370M."""
    return _mamba("mamba-370m", 1024, 48)


def mamba_790m() -> Experiment:
    """Mamba 790M."""
    return _mamba("mamba-790m", 1536, 48)


def mamba_1_4b() -> Experiment:
    """Mamba 1.4B."""
    return _mamba("mamba-1.4b", 2048, 48)


def mamba_2_8b() -> Experiment:
    """Mamba 2.8B."""
    return _mamba("mamba-2.8b", 2560, 64)


def mixtral_8x7b() -> Experiment:
    """Mixtral 8x7B (Jiang et al. 2024, table 1)."""
    mixer = AttentionConfig(heads=32, kv_heads=8, rope_base=1e6)
    model = ModelConfig(
        width=4096,
        layers=32,
        vocab_size=32000,
        pattern=(BlockConfig(mixer=mixer, channel=MoEConfig(experts=8, top_k=2, expand=3.5)),),
        tie_embeddings=False,
    )
    return _experiment("mixtral-8x7b", model)


def _jamba(name: str, *, width: int, layers: int, heads: int, hidden: int) -> Experiment:
    attention = AttentionConfig(heads=heads, kv_heads=8, positions="none")
    mamba = MambaConfig(norms=True)
    dense = GatedMLPConfig(expand=hidden / width)
    experts = MoEConfig(experts=16, top_k=2, expand=hidden / width, weights="softmax_of_all", balance_loss=1e-3)
    model = ModelConfig(
        width=width,
        layers=layers,
        vocab_size=65536,
        # Attention in every eighth block, from the fifth; experts in every second, from the second.
        pattern=tuple(
            BlockConfig(mixer=attention if i == 4 else mamba, channel=experts if i % 2 else dense) for i in range(8)
        ),
        tie_embeddings=False,
        norm_epsilon=1e-6,
    )
    return _experiment(name, model)


def jamba_v0_1() -> Experiment:
    """Jamba v0.1 (Lieber et al. 2024, section 3)."""
    return _jamba("jamba-v0.1", width=4096, layers=32, heads=32, hidden=14336)


def jamba_1_5_large() -> Experiment:
    """Jamba 1.5 Large (Jamba team 2024, section 3)."""
    return _jamba("jamba-1.5-large", width=8192, layers=72, heads=64, hidden=24576)


def _rwkv7(name: str, *, width: int, layers: int, ranks: tuple[int, int, int, int]) -> Experiment:
    decay, rate, value, gate = ranks
    mixer = RWKV7Config(decay_rank=decay, rate_rank=rate, value_rank=value, gate_rank=gate)
    first = dataclasses.replace(mixer, value_residual=False)
    model = ModelConfig(
        width=width,
        layers=layers,
        vocab_size=65536,
        prefix=(BlockConfig(mixer=first, channel=RWKV7ChannelConfig()),),
        pattern=(BlockConfig(mixer=mixer, channel=RWKV7ChannelConfig()),),
        embedding_norm=True,
        tie_embeddings=False,
        embedding_init="rwkv",
        norm="layernorm",
    )
    return _experiment(name, model)


def rwkv7_0_1b() -> Experiment:
    """RWKV-7 World 0.1B (Peng et al. 2025, appendix E)."""
    return _rwkv7("rwkv7-0.1b", width=768, layers=12, ranks=(64, 64, 32, 128))


def rwkv7_0_4b() -> Experiment:
    """RWKV-7 World 0.4B."""
    return _rwkv7("rwkv7-0.4b", width=1024, layers=24, ranks=(64, 64, 32, 128))


def rwkv7_1_5b() -> Experiment:
    """RWKV-7 World 1.5B."""
    return _rwkv7("rwkv7-1.5b", width=2048, layers=24, ranks=(96, 96, 64, 256))


def rwkv7_2_9b() -> Experiment:
    """RWKV-7 World 2.9B."""
    return _rwkv7("rwkv7-2.9b", width=2560, layers=32, ranks=(96, 96, 64, 320))


def mamba2_2_7b() -> Experiment:
    """Mamba-2 2.7B (Dao and Gu 2024, table 8)."""
    model = ModelConfig(
        width=2560,
        layers=64,
        vocab_size=50288,
        pattern=(BlockConfig(mixer=Mamba2Config()),),
    )
    return _experiment("mamba2-2.7b", model)


def _rwkv4(name: str, width: int, layers: int) -> Experiment:
    model = ModelConfig(
        width=width,
        layers=layers,
        vocab_size=50277,
        pattern=(BlockConfig(mixer=RWKV4Config(), channel=RWKV4ChannelConfig()),),
        embedding_norm=True,
        tie_embeddings=False,
        embedding_init="rwkv",
        norm="layernorm",
    )
    return _experiment(name, model)


def rwkv4_169m() -> Experiment:
    """RWKV-4 Pile 169M (Peng et al. 2023, table 2)."""
    return _rwkv4("rwkv4-169m", 768, 12)


def rwkv4_430m() -> Experiment:
    """RWKV-4 Pile 430M."""
    return _rwkv4("rwkv4-430m", 1024, 24)


def rwkv4_1_5b() -> Experiment:
    """RWKV-4 Pile 1.5B."""
    return _rwkv4("rwkv4-1.5b", 2048, 24)


def rwkv4_3b() -> Experiment:
    """RWKV-4 Pile 3B."""
    return _rwkv4("rwkv4-3b", 2560, 32)


def rwkv4_7b() -> Experiment:
    """RWKV-4 Pile 7B."""
    return _rwkv4("rwkv4-7b", 4096, 32)


def rwkv4_14b() -> Experiment:
    """RWKV-4 Pile 14B."""
    return _rwkv4("rwkv4-14b", 5120, 40)


def xlstm_7b() -> Experiment:
    """xLSTM-7B (Beck et al. 2025)."""
    # The package rounds the hidden width 4096 · 2.667 up to a multiple of 64.
    block = BlockConfig(mixer=MLSTMConfig(heads=8), channel=GatedMLPConfig(expand=10944 / 4096))
    model = ModelConfig(
        width=4096,
        layers=32,
        vocab_size=50304,
        pattern=(block,),
        tie_embeddings=False,
        norm_epsilon=1e-6,
        logit_cap=30.0,
    )
    return _experiment("xlstm-7b", model)
