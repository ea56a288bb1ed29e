"""The ruler: cycles that are known beforehand, by hand or by construction, and the table that it prints."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from phyla.models.errors import UserError
from phyla.training import targets
from phyla.training.bench import bundles
from phyla.training.bench.compile import assembler
from phyla.training.bench.kernels import DIRECTIONS, bench_kernels, bound, estimated, published, tables
from phyla.training.bench.problems import CHIP, PROBLEMS, Work
from phyla.training.bench.static import Job, estimate
from tests.training import known_kernel

LOOP = """
     0   :  { %s1_s1 = smov.u32 0 }
   0x1 LB: > { %s2_s2 = sadd.s32 1, %s1_s1 } /* Start region 7 */
   0x2   : > { %p3_p3 = scmp.lt.s32.totalorder %s2_s2, 5  ;;  %s1_s1 = smov.u32 %s2_s2 }
   0x3   : > { %9 = sbr.rel (%p3_p3) target = $region7  ;;  %s4_s4 = smov.u32 3 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   :  { %10 = dma.hbm_to_vmem [thread:$0]  (%p3_p3), /*hbm=*/%s0, /*size_in_granules=*/64, /*vmem=*/%s0 }
   0x9   :  { %11 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s0, /*size_in_granules=*/%s4_s4, /*vmem=*/%s0 }
   0xa   :  { %12 = inlined_call /* %other = f32[] */ }
"""
OTHER = "     0   :  {}\n   0x1   :  {}\n"


def test_bundles_are_counted_as_often_as_they_run():
    """One before the loop, five turns of three and four in the branch's delay, three after it; and what it calls."""
    counted = bundles.count({"TLP": bundles.parse(LOOP), "other": bundles.parse(OTHER)})
    assert counted.cycles == 1 + 5 * (3 + 4) + 3 + 2
    assert counted.bytes == 3 * bundles.GRANULE  # the guard of the first copy does not hold after the last turn
    assert counted.operations == {"": 39, "other": 2}
    assert counted.assumed == counted.loops == 0


def test_a_loop_of_unknown_length_runs_once_and_is_said():
    text = LOOP.replace("scmp.lt.s32.totalorder %s2_s2, 5", "vpop.f32 %v0")
    counted = bundles.count({"TLP": bundles.parse(text), "other": bundles.parse(OTHER)})
    assert counted.cycles == 1 + (3 + 4) + 3 + 2
    assert counted.loops == 1


def test_a_program_that_is_missing_or_endless_is_an_error(monkeypatch):
    with pytest.raises(bundles.Unreadable, match="no bundles of other"):
        bundles.count({"TLP": bundles.parse(LOOP)})
    monkeypatch.setattr(bundles, "LIMIT", 1000)
    with pytest.raises(bundles.Unreadable, match="no end"):
        bundles.count({"TLP": bundles.parse(LOOP.replace("%s2_s2, 5", "%s2_s2, 2000000000"))})


def known(steps: int, turns: int, folder: Path) -> dict:
    """The estimate for `known_kernel`."""
    return estimate("v5e", Job(f"{steps} {turns}", "forward", "tpu"), (known_kernel.__file__,))


def test_the_cycles_of_a_compiled_kernel(tmp_path):
    short, long, more = (known(steps, turns, tmp_path) for steps, turns in ((1, 100), (1, 300), (3, 100)))
    # A turn is a product and a sum that wait for each other, and at least a branch with its delay.
    turn, rest = divmod(long["kernels"]["known.1"] - short["kernels"]["known.1"], 200)
    assert rest == 0
    assert 1 + bundles.DELAY <= turn <= 10
    once = short["kernels"]["known.1"]
    assert 100 * turn < once < 100 * turn + 100
    assert 3 * 100 * turn < more["kernels"]["known.1"] < 3 * (once + 100)
    for each, steps in ((short, 1), (long, 1), (more, 3)):
        assert each["moved"] == steps * 2 * 8 * 128 * 4
        assert each["cycles"] >= each["kernels"]["known.1"]


def test_a_compiler_that_fails_is_a_line_in_the_table():
    assert "KeyError" in estimate("v5e", Job("no such problem", "forward", "tpu"))["error"]


def test_bounds():
    limits = published("v5e")
    assert bound(819_000_000, Work(), limits) == (pytest.approx(1e-3), "memory")
    assert bound(0, Work(matrix=197e9), limits) == (pytest.approx(1e-3), "matrix")
    assert bound(0, Work(matrix=197e9, dtype="int8"), limits) == (pytest.approx(0.5e-3), "matrix")
    chip = targets.CHIPS["v5e"]
    assert bound(0, Work(vector=4 * 1024, transcendental=1024), limits)[0] == pytest.approx(1 / chip.clock)


def test_an_estimate_is_the_longest_of_instructions_bytes_and_the_bound():
    """A matrix unit takes products no faster than published, however fast bundles hand them over."""
    program = {"cycles": 1_500, "moved": 8190, "kernels": {"one": 750}, "bound": 1e-9}
    assert estimated(program, "v5e") == {"seconds": pytest.approx(1e-6), "alone": pytest.approx(0.5e-6)}
    assert estimated(program | {"moved": 819_000_000}, "v5e")["seconds"] == pytest.approx(1e-3)
    assert set(estimated(program | {"bound": 1.0}, "v5e").values()) == {1.0}
    assert set(estimated(program | {"kernels": {}}, "v5e")) == {"seconds"}
    assert estimated({"error": "no", "bound": 1.0}, "v5e") == {}


def test_what_must_be_moved():
    """Every argument and result once: the arrays of an SSD in numbers."""
    problem = PROBLEMS["ssd"](CHIP)
    B, T, H, P, N = 1, 8192, 32, 64, 128
    x, dt, shared, weights, ids, state = (
        B * T * H * P * 2,
        B * T * H * 4,
        B * T * N * 2,
        2 * H * 4,
        B * T * 4,
        H * P * N * 4,
    )
    assert problem.bytes("forward") == 2 * x + dt + 2 * shared + weights + ids + state
    assert problem.bytes("backward") == x + state + 2 * (x + dt + 2 * shared + weights) + ids


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_problem_is_one_of_its_op(name, direction):
    """Abstractly: shapes fit, and each direction has a bound."""
    problem = PROBLEMS[name](CHIP)
    function, arguments = problem.function("xla", direction)
    assert function is not None
    assert arguments
    assert bound(problem.bytes(direction), problem.work[direction], published("v5e"))[0] > 1e-6


def test_the_command_prints_and_writes_a_table(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    bench_kernels(["causal_conv"], target="v5e", json=path, rounds=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Static estimates, no measurement" in printed
    assert "causal_conv →" in printed
    rows = json.loads(path.read_text())["rows"]
    assert [(row["direction"], row["implementation"]) for row in rows] == [("forward", "xla"), ("backward", "xla")]
    assert all(row["bound"] < row["seconds"] < 100 * row["bound"] for row in rows)


ASSEMBLED = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'quantized_matmul_nf4_mosaic_gpu_kernel' for 'sm_90a'
ptxas         .     120 bytes stack frame, 116 bytes spill stores, 112 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 17 bytes smem
"""


def test_what_the_assembler_says():
    assert assembler(ASSEMBLED) == {"name": "quantized_matmul_nf4", "registers": 255, "spilled": 116}


def test_a_table_of_kernels_for_gpus():
    """Registers and spills of a GPU's kernel, temporaries of both programs, and the line of one that failed."""
    static = {"problem": "ssd", "direction": "forward", "bytes": 2e6, "work": Work(3e9)._asdict(), "bound": 4e-6}
    built = {"compiler": {"temporaries": 5e6}, "assembled": [{"name": "a", "registers": 113, "spilled": 17}]}
    rows = [static | built | {"implementation": "gpu", "by": "memory"}]
    rows.append(static | {"implementation": "xla", "by": "memory", "error": "RuntimeError: no"})
    (table,) = tables({"target": "h100", "size": [1, 2, 3], "rows": rows})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert any(line.split() == ["ssd", "→", "2", "3.0", "4", "memory", "113", "17", "5", "?"] for line in lines)
    assert any(line.strip() == "ssd forward, xla: RuntimeError: no" for line in lines)


@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is not None, reason="the compiler for GPUs is here")
def test_a_compiler_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"phyla\[gpu\]"):
        bench_kernels(["ssd"], target="h100", json=tmp_path / "a.json", rounds=1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs the extra gpu")
@pytest.mark.parametrize("problem", ["wkv7", "quantized_matmul nf4 × 32", "quantized_matmul int8-dynamic × 512"])
def test_kernels_compile_to_machine_code(problem):
    for direction in DIRECTIONS:
        (assembled,) = estimate("h100", Job(problem, direction, "gpu"))["assembled"]
        assert assembled["registers"] <= 255
        assert assembled["spilled"] == 0


def test_what_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="ssd"):
        bench_kernels(["sdd"], target=None, json=tmp_path / "a.json", rounds=1)
    with pytest.raises(UserError, match="tpu7x"):
        bench_kernels(["ssd"], target="gpu", json=tmp_path / "a.json", rounds=1)
