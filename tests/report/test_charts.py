from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from pandas import DataFrame

from peft_edge.methods import METHODS
from peft_edge.report.charts import (
    Subplot,
    _add_legend,
    _draw_bar_groups,
    _draw_points,
    _draw_ranks,
    _set_frame,
    draw_grouped_bars,
    draw_over_rank,
    draw_scatter,
    draw_stacked_bars,
    figure_file,
    method_styles,
)

BARS = DataFrame({"exact": [20.0, -5.0], "source study's": [90.0, None]}, index=["net", "other"])
RANKS = DataFrame(
    {
        "method": ["lora", "lora", "full", "head"],
        "lora_rank": [1, 16, None, None],
        "low": [0.0, 2.0, 3.0, 1.0],
        "middle": [1.0, 3.0, 4.0, 1.0],
        "high": [2.0, 5.0, 4.0, 1.0],
    }
).astype({"lora_rank": "Int64"})
POINTS = DataFrame(
    {"method": ["lora", "lora", "full", "head"], "x": [1.0, 2.0, 9.0, 3.0], "y": [60.0, 70.0, 80.0, 50.0]}
)
RANK_PANEL = Subplot(title="a task", x_label="rank", y_label="accuracy [%]", data=RANKS)
POINT_PANEL = Subplot(title="a task", x_label="memory [MiB]", y_label="accuracy [%]", data=POINTS)


def draw_line(path: Path, value: float) -> dict[str, bytes]:
    with figure_file(path, size=(3, 2)) as figure:
        axes = figure.subplots()
        axes.plot([0, value], label="a line")
        _set_frame(axes)
        _add_legend(figure, [axes, axes], columns=1)
    return {file.name: file.read_bytes() for file in sorted(path.parent.iterdir())}


def test_same_figure_gives_the_same_bytes_whatever_the_user_has_set(tmp_path: Path) -> None:
    import matplotlib

    first = draw_line(tmp_path / "v1.5", 1.0)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        second = draw_line(tmp_path / "v1.5", 1.0)
        assert matplotlib.rcParams["font.size"] == 30
    assert list(first) == ["v1.5.png", "v1.5.svg"]
    assert first == second
    assert all(draw_line(tmp_path / "v1.5", 2.0)[name] != content for name, content in first.items())


def test_methods_have_different_markers_and_the_same_style_everywhere() -> None:
    every = method_styles(list(METHODS))
    assert len({style["marker"] for style in every.values()}) == len(METHODS)
    assert method_styles(["my-own", "lora"])["lora"] == every["lora"]


def test_missing_matplotlib_raises_an_error_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with (
        pytest.raises(ImportError, match=r'pip install "peft-edge\[report\]"'),
        figure_file(tmp_path / "a", size=(1, 1)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_grouped_bars_have_the_length_of_their_values_and_missing_ones_say_so() -> None:
    axes = Figure().subplots()
    _draw_bar_groups(axes, BARS, list(BARS))
    assert [[bar.get_width() for bar in group] for group in axes.containers] == [[20.0, -5.0], [90.0, 0]]
    assert [text.get_text() for text in axes.texts] == ["20", "-5", "90", "no record"]
    places = [bar.get_y() for group in axes.containers for bar in group]
    assert len(set(places)) == 4


def test_lines_run_over_ranks_and_other_methods_are_left_of_them() -> None:
    axes = Figure().subplots()
    _draw_ranks(axes, RANKS, method_styles(RANKS["method"].tolist()))
    lora, full, head = axes.containers
    assert lora.lines[0].get_xydata().tolist() == [[0.0, 1.0], [1.0, 3.0]]
    assert [segment[:, 1].tolist() for segment in lora.lines[2][0].get_segments()] == [[0.0, 2.0], [2.0, 5.0]]
    places = [bar.lines[0].get_xdata().item() for bar in (full, head)]
    assert places[0] < places[1] < -0.5
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "16", "no rank"]


def test_pareto_front_goes_through_the_best_points() -> None:
    axes = Figure().subplots()
    _draw_points(axes, POINTS, method_styles(POINTS["method"].tolist()), with_front=True)
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["Pareto front"].get_xydata().tolist() == [[1.0, 60.0], [2.0, 70.0], [9.0, 80.0]]


def test_markers_grow_with_the_rank() -> None:
    axes = Figure().subplots()
    styles = method_styles(POINTS["method"].tolist())
    _draw_points(axes, POINTS, styles, with_front=False)
    sizes = [line.get_markersize() for line in axes.lines if line.get_marker() == styles["lora"]["marker"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 2


def test_every_chart_has_both_forms_and_places_may_be_empty(tmp_path: Path) -> None:
    draw_over_rank([[RANK_PANEL, None]], tmp_path / "ranks")
    draw_scatter([[None, POINT_PANEL]], tmp_path / "scatter", with_front=True)
    draw_grouped_bars({"lora": BARS, "dora": BARS}, tmp_path / "grouped", label="reduction [%]")
    parts, ranges = DataFrame({"a": [60.0], "b": [30.0]}, index=["full"]), DataFrame({"min": [80.0], "max": [95.0]})
    draw_stacked_bars(parts, ranges, tmp_path / "stacked", title="t", label="[%]")
    names = ("grouped", "ranks", "scatter", "stacked")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.{e}" for n in names for e in ("png", "svg")]
