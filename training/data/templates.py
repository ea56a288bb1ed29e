"""A tokenizer's own chat template: a jinja program beside it, which makes one text of a conversation.

It is run as transformers runs it (its documentation, "Chat templates"), in a sandbox, for it comes with the tokenizer.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from phyla.models.errors import UserError

CONFIG_FILE = "tokenizer_config.json"
_JINJA_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """See above."""

    text: str
    """The program."""
    names: Mapping[str, str]
    """What it is told of special tokens: `bos_token` -> "<s>", …"""

    def render(self, messages: Sequence[Mapping[str, str]], *, opened: bool = False) -> str:
        """Return the text of messages; `opened`: up to where the assistant's next words begin.

        Raises:
            UserError: it is no jinja, or refuses these messages, with what it says.
        """
        import jinja2

        told = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": opened}
        try:
            return _compiled(self.text).render(**self.names, **told)
        # and what jinja lets through when the program adds a number to a text, or the like
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the tokenizer's chat template refuses a conversation: {said}") from error

    def spans(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages, and where in it what the assistant says begins and ends, its last mark included.

        A response is what is added to the text that ends where it begins (`opened`).

        Raises:
            UserError: the text of the first messages is not how that of more messages begins; or see `render`.
        """
        spans, text = [], ""
        for end, message in enumerate(messages, start=1):
            if message["role"] == "assistant":
                before = self._longer(text, self.render(messages[: end - 1], opened=True))
                text = self._longer(before, self.render(messages[:end]))
                spans.append((len(before), len(text)))
        return self._longer(text, self.render(messages)), spans

    def _longer(self, text: str, longer: str) -> str:
        if not longer.startswith(text):
            raise UserError(
                "the tokenizer's chat template writes the beginning of a conversation otherwise where it goes on, so "
                "that responses are not found in its text: name another, as in data.template chatml (nearest: plain)"
            )
        return longer

    def to_config(self) -> dict[str, Any]:
        """Return what a tokenizer_config.json says of it."""
        return {**self.names, "chat_template": self.text}


def find_template(folder: Path) -> ChatTemplate | None:
    """Return the template in chat_template.jinja or else tokenizer_config.json of a folder; None: there is none.

    Raises:
        UserError: there are several, of which none is the default.
    """
    config_path, jinja_path = folder / CONFIG_FILE, folder / _JINJA_FILE
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    text = config.get("chat_template")
    if jinja_path.is_file():
        text = jinja_path.read_text(encoding="utf-8")
    elif isinstance(text, list):
        named = {each["name"]: each["template"] for each in text}
        if "default" not in named:
            raise UserError(
                f"{config_path} has the chat templates {', '.join(named)} and none of the name 'default': write the "
                f"one that you mean to {jinja_path}"
            )
        text = named["default"]
    if text is None:
        return None
    # "<s>", or {"content": "<s>", …}; null where there is none
    values = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items()}
    names = {name: value for name, value in values.items() if name.endswith("_token") and isinstance(value, str)}
    return ChatTemplate(text, names)


@functools.cache
def _compiled(text: str) -> Any:
    """Return the program, ready to run. Raises jinja2.TemplateError."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %} around what an assistant says: what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own is for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(text)
