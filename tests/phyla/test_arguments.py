"""Every way to be wrong on a command line is one line; what tyro must keep doing for that."""

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tyro.conf import Positional, UseAppendAction

from phyla import configs
from phyla.arguments import option_names, parse
from phyla.experiments import train_arguments
from phyla.models.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several."""

    heads: int = 4
    causal: bool = True


@dataclass(frozen=True, kw_only=True)
class Other(Part):
    """A subclass, which a field of type Part may hold."""

    width_2: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Section:
    """A nested section."""

    layers: int = 4
    vocab_size: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    parts: tuple[Part, ...] = (Part(), Other(heads=2))
    absent: Part | None = None

    def __post_init__(self):
        if self.layers < 1:
            raise UserError(f"model.layers must be at least 1, not {self.layers}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What it does.

    examples:
      prog RUN --rate 1
    """

    run: Annotated[Path, Positional]
    """Where."""
    model: Section = field(default=Section())
    rate: float = 1.0
    """How fast."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    texts: tuple[str, ...] = ()


def of(*arguments: str) -> Options:
    return parse(Options, arguments, prog="prog")


def test_values_reach_nested_fields():
    options = of(
        *("here", "--model.layers", "6", "--model.vocab_size=300", "--model.parts.1.width-2", "0.5"),
        *("--model.parts.0.no-causal", "--prompt", "a b", "--prompt=--c", "--texts", "x", "y", "--rate", "3e-4"),
    )
    assert options == Options(
        run=Path("here"),
        model=Section(layers=6, vocab_size=300, parts=(Part(causal=False), Other(heads=2, width_2=0.5))),
        prompt=("a b", "--c"),
        texts=("x", "y"),
        rate=3e-4,
    )
    assert of("here", "--model.vocab-size", "None") == Options(run=Path("here"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("x --model.layer 3", "no option --model.layer; nearest: --model.layers"),
        ("x --model.layer=3", "no option --model.layer; nearest: --model.layers"),
        ("x --width_2 3", "no option --width_2; nearest: --model.parts.1.width-2"),
        ("x --model.parts.2.heads 3", "no option --model.parts.2.heads; nearest: --model.parts.0.heads"),
        ("x --model.layers abc", "--model.layers must be an integer, not 'abc'"),
        ("x --model.layers=1e3", "--model.layers must be an integer, not '1e3'"),
        ("x --model.vocab_size 2.5", "--model.vocab-size must be None or an integer, not '2.5'"),
        ("x --rate fast", "--rate must be a number, not 'fast'"),
        ("x --rate 1 --rate fast", "--rate must be a number, not 'fast'"),
        ("x --rate", "--rate needs a value (one that starts with a dash is given as --rate=VALUE)"),
        ("x --prompt --model.layers 3", "--prompt needs a value"),
        ("x --model.norm layer", "no --model.norm 'layer'; nearest: layernorm"),
        ("x --model.layers 0", "model.layers must be at least 1, not 0"),
        ("x --model.parts.0.causal True", "unexpected 'True' after --model.parts.0.causal"),
        ("x y", "unexpected 'y'"),
        ("", "PATH must be given"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, line, capsys):
    with pytest.raises(UserError, match=re.escape(line)):
        of(*arguments.split())
    assert capsys.readouterr() == ("", "")  # tyro printed nothing of its own


def test_help_shows_the_docstring_and_every_field(capsys):
    with pytest.raises(SystemExit) as exit:
        of("--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does.\n\nexamples:\n  prog RUN --rate 1\n" in shown
    for text in ("Where. (required)", "--rate FLOAT", "How fast. (default: 1.0)", "--model.norm {rmsnorm,layernorm}"):
        assert text in shown


def shown_options(capsys) -> set[str]:
    return set(
        re.findall(r"--[a-z][\w.-]*", " ".join(re.findall(r"^\W ?(-.*)", capsys.readouterr().out, re.MULTILINE)))
    )


def test_option_names_are_those_of_tyro(capsys):
    with pytest.raises(SystemExit):
        of("--help")
    assert {*option_names(Options), "--help"} == shown_options(capsys)
    for name in configs.SMALL:
        with pytest.raises(SystemExit):
            train_arguments([name, "--help"])
        ours = {*option_names(configs.experiment(name)), "--help", "--max-steps", "--out"}
        of_others = {"--name", "--base", "--teacher"}  # those of `finetune` and `distill`
        assert {each for each in ours - of_others if "distillation." not in each} == shown_options(capsys)


tokens = st.one_of(
    st.sampled_from([*option_names(Options), "--model.layer", "--nope", "-x", "--", "-", "", "a=b", "1", "-1", "x y"]),
    st.text(max_size=5),
    st.builds("{}={}".format, st.sampled_from([*option_names(Options)]), st.text(max_size=5)),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(tokens.filter(lambda token: token not in ("-h", "--help")), max_size=6))
def test_any_line_parses_or_is_refused(arguments):
    with contextlib.suppress(UserError):
        assert isinstance(of(*arguments), Options)
