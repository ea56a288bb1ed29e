"""The commands that speak with other libraries: models in and out, and what they say of given tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from phyla.arguments import parse


@dataclass(frozen=True, kw_only=True)
class Import:
    """Makes a run of a model that another library wrote.

    Safetensors with a config.json of transformers, GGUF (Llama), or llama2.c's .bin; never a pickle.

    examples:
      phyla import models/Llama-3.2-1B runs/llama
      phyla import models/adapter runs/adapted --base runs/llama
      phyla import SmolLM2-135M.gguf runs/smollm && phyla generate runs/smollm --prompt "The capital of France is"
    """

    source: Annotated[Path, Positional, arg(metavar="SOURCE")]
    """A folder, or a .gguf or llama2.c .bin file."""
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    """The run's folder: new or empty."""
    base: Path | None = None
    """The run whose model SOURCE adapts, if that is a LoRA or IA3 of Hugging Face's PEFT (adapter_config.json)."""


def import_(arguments: Sequence[str]) -> None:
    """`phyla import SOURCE OUT`."""
    options = parse(Import, arguments, prog="phyla import")
    if options.base is not None:
        from phyla.training.peft import import_peft

        import_peft(options.source, options.base, options.out)
        return
    from phyla.training.convert import import_model

    import_model(options.source, options.out)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a run's model as safetensors with a config.json that transformers loads.

    examples:
      phyla export runs/RUN models/mine
      phyla export runs/RUN models/mine --format mistral
      phyla export runs/RUN-lora models/adapter --format peft
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run's folder."""
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    """The model's folder: new or empty."""
    format: str | None = None
    """llama, mistral, gpt2, bloom, mamba, …; None: the first that can say what the model is. peft: a LoRA or IA3 run's
    adapter alone, as Hugging Face's PEFT loads it onto the base."""


def export(arguments: Sequence[str]) -> None:
    """`phyla export RUN OUT`."""
    options = parse(Export, arguments, prog="phyla export")
    if options.format == "peft":
        from phyla.training.peft import export_peft

        export_peft(options.run, options.out)
        return
    from phyla.training.convert import export_model

    export_model(options.run, options.out, format=options.format)


@dataclass(frozen=True, kw_only=True)
class Logits:
    """What a model says of given tokens, to compare with other implementations.

    Reads `input_ids` and, if there is one, `attention_mask`; writes `logits` (encoders: `last_hidden_state`), float32.

    examples:
      phyla logits runs/RUN --input io.safetensors --output out.safetensors
      phyla logits models/Llama-3.2-1B --input io.safetensors --output out.safetensors --generate 16
    """

    model: Annotated[Path, Positional, arg(metavar="MODEL")]
    """A run, or what `phyla import` reads."""
    input: Path
    """Safetensors."""
    output: Path
    """Safetensors."""
    generate: int = 0
    """Tokens to continue the first 9 of the first row with, greedily, as `generated`."""


def logits(arguments: Sequence[str]) -> None:
    """`phyla logits MODEL --input FILE --output FILE`."""
    options = parse(Logits, arguments, prog="phyla logits")
    from phyla.training.logits import write_logits

    write_logits(options.model, options.input, options.output, generate_tokens=options.generate)
