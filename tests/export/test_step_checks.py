"""The checks of a step: what computes something else, or does not run, is not kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from torch import Tensor, nn

from peft_edge.export import device
from peft_edge.export.device import export_train_step
from peft_edge.export.onnx_graph import write_onnx_graph
from peft_edge.export.step_checks import run_onnx_steps
from peft_edge.export.train_step import TrainStep
from tests.export.support import IMAGE_SIZE


@pytest.mark.parametrize("wrong", ["graph", "file", "prediction"])
def test_step_that_computes_something_else_is_not_kept(
    step_model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    capture = device.capture_train_step

    def captured(*arguments: object, **options: object) -> TrainStep:
        step = capture(*arguments, **options)
        if wrong == "graph":
            _scale_largest(step.step.module)
        return step

    def written(graph: object, **options: object) -> object:
        if wrong == ("prediction" if options["any_batch_size"] else "file"):
            _scale_largest(graph.module)
        return write_onnx_graph(graph, **options)

    monkeypatch.setattr(device, "capture_train_step", captured)
    monkeypatch.setattr(device, "write_onnx_graph", written)
    message = {
        "graph": r"eager training in double precision within 1e-10, found a difference of \d",
        "file": r"train_step\.onnx: expected the .* found",
        "prediction": r"predict\.onnx: expected the logits .* found a difference of \d",
    }[wrong]
    with pytest.raises(ValueError, match=message):
        export_train_step(step_model, tmp_path / "step", image_size=IMAGE_SIZE, batch_size=2)
    assert list(tmp_path.iterdir()) == []


def _scale_largest(module: nn.Module) -> None:
    """Multiply the largest constant of a graph by 3."""
    max(module.buffers(), key=Tensor.numel).mul_(3)


def test_run_that_dies_is_an_error(step_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(step_folder, tmp_path / "step")
    (tmp_path / "step" / "train_step.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"could not run the training step \(exit code 1\): .*[Pp]rotobuf"):
        run_onnx_steps(tmp_path / "step", [], 0.1)
