"""Both runtimes take the same steps, and only one of them imports PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_edge import ConvLoraConfig
from peft_edge.backbones import load_backbone, save_backbone
from peft_edge.export import export_train_step, onnx_steps
from peft_edge.export.train_step import trained_names
from peft_edge.hub import load_pretrained
from peft_edge.study import device_worker


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    rows = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    rows.tofile(tmp_path / "rows")
    found = device_worker.read_rows(tmp_path / "rows", [3, 4], [4, 0, 4])
    np.testing.assert_array_equal(found, rows[[4, 0, 4]])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("worker")
    torch.manual_seed(0)
    save_backbone(load_backbone("test_efficientnet", 3), folder / "base")
    config = ConvLoraConfig(r=2, target_modules="dense", norm="frozen", modules_to_save=["classifier"])
    model = get_peft_model(load_backbone(str(folder / "base")), config).eval()
    export_train_step(model, folder / "step", image_size=32, batch_size=2)
    torch.randn(3, 3, 32, 32).numpy().tofile(folder / "images")
    return {
        "folder": str(folder / "step"),
        "onnx_steps": onnx_steps.__file__,
        "batch_size": 2,
        "momentum": 0.9,
        "labels": [0, 2, 1],
        "batches": [[0, 1], [2], [1, 2]],
        "learning_rates": [0.1, 0.05, 0.02],
        "data": str(folder / "images"),
        "shape": [3, 32, 32],
        "input": "images",
    }


def test_runtimes_train_alike(job: dict[str, object], tmp_path: Path) -> None:
    onnx = device_worker.train_job("onnx", {**job, "out": str(tmp_path / "state.safetensors")})
    eager = device_worker.train_job("torch", {**job, "out": str(tmp_path / "adapter")})
    assert len(onnx["seconds"]) == len(eager["seconds"]) == 3
    before, after = (load_file(f"{folder}/state.safetensors") for folder in (job["folder"], tmp_path))
    model = load_pretrained(tmp_path / "adapter", allow_other_base=True)
    model.set_adapter(model.active_adapter)
    parameters = dict(model.get_base_model().named_parameters())
    assert sum(torch.equal(before[name], after[name]) for name in before) < 0.1 * len(before)
    for name, inner in trained_names(model).items():
        change, other = after[name] - before[name], parameters[inner].detach() - before[name]
        torch.testing.assert_close(change, other, rtol=1e-3, atol=1e-5)


def test_training_in_onnx_runtime_imports_no_pytorch(job: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "job").write_text(json.dumps({**job, "out": str(tmp_path / "state")}))
    code = f"""
import runpy, sys
sys.argv = ["worker", "onnx", {str(tmp_path / "job")!r}]
runpy.run_path({device_worker.__file__!r}, run_name="__main__")
assert not {{"torch", "peft", "timm", "peft_edge"}} & sys.modules.keys(), sorted(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(ended.stdout)["peak_bytes"] > 2**24
