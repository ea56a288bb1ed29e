"""Checkpoints by Orbax: asynchronous, atomic, the latest and the best kept, restored onto any mesh."""

import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from phyla.compression import entropy, huffman
from phyla.models.errors import UserError
from phyla.models.formats.source import Lazy
from phyla.training.step import NOTHING, TrainState

METRIC = "bits_per_byte"
CODED = "weights.huffman"
"""In the run's folder: arrays of its checkpoint that this does not hold."""
LARGE = 2**20
"""Bytes of an array from which each layer of its stack is a chunk by itself: reading holds few chunks besides."""


class Checkpoints:
    """The checkpoints of a run. A context: leaving it waits for the last one to be written.

    Each holds `params`, what was trained (the averaged ones under `ema` if the run keeps an average), `frozen`, what of
    the model was not (unless another run has it), `rest` of the training state, `data` (the iterator's position) and
    `progress` (seconds trained and the like).
    """

    def __init__(self, folder: Path, keep: int = 1, *, frozen: bool = True):
        """Of a folder.

        Args:
            folder: the run's.
            keep: how many of the latest stay.
            frozen: whether what of the model is frozen, if anything, is saved.
        """
        self._frozen = frozen
        self._folder = (folder / "checkpoints").absolute()
        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics[METRIC], reverse=True, n=1),
            ]
        )
        self._coded = folder / CODED
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies,
                best_fn=lambda metrics: metrics[METRIC],
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The last step with a whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: grain.DatasetIterator, progress: dict, bits_per_byte: float | None) -> None:
        """Starts to write the state at its step; returns when the state may be donated."""
        items = {
            "params": ocp.args.StandardSave(state.params),
            "rest": ocp.args.StandardSave(_rest(state)),
            "data": ocp.args.JsonSave(data.get_state()),
            "progress": ocp.args.JsonSave(progress),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if self._frozen and state.frozen[0]:
            items["frozen"] = ocp.args.StandardSave(state.frozen[0])
        metrics = {METRIC: math.inf if bits_per_byte is None else bits_per_byte}
        self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def save_params(
        self, params: nnx.State, frozen: nnx.State | None = None, step: int = 0, *, coded: bool = False
    ) -> dict[str, huffman.Sizes]:
        """Writes a model alone: what could be trained of it, and what could not.

        `coded`: what has few bits, which is frozen, in Huffman codes; their sizes are returned.
        """
        found = {}
        if frozen and coded:
            of_bytes, frozen = entropy.split(frozen)
            flat = nnx.to_flat_state(of_bytes)
            found = huffman.write(self._coded, {_joined(path): np.asarray(leaf[...]) for path, leaf in flat})
        items = {"params": _by_layer(params)}
        if frozen:
            items["frozen"] = _by_layer(frozen)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics={METRIC: math.inf})
        return found

    def restore(self, step: int, abstract: TrainState, data: grain.DatasetIterator) -> tuple[TrainState, dict]:
        """The state of a step, laid out as `abstract` says (shapes, dtypes, shardings); sets `data` to its position.

        What is frozen of the objective is not restored, nor what is frozen of the model if that was not saved.
        """
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "rest": ocp.args.StandardRestore(_rest(abstract)),
            "data": ocp.args.JsonRestore(),
            "progress": ocp.args.JsonRestore(),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        if self._frozen and abstract.frozen[0]:
            items["frozen"] = ocp.args.StandardRestore(abstract.frozen[0])
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        data.set_state(found["data"])
        whole = found["rest"] | {"params": found["params"], "ema": found.get("ema")}
        whole["frozen"] = found.get("frozen", NOTHING), NOTHING
        return TrainState(**whole), found["progress"]

    def has(self, step: int, item: str) -> bool:
        """Whether a step has an item."""
        coded = item == "frozen" and self._coded.exists()
        return coded or (self._folder / str(step) / item).is_dir()

    def files(self, step: int, items: Iterable[str]) -> list[Path]:
        """The files that hold these items of a step, in a fixed order; items that it has not are left out."""
        found = [path for item in items for path in sorted((self._folder / str(step) / item).rglob("*"))]
        coded = [self._coded] if self._coded.exists() else []
        return [path for path in found if path.is_file()] + coded

    def restore_params(self, step: int, abstract: nnx.State, item: Literal["params", "ema", "frozen"]) -> nnx.State:
        """One item of a step alone."""
        if item == "frozen" and self._coded.exists():
            return self._restore_coded(step, abstract)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=args)[item]

    def _restore_coded(self, step: int, abstract: nnx.State) -> nnx.State:
        of_bytes, rest = entropy.split(abstract)
        if rest:
            args = ocp.args.Composite(frozen=ocp.args.StandardRestore(rest))
            rest = self._manager.restore(step, args=args)["frozen"]
        arrays = huffman.read(self._coded)
        flat = nnx.to_flat_state(of_bytes)
        found = [(path, leaf.replace(jax.device_put(arrays.pop(_joined(path)), leaf.sharding))) for path, leaf in flat]
        return nnx.merge_state(rest, nnx.from_flat_state(found))


def _by_layer(params: nnx.State) -> ocp.args.StandardSave:
    def how(path: tuple[Any, ...], leaf: jax.Array) -> ocp.SaveArgs:
        stacked = path[0] == jax.tree_util.DictKey("periods")
        return ocp.SaveArgs(shard_axes=(0,) if stacked and leaf.nbytes > LARGE else ())

    return ocp.args.StandardSave(params, jax.tree.map_with_path(how, params))


def _joined(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _rest(state: TrainState) -> dict[str, Any]:
    return state._replace(params=None, ema=None, frozen=None)._asdict()


def write_params(folder: Path, params: nnx.State) -> None:
    """Writes parameters alone, as step 0 of a run; each is a `Lazy`, read, written and forgotten before the next.

    In memory is never more than one parameter and its compressed form.
    """
    one_by_one = _OneByOne(deepcopy_host_arrays=False)
    handlers = (Lazy, one_by_one), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(),
        item_handlers={"params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    ) as manager:
        metrics = {METRIC: math.inf}
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params)), metrics=metrics)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Orbax would start to write all arrays at once."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with shardings, as `Checkpoints.restore` takes them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def whole_step(checkpoints: Checkpoints, folder: Path) -> int:
    """The latest step. Raises UserError if the run has no checkpoint yet."""
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{folder} has no checkpoint yet")
    return step
