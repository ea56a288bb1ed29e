"""Every mixer and channel mixer by name: the one list to extend. A run's config.json uses these names."""

from phyla.models.config import LayerConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.models.mixers.mamba3 import Mamba3Config
from phyla.models.mixers.mlstm import MLSTMBlockConfig, MLSTMConfig
from phyla.models.mixers.rwkv4 import RWKV4ChannelConfig, RWKV4Config
from phyla.models.mixers.rwkv6 import RWKV6ChannelConfig, RWKV6Config
from phyla.models.mixers.rwkv7 import RWKV7ChannelConfig, RWKV7Config
from phyla.models.mixers.slstm import SLSTMConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig
from phyla.models.moe import MoEConfig

LAYERS: dict[str, type[LayerConfig]] = {
    "attention": AttentionConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "mamba3": Mamba3Config,
    "rwkv4": RWKV4Config,
    "rwkv4_channel": RWKV4ChannelConfig,
    "rwkv6": RWKV6Config,
    "rwkv6_channel": RWKV6ChannelConfig,
    "rwkv7": RWKV7Config,
    "rwkv7_channel": RWKV7ChannelConfig,
    "slstm": SLSTMConfig,
    "mlstm": MLSTMConfig,
    "mlstm_block": MLSTMBlockConfig,
    "mlp": MLPConfig,
    "gated_mlp": GatedMLPConfig,
    "moe": MoEConfig,
}
