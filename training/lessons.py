"""What a teacher says of every row of the training text, written to disk once: its likeliest tokens.

A folder of them has `lessons.json`, which says of what they are, and shards: 00000.npy and so on, arrays [rows, T] of
records with `ids` [k], the likeliest first, and `log_p` [k + 1], float32, the last of all other tokens together. A row
has one lesson, whenever and however often it comes up: it depends on no seed, no batch and no student. A shard is
written whole or not at all, so that what is interrupted goes on with the next one.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from phyla.models.errors import UserError
from phyla.training import sharding
from phyla.training.config import Experiment
from phyla.training.data.pipeline import Batch, Packed
from phyla.training.data.tokenizers import Tokenizer
from phyla.training.distillation import IDS, LOG_P, likeliest
from phyla.training.objectives import in_chunks
from phyla.training.progress import Reporter
from phyla.training.run import write_json
from phyla.training.saved import Saved, fingerprint, load

RECORD = "lessons.json"
SHARD_BYTES = 2**26


class Lessons:
    """Of one experiment, in its `distillation.cache`."""

    def __init__(self, experiment: Experiment, teacher: Saved, tokenizer: Tokenizer, *, shard_bytes: int = SHARD_BYTES):
        """See `make_lessons`; a shard has about `shard_bytes`, one row at least."""
        config = experiment.distillation
        assert config.cache is not None
        assert config.top_k is not None
        assert experiment.model.vocab_size is not None
        self.folder = Path(config.cache)
        self.top_k, self.temperature = config.top_k, config.temperature
        self.batch, self.chunk = experiment.loop.batch_size, experiment.loop.loss_chunk
        self._teacher, self._tokenizer = teacher, tokenizer
        self._dtype = np.dtype(
            [
                ("ids", np.uint16 if experiment.model.vocab_size <= 2**16 else np.int32, (self.top_k,)),
                ("log_p", np.float32, (self.top_k + 1,)),
            ]
        )
        self._shard_bytes = shard_bytes
        self._open: dict[int, np.ndarray] = {}

    def of(self, packed: Packed) -> Callable[[np.ndarray], Batch]:
        """Says of which rows they are, and gives `rows` (see `pipeline.Beside`).

        Raises UserError if the folder has lessons of another teacher, tokenizer or text, or other ones.
        """
        self._packed = packed
        self._count, length = packed.tokens.shape
        self._length = length - 1
        record = {
            "teacher": fingerprint(self._teacher),
            "tokenizer": self._tokenizer.fingerprint(),
            "text": _digest(packed),
            "top_k": self.top_k,
            "temperature": self.temperature,
            "rows": self._count,
            "rows_in_shard": max(1, self._shard_bytes // (self._length * self._dtype.itemsize)),
        }
        path = self.folder / RECORD
        if path.exists():
            before = json.loads(path.read_text())
            for name in ("teacher", "tokenizer", "text", "top_k", "temperature"):
                if before[name] != record[name]:
                    same = record[name] if isinstance(record[name], int | float) else "this one"
                    raise UserError(
                        f"distillation.cache {self.folder} is of another {name}, not {same}; choose another folder"
                    )
            record = before
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"distillation.cache {self.folder} is not empty and has no {RECORD}; choose another folder")
        self._record, self._rows_in_shard = record, record["rows_in_shard"]
        return self.rows

    def rows(self, rows_b: np.ndarray) -> Batch:
        """The lessons of some rows, by their numbers [b]: int32 [b, T, k] and float32 [b, T, k + 1]."""
        found = [self._shard(row // self._rows_in_shard)[row % self._rows_in_shard] for row in rows_b]
        ids, log_p = (np.stack([each[name] for each in found]) for name in ("ids", "log_p"))
        return {IDS: ids.astype(np.int32), LOG_P: log_p}

    def fill(self, mesh: Mesh, reporter: Reporter | None = None) -> None:
        """Asks the teacher for what is not there yet; it is in memory for that, and only for that.

        Args:
            mesh: over which rows and teacher are divided.
            reporter: where progress goes; a new one on standard error if None.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RECORD, self._record)
        firsts = range(0, self._count, self._rows_in_shard)
        missing = [(number, first) for number, first in enumerate(firsts) if not self._path(number).exists()]
        if not missing:
            return
        model = load(self._teacher.folder).model()
        graphdef, params = nnx.split(model)
        params = jax.device_put(params, sharding.shardings(params, mesh))
        del model

        def say(params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            teacher = nnx.merge(graphdef, params)
            tokens, segment_ids = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
            hidden = teacher.forward(tokens, segment_ids=segment_ids).hidden

            def of(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
                return likeliest(teacher.logits(hidden), temperature=self.temperature, top_k=self.top_k)

            return in_chunks(of, (hidden,), chunk=self.chunk)

        with (
            contextlib.nullcontext(reporter) if reporter else Reporter() as reporter,
            reporter.task(f"{self._teacher.folder} → {self.folder}", self._count, "rows") as task,
            jax.set_mesh(mesh),
        ):
            compiled = jax.jit(say)
            for number, first in missing:
                end = min(first + self._rows_in_shard, self._count)
                shard = np.empty((end - first, self._length), self._dtype)
                for start in range(first, end, self.batch):
                    # One shape is compiled: a batch that is not full repeats the last row.
                    asked = np.minimum(np.arange(start, start + self.batch), end - 1)
                    batch = {name: value[asked] for name, value in self._packed.rows.items() if name != "weights"}
                    ids, log_p = jax.device_get(compiled(params, sharding.put_batch(batch, mesh)))
                    count = min(self.batch, end - start)
                    part = shard[start - first : start - first + count]
                    part["ids"], part["log_p"] = ids[:count], log_p[:count]
                    task.update(start + count)
                self._write(number, shard)

    def _write(self, number: int, shard: np.ndarray) -> None:
        path = self._path(number)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, shard)
        os.replace(temporary, path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    def _shard(self, number: int) -> np.ndarray:
        """Mapped, not read."""
        if number not in self._open:
            self._open[number] = np.load(self._path(number), mmap_mode="r")
        return self._open[number]


def make_lessons(experiment: Experiment, teacher: Saved, tokenizer: Tokenizer) -> Lessons | None:
    """What is kept of the teacher; None if the experiment keeps nothing.

    Raises UserError if there is nothing that could be kept.
    """
    if experiment.distillation.cache is None:
        return None
    if experiment.objective != "next-token":
        raise UserError("distillation.cache: the masked-token objective hides other tokens at every step; leave it out")
    if experiment.data.streaming:
        raise UserError("distillation.cache is of numbered rows, which data.streaming has not: one of the two must go")
    return Lessons(experiment, teacher, tokenizer)


def _digest(packed: Packed) -> str:
    """Of the rows, as they are packed."""
    digest = hashlib.sha256()
    for name, value in sorted(packed.rows.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()
