"""Every mixer and channel mixer by name: the one list to extend. A run's config.json uses these names."""

from phyla.models.config import LayerConfig
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba import MambaConfig
from phyla.models.mlp import GatedMLPConfig, MLPConfig

LAYERS: dict[str, type[LayerConfig]] = {
    "attention": AttentionConfig,
    "mamba": MambaConfig,
    "mlp": MLPConfig,
    "gated_mlp": GatedMLPConfig,
}
