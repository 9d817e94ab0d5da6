from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from peft_edge.profiling.figures import StackedBars
from peft_edge.report.figures.bars import BarPanel, _draw, save_grouped, save_stacked

PANEL = BarPanel(title="lora", label="reduction [%]", groups={"exact": [20.0, -5.0], "source study's": [90.0, None]})


def test_bars_are_as_long_as_their_values_and_missing_ones_say_so() -> None:
    axes = Figure().subplots()
    _draw(axes, PANEL, list(PANEL.groups))
    assert [[bar.get_width() for bar in group] for group in axes.containers] == [[20.0, -5.0], [90.0, 0]]
    assert [text.get_text() for text in axes.texts] == ["20", "-5", "90", "no record"]
    places = [bar.get_y() for group in axes.containers for bar in group]
    assert len(set(places)) == 4


def test_figures_have_both_forms(tmp_path: Path) -> None:
    save_grouped(["net", "other"], [PANEL, PANEL], tmp_path / "grouped")
    stack = StackedBars(label="[%]", parts={"a": [60.0], "b": [30.0]}, spread=[(80.0, 95.0)], line=100)
    save_stacked(["full"], stack, tmp_path / "stacked", title="t")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grouped.png",
        "grouped.svg",
        "stacked.png",
        "stacked.svg",
    ]
