"""The report says what the records say, in words, tables and figures, and no more than they say."""

import base64
import html
import io
import itertools
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from scipy.special import stdtrit

from phyla.training import plots, report
from phyla.training.pages import Sample, Table, printable, to_html, to_markdown
from phyla.training.report import collect, main_table, notices, summary_table, verdict, write_report

GRAMS = {"1-gram": 4.4, "2-gram": 3.5, "3-gram": 2.7, "4-gram": 2.4, "5-gram": 2.3, "xz": 2.6, "xz primed": 2.5}
HOSTILE = "</pre><script>alert(1)</script><img src='http://evil.example/x.png'> & &lt; | `*_\n\n# no\x00\x1b[31m\ud800"


def plan_of(names, seeds=1):
    return {
        "architectures": list(names),
        "parameters": 1_150_000,
        "seeds": seeds,
        "tokens": 2_048_000,
        "sequence_length": 256,
        "batch_size": 16,
        "steps": 500,
        "tokenizer": "bytes",
        "data": "austen",
        "device": "cpu (2 devices)",
        "git": None,
        "command": "phyla compare a|b",
        "asked": {"seeds": seeds},
    }


def run(name, bits, seed=0, **fields):
    last = {"step": 500, "tokens": 2_048_000, "seconds": 150.0, "bits_per_byte": bits}
    return {
        "kind": "run",
        "name": name,
        "seed": seed,
        "parameters": 1_151_232,
        "width": 176,
        "layers": 4,
        "bits_per_byte": bits,
        "tokens": 2_048_000,
        "seconds": 150.2,
        "tokens_per_second": 13_600.0,
        "flops_utilisation": 0.314,
        "peak_memory_bytes": 512_000_000,
        "skipped_updates": 0,
        "curve": [last | {"step": 100, "tokens": 409_600, "seconds": 30.0, "bits_per_byte": bits + 0.9}, last],
        "prompt": "It was ",
        "sample": f"a truth of {name}.",
        **fields,
    }


def speed(name, scale=1.0):
    x = {"prefill_tokens_per_second": [4e4, 3e4], "decode_tokens_per_second": [900.0, 800.0], "state_bytes": [1e6, 4e6]}
    return {"kind": "speed", "name": name, "contexts": [256, 4096], **{k: [scale * y for y in v] for k, v in x.items()}}


def baselines(grams=GRAMS):
    return [{"kind": "baseline", "name": name, "bits_per_byte": bits} for name, bits in grams.items()]


def complete(bits):
    """A plan and all its records: {name: [bits per byte of each seed]}."""
    records = [run(name, value, seed) for name, values in bits.items() for seed, value in enumerate(values)]
    seeds = len(next(iter(bits.values())))
    return plan_of(bits, seeds), [*baselines(), *records, *(speed(n, 1 + i) for i, n in enumerate(bits))]


def answer(bits):
    plan, records = complete(bits)
    return verdict(plan, collect(plan, records))


