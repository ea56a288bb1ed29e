"""Writes into chat.json what transformers makes of its conversation by each of its templates.

    pip install transformers jinja2     # in an environment of its own
    python tests/goldens/make_chat.py

`written` is the whole conversation, `opened` all but its last message, up to where the assistant's words would begin.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

path = Path(__file__).with_name("chat.json")
chat = json.loads(path.read_text(encoding="utf-8"))
core = tokenizers.Tokenizer(tokenizers.models.BPE())
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
for each in chat["templates"].values():
    tokenizer.chat_template = each["template"]
    each["written"] = tokenizer.apply_chat_template(chat["said"], tokenize=False)
    each["opened"] = tokenizer.apply_chat_template(chat["said"][:-1], tokenize=False, add_generation_prompt=True)
path.write_text(json.dumps(chat, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
