"""The figures of a comparison, as PNG bytes, and the numbers on them as people read them.

Every architecture keeps its colour and its marker in all figures and in all reports; names stand beside the lines.
"""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito's colours, which differ for every kind of colour vision; wine and slate in place of yellow and black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#5B6470")
MARKERS = "osD^vPX*"
KNOWN = ("transformer", "mamba", "jamba", "rwkv", "xlstm")
INK, SOFT = "#1A1C20", "#6B7280"
WIDTH, FONT = 7.0, 11  # inches and points: still readable on a telephone
NOT_MEASURED = "–"
type Labels = list[tuple[float, str, str]]  # value, name, colour
OVERLAP = 12
"""Pixels between two points below which one name does for both."""


def human(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: `1.15 M`, `512 MB`. A dash for NaN, which stands for "not measured"."""
    if math.isnan(value):
        return NOT_MEASURED
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
        if value >= 0.9995 * factor:  # 999.5 rounds to four digits, hence belongs to the next prefix
            return f"{value / factor:.3g} {prefix}{unit}".strip()
    return f"{value:.3g} {unit}".strip()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, s / √n with n - 1 under s; NaN where there are too few values."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name: fixed for the known architectures; others take what is left, in order."""
    fixed = [KNOWN.index(name) for name in names if name in KNOWN]
    free = [*range(len(KNOWN), len(PALETTE)), *(i for i in range(len(KNOWN)) if i not in fixed)]
    others = [name for name in names if name not in KNOWN]
    place = {name: KNOWN.index(name) for name in names if name in KNOWN}
    place |= {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: (PALETTE[place[name]], MARKERS[place[name]]) for name in names}


def learning_curves(runs: Mapping[str, Sequence[dict]], baselines: Mapping[str, float]) -> bytes:
    """Validation bits per byte against tokens (above) and against seconds (below); seeds thin, their mean bold."""
    curves = {name: [run["curve"] for run in runs[name] if run.get("curve")] for name in runs}
    bits = [point["bits_per_byte"] for group in curves.values() for curve in group for point in curve]
    bits = [value for value in bits if math.isfinite(value)] or [0.0]
    ends = [curve[-1]["bits_per_byte"] for group in curves.values() for curve in group]
    # A first point worse than every baseline would flatten all that follows; the last points are always shown.
    roof = max(min(max(bits), max(baselines.values(), default=math.inf)), *filter(math.isfinite, ends), min(bits))
    pad = 0.07 * (roof - min(bits)) or 0.1
    low, high = min(bits) - pad, roof + pad

    figure, panels = _figure(2, 3.8)
    for axes, key, label in zip(panels, ("tokens", "seconds"), ("training tokens", "seconds of training"), strict=True):
        _dress(axes, label, "validation bits per byte")
        axes.set_ylim(low, high)
        labels = [(value, name, SOFT) for name, value in baselines.items() if low <= value <= high]
        for value, _, colour in labels:
            axes.axhline(value, color=colour, linewidth=0.8, linestyle=(0, (5, 4)))
        for name, (colour, marker) in styles(list(runs)).items():
            lines = [[(p[key], p["bits_per_byte"]) for p in curve] for curve in curves[name]]
            if not lines:
                continue
            mean = [
                [mean_and_error(part)[0] for part in zip(*points, strict=True)] for points in zip(*lines, strict=False)
            ]
            for line in lines if len(lines) > 1 else []:
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.7, alpha=0.6)
            axes.plot(*zip(*mean, strict=True), color=colour, linewidth=2.2)
            axes.plot(*mean[-1], color=colour, marker=marker, markersize=7, clip_on=False)
            labels.append((mean[-1][1], name, colour))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
        _name(axes, labels)
    return _png(figure)