class Page(HTMLParser):
    """Tags with attributes, the text of each <pre>, and every word."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.samples, self.words, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.samples.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        self.words.append(data)
        if self.inside:
            self.samples[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plan, records = complete({"transformer": [2.10, 2.12, 2.14], "mamba": [2.00, 2.02, 2.04]})
    records = [r | {"sample": HOSTILE} if r["name"] == "mamba" and r["kind"] == "run" else r for r in records]
    path = tmp_path_factory.mktemp("comparison")
    write_report(path, plan, records)
    return path


# The answer


def test_one_seed_names_the_winner_and_has_no_error_bar():
    text = answer({"transformer": [2.15], "mamba": [2.1]})
    assert text.startswith("mamba did better than transformer: 2.100 against 2.150 bits per byte, 0.050 less; ")
    assert "one seed gives no error bar" in text
    assert "±" not in text
    assert answer({"transformer": [2.1], "mamba": [2.15]}).startswith("transformer did better than mamba")


def test_standard_error_over_three_seeds():
    # By hand: s = 0.02 in both, s / √3 = 0.01155, of the difference √2 times that = 0.01633; t(4) = 2.776, so that
    # a difference is clear above 0.0453.
    clear = answer({"a": [2.10, 2.12, 2.14], "b": [2.00, 2.02, 2.04]})
    assert clear.startswith("b did better than a: 2.020 against 2.120 bits per byte, 0.100 ± 0.016 less")
    assert "over 3 seeds" in clear
    assert "more than the spread between seeds explains" in clear
    assert "could explain" in answer({"a": [2.045, 2.065, 2.085], "b": [2.00, 2.02, 2.04]})
    assert "more than" in answer({"a": [2.046, 2.066, 2.086], "b": [2.00, 2.02, 2.04]})


def test_several_architectures_compare_the_best_with_the_second():
    text = answer({"a": [2.4], "b": [2.1], "c": [2.0], "d": [2.2]})
    assert text.startswith("c did better than b, the second of 4: 2.000 against 2.100 bits per byte, 0.100 less")


def test_tie():
    text = answer({"a": [2.1001], "b": [2.1], "c": [2.2]})
    assert text.startswith("b and a tie: 2.100 against 2.100 bits per byte, 0.000 less")
    assert "better" not in text


def test_a_model_that_does_not_beat_the_3_gram_is_named():
    assert "baseline" not in answer({"a": [2.1], "b": [2.5]})  # worse than 4-gram and 5-gram, which do not count
    assert answer({"a": [2.1], "b": [2.71]}).endswith("; b does not beat the 3-gram baseline (2.700).")
    assert answer({"a": [2.7], "b": [2.71]}).endswith("; a and b do not beat the 3-gram baseline (2.700).")


def test_a_diverged_seed_takes_its_architecture_out_of_the_ranking():
    for bad in (math.nan, math.inf, None):
        plan, records = complete({"a": [2.2, 2.2], "b": [2.1, 2.1]})
        records = [r | {"bits_per_byte": bad} if (r["name"], r.get("seed")) == ("b", 1) else r for r in records]
        results = collect(plan, records)
        assert verdict(plan, results).startswith("a reaches 2.200 ± 0.000 bits per byte, and there is nothing")
        assert notices(plan, results) == ["b, seed 1: diverged, so b has no loss and no rank."]
        assert [row[0] for row in main_table(results).rows] == ["a", "b"]


def test_critical_values_are_students():
    for freedom, value in report.T95.items():
        assert value == pytest.approx(stdtrit(freedom, 0.975), abs=6e-4)


# What is missing


def test_nothing_is_missing_from_a_complete_comparison():
    plan, records = complete({"a": [2.1], "b": [2.2]})
    assert notices(plan, collect(plan, records)) == []


def test_missing_records_are_listed():
    plan, records = complete({"a": [2.1, 2.2, 2.1], "b": [2.2, 2.3, 2.2]})
    left = [r for r in records if r["name"] != "xz" and (r["name"] != "b" or r.get("seed") == 0)]
    results = collect(plan, left)
    (notice,) = notices(plan, results)
    assert "Still missing: b (1 of 3 seeds trained); the speed of b; the baselines (xz)." in notice
    assert verdict(plan, results).startswith("So far, a did better than b")
    row = main_table(results).rows[1]
    assert (row[0], row[-3:]) == ("b", ("–", "–", "–"))


@pytest.mark.parametrize("keep", ["", "baseline", "run", "speed"])
def test_any_part_alone_makes_a_report(tmp_path, keep):
    plan, records = complete({"a": [2.1], "b": [2.2]})
    write_report(tmp_path, plan, [r for r in records if r["kind"] == keep])
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "This comparison is not finished" in text
        assert ("No architecture has a result yet." in text) == (keep != "run")
        assert "Not measured yet." in text


def test_the_later_record_of_a_seed_counts():
    plan, records = complete({"a": [2.1], "b": [2.2]})
    assert "2.050 against" in verdict(plan, collect(plan, [*records, run("b", 2.05)]))


def test_records_that_do_not_fit_are_refused_before_writing(tmp_path):
    plan, records = complete({"a": [2.1], "b": [2.2]})
    for record, words in ((run("c", 2.0), "'c'.*not in the plan: a, b"), ({"kind": "odd", "name": "a"}, "kind 'odd'")):
        with pytest.raises(ValueError, match=words):
            write_report(tmp_path / "new", plan, [*records, record])
    assert not (tmp_path / "new").exists()


# Tables


def test_main_table_marks_the_best_of_each_column():
    plan, records = complete({"slow": [2.1], "fast": [2.2]})
    table = main_table(collect(plan, records))  # the second architecture has twice the speed and twice the state
    columns = {head: c for c, head in enumerate(table.head)}
    assert table.rows[0][:4] == ("slow", "1.15 M", "176 × 4", "2.100")
    assert table.rows[0][4:] == ("13.6 k", "150 s", "31 %", "512 MB", "30 k", "800", "4 MB")
    best = {head: {row for row, c in table.best if c == column} for head, column in columns.items()}
    assert best["bits per byte"] == {0}
    assert best["prefill tokens/s at 4,096"] == best["decode tokens/s at 4,096"] == {1}
    assert best["state at 4,096"] == {0}
    assert best["training tokens/s"] == {0, 1}  # the same
    assert best["parameters"] == best["width × layers"] == set()


def test_one_architecture_is_not_the_best_of_anything():
    plan, records = complete({"a": [2.1]})
    assert main_table(collect(plan, records)).best == frozenset()


@pytest.mark.parametrize("seeds", [1, 3])
def test_summary_has_a_line_for_each_architecture_and_baseline(seeds):
    plan, records = complete({"transformer": [2.2] * seeds, "mamba": [2.1] * seeds})
    console = rich.console.Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(plan, records))
    lines = console.export_text().splitlines()
    firsts = [line.split()[0] for line in lines if re.search(r"\d\.\d{3}", line)]
    assert firsts[:4] == ["mamba", "transformer", "1-gram", "2-gram"]
    assert any(line.strip().endswith(" 8 MB") for line in lines)  # the last column is not cut off
    assert "mamba did better than transformer: 2.100 against 2.200 bits per byte" in " ".join(" ".join(lines).split())


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_mean_and_error(values):
    mean, error = plots.mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-6)
    assert math.isnan(plots.mean_and_error(values[:1])[1])


def test_human_units():
    values = {
        1_151_232: "1.15 M",
        999_600: "1 M",
        999_400: "999 k",
        13_600: "13.6 k",
        999.4: "999",
        0: "0",
        0.25: "0.25",
    }
    assert {value: plots.human(value) for value in values} == values
    assert plots.human(512e6, "B") == "512 MB"
    assert plots.human(12, "B") == "12 B"
    assert plots.human(math.nan, "B") == "–"


# The page


def test_html_is_self_contained(folder):
    page = Page((folder / "report.html").read_text())
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg", "source"}
        assert not {"href", "srcset", "style", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 4
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) in {path.read_bytes() for path in folder.glob("*.png")}
    text = (folder / "report.html").read_text()
    assert not re.search(r"url\(|@import", text)
    assert not re.search(r"https?://(?!evil\.example)", text)
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_sample_is_shown_and_does_nothing(folder):
    page = Page((folder / "report.html").read_text())
    assert page.samples == ["It was a truth of transformer.", "It was " + printable(HOSTILE)]
    assert "\x00" not in page.samples[1]
    assert "\x1b" not in page.samples[1]
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown


@given(st.text(st.characters(exclude_categories=[])), st.text(st.characters(exclude_categories=[])))
def test_any_sample_survives_both_pages(prompt, text):
    expected = printable(prompt + text)
    blocks = [report.Heading("t", 1), Sample(prompt, text)]
    assert Page(to_html(blocks)).samples == [expected]
    (found,) = re.findall(r"<pre><b>(.*?)</b>(.*?)</pre>", to_markdown(blocks), re.DOTALL)
    assert html.unescape("".join(found)) == expected
    to_html(blocks).encode()


def test_order_of_the_page(folder):
    words = "".join(Page((folder / "report.html").read_text()).words)
    places = [
        words.index(text)
        for text in (
            *("mamba did better than transformer", "width × layers", "Baselines", "5-gram", "Learning curves"),
            *("Speed and state", "Generated text", "How it was made", "phyla compare", "How it was measured"),
        )
    ]
    assert places == sorted(places)
    assert "at most 256 bytes of context" in words
    assert "met within 0.1 %" in words  # 1 151 232 of 1 150 000


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_tables_are_rectangular_and_pictures_exist(folder):
    text = (folder / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        head, rule, *rows = map(cells, table.splitlines())
        assert all(re.fullmatch(r"---:?", cell) for cell in rule)
        assert {len(head), len(rule)} == {len(row) for row in rows} | {len(head)}
    assert cells(tables[0].splitlines()[2])[:4] == ["mamba", "1.15 M", "176 × 4", "**2.020 ± 0.012**"]
    assert ["command", r"phyla compare a\|b"] in [cells(line) for line in tables[2].splitlines()]
    assert "asked" not in tables[2]
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))


def test_html_table_has_the_cells_and_the_marks():
    table = Table(("name", "x < y"), [("a&b", "1"), ("c", "2")], frozenset({(0, 1)}))
    text = to_html([report.Heading("t", 1), table])
    assert '<th scope="row">a&amp;b</th><td class="best">1</td>' in text
    assert '<th scope="row">c</th><td>2</td>' in text
    assert '<th scope="col">x &lt; y</th>' in text


# Figures


def drawn(png):
    """How many pixels of a picture have each colour, greys left out."""
    pixels = (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int).reshape(-1, 3)
    seen = {}
    for pixel in map(tuple, pixels[(pixels.max(1) - pixels.min(1)) > 40]):
        seen[pixel] = seen.get(pixel, 0) + 1
    return seen


def test_every_figure_draws_every_architecture_and_no_other():
    names = ["transformer", "mamba", "rwkv"]
    plan, records = complete({name: [2.0 + 0.1 * i] for i, name in enumerate(names)})
    results = collect(plan, records)
    bits = {name: results.field(name, "bits_per_byte") for name in names}
    colours = {name: tuple(round(255 * c) for c in to_rgb(colour)) for name, (colour, _) in plots.styles(names).items()}
    other = tuple(round(255 * c) for c in to_rgb(plots.styles(["jamba"])["jamba"][0]))
    for png in (
        plots.learning_curves(results.runs, results.baselines),
        plots.bits_per_byte(bits, results.baselines),
        plots.speed(results.speeds, names),
        plots.state(results.speeds, names),
    ):
        seen = drawn(png)
        assert all(seen.get(colour, 0) > 150 for colour in colours.values())
        assert other not in seen


def test_colours_are_distinct_and_do_not_depend_on_the_company():
    eight = ["transformer", "mamba", "jamba", "rwkv", "xlstm", "mamba2", "hybrid", "mine"]
    styles = plots.styles(eight)
    assert len(set(styles.values())) == len({colour for colour, _ in styles.values()}) == 8
    for name in plots.KNOWN:
        assert plots.styles([name])[name] == plots.styles(["new", name])[name] == styles[name]
    assert len(set(plots.styles([f"new{i}" for i in range(8)]).values())) == 8


def test_figures_of_odd_data(tmp_path):
    plan, records = complete({"a": [2.1, math.nan], "b": [2.1, 2.1], "c": [9.0, 9.0]})
    records[7]["curve"] = [records[7]["curve"][0]]  # one point
    records[8]["curve"][-1]["bits_per_byte"] = math.nan
    records[-1] = {"kind": "speed", "name": "c", **{k: [] for k in records[-1] if k not in ("kind", "name")}}
    write_report(tmp_path, plan, records)
    assert len(list(tmp_path.glob("*.png"))) == 4


@given(st.lists(st.floats(0, 1), max_size=12).map(sorted), st.floats(0.001, 0.2))
def test_labels_are_moved_apart_and_no_more_than_needed(targets, gap):
    places = plots.spread(targets, gap)
    assert len(places) == len(targets)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert sum(places) == pytest.approx(sum(targets), abs=1e-6)
    if all(b - a >= gap for a, b in itertools.pairwise(targets)):
        assert places == pytest.approx(targets)


# Files


def test_a_write_that_fails_half_way_leaves_the_old_report(tmp_path):
    resource = pytest.importorskip("resource", reason="no file size limit on this system")
    plan, records = complete({"a": [2.1], "b": [2.2]})
    write_report(tmp_path, plan, records)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not any(name.endswith(".tmp") for name in before)
    limit = len(before["report.html"]) // 2
    assert limit > max(len(data) for name, data in before.items() if name != "report.html")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the disk is full in the middle of report.html
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(tmp_path, plan, [*records, run("a", 2.0)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "report.html").read_bytes() == before["report.html"]
    assert "2.000" in (tmp_path / "report.md").read_text()


def test_versions_are_named_beside_their_points():
    def of(recipe, size, bits, decode):
        return {"recipe": recipe, "bytes_in_memory": size, "bits_per_byte": bits, "decode": decode}

    points = {
        "mamba": [of(None, 4e6, 2.1, 100), of("int8", 1e6, 2.11, 150), of("nf4", 6e5, 2.12, 90)],
        "rwkv": [of(None, 4e6, 2.8, 200), of("int8", 1e6, 2.8, 250), of("svd-0.5", 2e6, 2.9, 300)],
    }
    png = plots.pareto(points)
    picture = imread(io.BytesIO(png))
    assert picture.shape[0] < 1.5 * picture.shape[1]  # a name outside of its panel would make the picture higher
    colours = {tuple(round(255 * c) for c in to_rgb(colour)) for colour, _ in plots.styles(list(points)).values()}
    assert all(drawn(png).get(colour, 0) > 150 for colour in colours)


def test_the_report_needs_neither_jax_nor_pyplot():
    code = "import sys, phyla.training.report; print(sorted({'jax', 'matplotlib.pyplot'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert found.stdout.strip() == "[]"
