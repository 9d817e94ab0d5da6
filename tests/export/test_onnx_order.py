"""The order in which ONNX Runtime runs a training step: masks early, their conversion late."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_edge import ConvLoraConfig
from peft_edge.export import onnx_graph
from peft_edge.export.onnx_graph import write_onnx_graph
from peft_edge.export.train_step import StepOptimizer, TrainStep, capture_train_step
from tests.export.support import randomize

SHAPE = (4, 3, 16, 16)


@pytest.fixture(scope="module")
def step() -> TrainStep:
    """Return the training step of a network in which a ReLU6 and a ReLU each feed a frozen depthwise convolution."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Hardswish()),
        *(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 5)),
    )
    config = ConvLoraConfig(r=2, target_modules="dense", norm="frozen", modules_to_save=["9"])
    model = randomize(get_peft_model(network, config))
    return capture_train_step(model, torch.zeros(SHAPE), StepOptimizer())


def inputs(step: TrainStep) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "images": random.standard_normal(SHAPE).astype(np.float32),
        "labels": np.arange(len(SHAPE)),
        "mask": np.ones(len(SHAPE), np.float32),
        "learning_rate": np.array(0.1, np.float32),
        **{name: value.float().numpy() for name, value in {**step.adapter, **step.state}.items()},
    }


def by_default(options: onnxruntime.SessionOptions) -> None:
    options.enable_mem_pattern = False


def by_priority(options: onnxruntime.SessionOptions) -> None:
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED


@pytest.mark.parametrize("choose", [by_default, by_priority])
def test_masks_are_computed_before_the_loss_and_converted_after_it(
    step: TrainStep, choose: Callable[[onnxruntime.SessionOptions], None], tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    choose(options)
    model = write_onnx_graph(step.step)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, inputs(step))
    events = json.loads(Path(session.end_profiling()).read_text())
    names = [event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"]
    order = {name: index for index, name in enumerate(names)}
    loss = next(node.name for node in model.graph.node if node.op_type == "LogSoftmax")
    size = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Size"}
    (counted,) = (node for node in model.graph.node if node.op_type == "Max")
    masks = {size[name] for name in counted.input}
    assert len(masks) == 2
    gated = {
        node.output[0]: node for node in model.graph.node if masks.intersection(node.input) and len(node.input) == 2
    }
    converted = [node.name for node in model.graph.node if node.op_type == "Cast" and node.input[0] in gated]
    assert len(converted) == 2
    assert max(order[name] for name in masks) < order[loss] < min(order[name] for name in converted)


def test_values_are_unchanged(step: TrainStep, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled = write_onnx_graph(step.step)
    monkeypatch.setattr(onnx_graph, "schedule_masks", lambda nodes, *_, **__: nodes)
    plain = write_onnx_graph(step.step)
    assert len(scheduled.graph.node) > len(plain.graph.node)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    one, other = (
        onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs(step))
        for model in (scheduled, plain)
    )
    assert all(np.array_equal(first, second) for first, second in zip(one, other, strict=True))


def test_prediction_is_not_changed(step: TrainStep) -> None:
    model = write_onnx_graph(step.predict, any_batch_size=True)
    assert "Size" not in {node.op_type for node in model.graph.node}
    onnx.checker.check_model(model)
