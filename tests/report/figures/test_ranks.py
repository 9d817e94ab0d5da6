from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from peft_edge.report.figures.canvas import styles
from peft_edge.report.figures.ranks import RankPanel, _draw, save_over_rank

PANEL = RankPanel(
    title="a task",
    label="accuracy [%]",
    series={
        "lora": {1: (0.0, 1.0, 2.0), 16: (2.0, 3.0, 5.0)},
        "full": {None: (3.0, 4.0, 4.0)},
        "head": {None: (1.0, 1.0, 1.0)},
    },
)


def test_lines_run_over_ranks_and_other_methods_stand_beside() -> None:
    axes = Figure().subplots()
    _draw(axes, PANEL, styles(list(PANEL.series)))
    lora, full, head = axes.containers
    assert lora.lines[0].get_xydata().tolist() == [[0.0, 1.0], [1.0, 3.0]]
    assert [segment[:, 1].tolist() for segment in lora.lines[2][0].get_segments()] == [[0.0, 2.0], [2.0, 5.0]]
    places = [bar.lines[0].get_xdata().item() for bar in (full, head)]
    assert places[0] < places[1] < -0.5
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "16", "no rank"]


def test_panels_are_named_and_places_may_be_empty(tmp_path: Path) -> None:
    save_over_rank([[PANEL, None]], tmp_path / "ranks")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.png", "ranks.svg"]
