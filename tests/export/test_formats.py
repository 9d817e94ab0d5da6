from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from peft_edge.export import formats
from peft_edge.export.formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_run_as_it_was_written(name: str, tmp_path: Path, images: torch.Tensor) -> None:
    if name != "torch-export":
        pytest.importorskip({"onnx": "onnxscript", "executorch": "executorch"}[name])
    form, conv = FORMATS[name], nn.Conv2d(3, 4, 3)
    shapes = ({0: Dim("batch")},) if form.any_batch_size else None
    file = tmp_path / f"conv{form.suffix}"
    form.write(torch.export.export(conv, (images,), dynamic_shapes=shapes), {"text": "{}"}, file)
    network = form.load(file)
    for size in (4, 1, 3) if form.any_batch_size else (4,):
        first = network(images[:size])
        network(torch.zeros(size, 3, 32, 32))
        torch.testing.assert_close(first, conv(images[:size]), rtol=1e-5, atol=1e-6)


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))

    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(formats, "import_module", missing)
    for name, module in {"onnx": "onnxscript", "executorch": r"executorch\.exir"}.items():
        with pytest.raises(ImportError, match=rf'{module} is not installed: pip install "peft-edge\[{name}\]"'):
            FORMATS[name].write(program, {}, tmp_path / "file")
    assert not any(tmp_path.iterdir())
