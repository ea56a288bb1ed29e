"""Published models, built from shapes alone, have the published number of parameters."""

import pytest

from phyla import configs
from phyla.models import sizes

HUB = "safetensors metadata of {} on the Hugging Face hub"
MAMBA = "Gu and Dao 2023, table 12; " + HUB.format("state-spaces/mamba-*-hf")
RWKV4 = "Peng et al. 2023, table 2 and equation 2VD + 13D²L + D(11L + 4)"
RWKV7 = "Peng et al. 2025, table of the World models"

# Name: (parameters, those of heads that this project does not have, source).
PUBLISHED = {
    "gpt2": (124_439_808, 0, HUB.format("openai-community/gpt2")),
    "bert-base": (110_106_428, 1_538, HUB.format("google-bert/bert-base-uncased") + ", next-sentence head included"),
    "distilbert": (66_985_530, 0, HUB.format("distilbert/distilbert-base-uncased")),
    "albert-base": (11_221_680 + 768 * 768 + 768, 0, "AlbertForMaskedLM of albert/albert-base-v2, and its pooler"),
    "bloom-560m": (559_214_592, 0, HUB.format("bigscience/bloom-560m")),
    "llama-3-8b": (8_030_261_248, 0, HUB.format("meta-llama/Meta-Llama-3-8B")),
    "smollm2-135m": (134_515_008, 0, HUB.format("HuggingFaceTB/SmolLM2-135M")),
    "mixtral-8x7b": (46_702_792_704, 0, HUB.format("mistralai/Mixtral-8x7B-v0.1")),
    "mamba-130m": (129_135_360, 0, MAMBA),
    "mamba-370m": (371_516_416, 0, MAMBA),
    "mamba-790m": (793_204_224, 0, MAMBA),
    "mamba-1.4b": (1_372_178_432, 0, MAMBA),
    "mamba-2.8b": (2_768_345_600, 0, MAMBA),
    "mamba2-2.7b": (2_702_599_680, 0, HUB.format("state-spaces/mamba2-2.7b")),
    "jamba-v0.1": (51_570_323_328, 0, HUB.format("ai21labs/Jamba-v0.1")),
    "jamba-1.5-large": (398_555_145_696, 0, "398B: Jamba team 2024, section 3"),
    "rwkv4-169m": (169_342_464, 0, RWKV4),
    "rwkv4-430m": (430_397_440, 0, RWKV4),
    "rwkv4-1.5b": (1_515_106_304, 0, RWKV4),
    "rwkv4-3b": (2_984_627_200, 0, RWKV4),
    "rwkv4-7b": (7_392_649_216, 0, RWKV4),
    "rwkv4-14b": (14_148_597_760, 0, RWKV4),
    "rwkv7-0.1b": (191_034_624, 0, RWKV7),
    "rwkv7-0.4b": (450_767_872, 0, RWKV7),
    "rwkv7-1.5b": (1_527_404_544, 0, RWKV7),
    "rwkv7-2.9b": (2_947_735_040, 0, RWKV7),
    "xlstm-7b": (6_865_424_896, 0, HUB.format("NX-AI/xLSTM-7b")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    parameters, missing_heads, _ = PUBLISHED[name]
    assert sizes.count(configs.experiment(name).model) == parameters - missing_heads


def test_every_published_model_is_checked():
    published = {name for name, module in configs.EXPERIMENTS.items() if module == "phyla.configs.published"}
    assert published == PUBLISHED.keys()
