from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peft_edge.methods import METHODS
from peft_edge.report.figures.canvas import canvas, legend_below, plain, styles


def draw(path: Path, value: float) -> dict[str, bytes]:
    with canvas(path, size=(3, 2)) as figure:
        axes = figure.subplots()
        axes.plot([0, value], label="a line")
        plain(axes)
        legend_below(figure, [axes, axes], columns=1)
    return {file.name: file.read_bytes() for file in sorted(path.parent.iterdir())}


def test_the_same_figure_is_the_same_files_whatever_the_user_has_set(tmp_path: Path) -> None:
    import matplotlib

    first = draw(tmp_path / "v1.5", 1.0)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        second = draw(tmp_path / "v1.5", 1.0)
        assert matplotlib.rcParams["font.size"] == 30
    assert list(first) == ["v1.5.png", "v1.5.svg"]
    assert first == second
    assert all(draw(tmp_path / "v1.5", 2.0)[name] != content for name, content in first.items())


def test_methods_are_told_apart_without_colour_and_look_the_same_everywhere() -> None:
    every = styles(list(METHODS))
    assert len({style["marker"] for style in every.values()}) == len(METHODS)
    assert styles(["my-own", "lora"])["lora"] == every["lora"]


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "peft-edge\[figures\]"'), canvas(tmp_path / "a", size=(1, 1)):
        pass
    assert list(tmp_path.iterdir()) == []
