from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_edge.profiling.figures import StackedBars, save_bars, save_cost_figure
from peft_edge.records import StepProfile

COSTS = {
    "full": StepProfile(
        process_index=0,
        scope="step",
        flops_forward=10**10,
        flops_backward=2 * 10**10,
        flops_optimizer=10**8,
        memory_parameters_bytes=2**24,
        memory_activations_bytes=2**30,
    ),
    "lora, rank 4": StepProfile(process_index=0, scope="step", lora_rank=4, memory_activations_bytes=2**29),
}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_same_costs_give_the_same_file(tmp_path: Path, ending: str) -> None:
    pictures = []
    for costs in (COSTS, COSTS, {**COSTS, "head": COSTS["full"]}):
        save_cost_figure(costs, tmp_path / f"costs.{ending}", title="a network")
        pictures.append((tmp_path / f"costs.{ending}").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert [path.name for path in tmp_path.iterdir()] == [f"costs.{ending}"]


def test_figure_shows_labels_and_units(tmp_path: Path) -> None:
    save_cost_figure(COSTS, tmp_path / "costs.svg", title="a network")
    text = (tmp_path / "costs.svg").read_text(encoding="utf-8")
    for label in ("a network", "full", "lora, rank 4", "[MiB]", "[GFLOP]", "activations", "elementwise, backward"):
        assert label in text


def test_bars_are_proportional_to_bytes(tmp_path: Path) -> None:
    save_cost_figure(COSTS, tmp_path / "costs.png", title="a network")
    picture = Image.open(tmp_path / "costs.png").convert("RGB")
    is_blue = [[pixel == [0x00, 0x72, 0xB2] for pixel in row] for row in np.asarray(picture).tolist()]
    # In each row, the first blue run is in the left panel.
    rows = [len(next((list(run) for blue, run in groupby(row) if blue), [])) for row in is_blue]
    # The two bars and the patch in the legend.
    _, shorter, longer = sorted(set(rows) - {0})
    assert longer == pytest.approx(2 * shorter, rel=0.02)


def test_bar_slightly_outside_its_spread_is_drawn(tmp_path: Path) -> None:
    parts = {"forward": [0.7], "backward": [0.2], "optimizer": [0.1]}
    panel = StackedBars(label="time", parts=parts, spread=[(1.0, 1.0)])
    assert 0.7 + 0.2 + 0.1 < 1.0

    save_bars(["full"], [panel], tmp_path / "bars.png", title="a network")

    assert (tmp_path / "bars.png").exists()


def test_marks_and_lengths_are_drawn(tmp_path: Path) -> None:
    panel = StackedBars(
        label="time", parts={"forward": [1200.0, 0.0]}, marks={"slowest": [1500.0, None]}, number_format=",.0f"
    )
    save_bars(["full", "none"], [panel], tmp_path / "bars.svg", title="a network")
    text = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    assert "<!-- 1,200 -->" in text
    assert "<!-- slowest -->" in text


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"costs\.gif has the ending '\.gif', expected one of \.png, \.svg, \.pdf"):
        save_cost_figure(COSTS, tmp_path / "costs.gif", title="a network")