def bits_per_byte(bits: Mapping[str, Sequence[float]], baselines: Mapping[str, float]) -> bytes:
    """One line for each architecture (mean, standard error, seeds as small dots) and each baseline, best on top."""
    rows = [(mean_and_error(values)[0], name) for name, values in bits.items()]
    rows = sorted(row for row in [*rows, *((v, n) for n, v in baselines.items())] if math.isfinite(row[0]))
    figure, (axes,) = _figure(1, 0.36 * len(rows) + 0.3)
    _dress(axes, "validation bits per byte (lower is better)", "")
    style = styles(list(bits))
    for y, (value, name) in enumerate(rows):
        label = f"{value:.3f}"
        if name in style:
            colour, marker = style[name]
            error = mean_and_error(bits[name])[1]
            if math.isfinite(error):
                axes.plot(bits[name], [y] * len(bits[name]), ".", color=colour, markersize=5, alpha=0.6)
                axes.errorbar(value, y, xerr=error, color=colour, linewidth=2, capsize=4)
                label += f" ± {error:.3f}"
            axes.plot(value, y, marker, color=colour, markersize=9)
        else:
            colour = SOFT
            axes.plot(value, y, "o", markerfacecolor="white", markeredgecolor=SOFT, markersize=7)
        axes.text(1.02, y, label, transform=axes.get_yaxis_transform(), va="center", fontsize=FONT, color=_text(colour))
    axes.set_yticks(range(len(rows)), [name for _, name in rows], fontsize=FONT)
    for tick, (_, name) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_text(style[name][0]) if name in style else SOFT)
        tick.set_fontweight("bold" if name in style else "normal")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.06)
    return _png(figure)


def speed(speeds: Mapping[str, dict], names: Sequence[str]) -> bytes:
    """Prefill (above) and decode (below) tokens/s of one sequence against its context."""
    figure, panels = _figure(2, 2.9)
    for axes, what in zip(panels, ("prefill", "decode"), strict=True):
        labels = _against_context(axes, speeds, names, f"{what}_tokens_per_second", f"{what}, tokens/s")
        axes.set_ylim(bottom=0, top=1.08 * axes.dataLim.y1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
        _name(axes, labels)
    return _png(figure)


def state(speeds: Mapping[str, dict], names: Sequence[str]) -> bytes:
    """Bytes of the KV cache or the recurrent state of one sequence against its context; both axes logarithmic."""
    figure, (axes,) = _figure(1, 3.6)
    labels = _against_context(axes, speeds, names, "state_bytes", "state of one sequence, bytes")
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(low / 1.6, high * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value, "B")))
    _name(axes, labels)
    return _png(figure)


def pareto(points: Mapping[str, Sequence[dict]]) -> bytes:
    """Validation bits per byte of each architecture's versions against bytes (above) and decoding speed (below).

    A version is a filled marker as it was trained and an open one compressed, with its recipe beside it; the dashed
    line is the front: no version is both better and smaller, or both better and faster, than one on it.
    """
    figure, panels = _figure(2, 3.8)
    kinds = (("bytes_in_memory", "weights in memory, bytes", "B", 1), ("decode", "decode, tokens/s", "", -1))
    for axes, (key, label, unit, sign) in zip(panels, kinds, strict=True):
        _dress(axes, label, "validation bits per byte")
        axes.set_xscale("log")
        everything, labels, recipes = [], [], []
        for name, (colour, marker) in styles(list(points)).items():
            of_one = [each for each in points[name] if math.isfinite(each.get(key, math.nan))]
            for each in of_one:
                face = "white" if each["recipe"] else colour
                x, y = each[key], each["bits_per_byte"]
                axes.plot(x, y, marker, markersize=7, markerfacecolor=face, markeredgecolor=colour)
            recipes.append((colour, [(each[key], each["bits_per_byte"], each["recipe"]) for each in of_one]))
            everything += [(sign * each[key], each["bits_per_byte"]) for each in of_one]
            if of_one:
                labels.append((of_one[0]["bits_per_byte"], name, colour))
        best = front(everything)
        axes.plot([abs(x) for x, _ in best], [y for _, y in best], color=SOFT, linewidth=1, linestyle=(0, (5, 4)))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: human(value, unit)))
        axes.margins(x=0.12, y=0.1)
        _name(axes, labels)
        for colour, named in recipes:
            _name_recipes(axes, colour, named)
    return _png(figure)


