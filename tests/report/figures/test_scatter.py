from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from peft_edge.report.figures.canvas import styles
from peft_edge.report.figures.scatter import ScatterPanel, _draw, save_scatter

PANEL = ScatterPanel(
    title="a task",
    across="memory [MiB]",
    up="accuracy [%]",
    series={"lora": [(1.0, 60.0), (2.0, 70.0)], "full": [(9.0, 80.0)], "head": [(3.0, 50.0)]},
    has_front=True,
)


def test_the_front_goes_through_what_is_best() -> None:
    axes = Figure().subplots()
    _draw(axes, PANEL, styles(list(PANEL.series)))
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["Pareto front"].get_xydata().tolist() == [[1.0, 60.0], [2.0, 70.0], [9.0, 80.0]]


def test_markers_grow_with_the_rank() -> None:
    axes = Figure().subplots()
    _draw(axes, PANEL, styles(list(PANEL.series)))
    sizes = [line.get_markersize() for line in axes.lines if line.get_marker() == styles(["lora"])["lora"]["marker"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 2


def test_places_may_be_empty(tmp_path: Path) -> None:
    save_scatter([[None, PANEL]], tmp_path / "scatter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scatter.png", "scatter.svg"]