def layer_errors(errors: Mapping[str, Sequence[float]]) -> bytes:
    """The relative error of every matrix (a row) in every layer of its stack (a column)."""
    columns = max(map(len, errors.values()))
    figure, (axes,) = _figure(1, 0.32 * len(errors) + 0.3)
    table = [[*values, *[math.nan] * (columns - len(values))] for values in errors.values()]
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0)
    axes.set_xticks(range(columns))
    axes.set_yticks(range(len(errors)), list(errors), fontsize=FONT - 2)
    axes.set_xlabel("layer of the stack", fontsize=FONT, color=INK)
    axes.set_title("‖change‖ / ‖weights‖", fontsize=FONT, color=INK, loc="left")
    most = max(value for row in table for value in row if math.isfinite(value))
    if columns <= 12:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    style = {"ha": "center", "va": "center", "fontsize": FONT - 3}
                    axes.text(x, y, f"{value:.1%}", color="white" if value > 0.6 * most else INK, **style)
    return _png(figure)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of which no other is at most as large in both numbers, by the first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _against_context(axes: Axes, speeds: Mapping[str, dict], names: Sequence[str], key: str, label: str) -> Labels:
    _dress(axes, "context, tokens", label)
    axes.set_xscale("log", base=2)
    labels = []
    for name, (colour, marker) in styles(names).items():
        if name in speeds and speeds[name]["contexts"]:
            x, y = speeds[name]["contexts"], speeds[name][key]
            axes.plot(x, y, color=colour, marker=marker, linewidth=2, markersize=7)
            labels.append((y[-1], name, colour))
    contexts = sorted({context for record in speeds.values() for context in record["contexts"]})
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return labels


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels one below the other, each `height` inches, so that a narrow page shrinks them little."""
    total = panels * height + 0.75 * panels
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    bottoms = [(panels - 1 - i) * (height + 0.75) + 0.6 for i in range(panels)]
    return figure, [figure.add_axes((0.13, bottom / total, 0.67, height / total)) for bottom in bottoms]


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=FONT, color=INK)
    axes.set_ylabel(y, fontsize=FONT, color=INK)
    axes.tick_params(labelsize=FONT - 1, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9AA1AB")
    axes.grid(color="#E4E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _name(axes: Axes, labels: Labels) -> None:
    """Names the values on the right margin, in their colours, moved apart where they would overlap."""
    axes.autoscale_view()  # the transform knows no limits that are still to be found
    height = axes.get_window_extent().height
    place = axes.get_yaxis_transform() - axes.transAxes
    where = sorted((place.transform((1, y))[1], name, colour) for y, name, colour in labels if math.isfinite(y))
    gap = 1.3 * FONT * axes.figure.dpi / 72 / height
    for (y, name, colour), moved in zip(where, spread([y for y, _, _ in where], gap), strict=True):
        axes.annotate(
            name,
            xy=(1.005, y),
            xytext=(1.07, moved),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
            color=_text(colour),
            fontsize=FONT - 1 if colour == SOFT else FONT,
            fontweight="normal" if colour == SOFT else "bold",
            va="center",
            annotation_clip=False,
        )


def _name_recipes(axes: Axes, colour: str, points: Sequence[tuple[float, float, str | None]]) -> None:
    """Writes the recipes beside their points; those of points that overlap become one name."""
    names: dict[tuple[float, float], list[str]] = {}
    for x, y, recipe in points:
        if recipe:
            at = axes.transData.transform((x, y))
            near = (other for other in names if math.dist(axes.transData.transform(other), at) < OVERLAP)
            names.setdefault(next(near, (x, y)), []).append(recipe)
    for at, recipes in names.items():
        style = {"fontsize": FONT - 4, "color": _text(colour), "textcoords": "offset points"}
        axes.annotate(", ".join(recipes), at, xytext=(5, 3), **style)


def spread(targets: Sequence[float], gap: float) -> list[float]:
    """Positions near the sorted targets and at least `gap` apart; those that collide are centred on their mean."""
    groups: list[list[float]] = []
    for target in targets:
        groups.append([target])
        while len(groups) > 1:
            a, b = groups[-2:]
            if mean_and_error(b)[0] - mean_and_error(a)[0] >= gap * (len(a) + len(b)) / 2:
                break
            groups[-2:] = [a + b]
    return [mean_and_error(g)[0] + gap * (i - (len(g) - 1) / 2) for g in groups for i in range(len(g))]


def _text(colour: str) -> tuple[float, float, float]:
    """A darker shade: the colours of lines are too pale for words on white."""
    r, g, b = to_rgb(colour)
    return 0.72 * r, 0.72 * g, 0.72 * b


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    return buffer.getvalue()
