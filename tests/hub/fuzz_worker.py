"""Load damaged and hostile copies of an adapter, one per seed: `fuzz_worker.py ADAPTER FIRST LAST`.

The program prints one line of JSON for each seed from FIRST to LAST - 1. If a seed takes too long, SIGALRM ends the
process. If a seed takes too much memory, the process may end, too.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peft_edge import load_backbone, load_pretrained
from peft_edge.backbones import fingerprint

SECONDS = 60
MORE_MEMORY = 2**30

JSON_FILES = ("adapter_config.json", "label_names.json", "preprocessing.json", "source_model/config.json")
TENSOR_FILES = ("adapter_model.safetensors", "source_model/model.safetensors")
HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**6, 10**9, 10**18, 10**30, 1e308, -0.5, "", "x" * 2**19, "../../../etc", "/etc/passwd"),
    *(
        "(a+)+$",
        "(.*)*X",
        "(x+x+)+y",
        "(?:.*.*.*.*.*.*.*.*)z",
        "(.|.)*!",
        "(" * 5000,
        ".{1000}{1000}",
        "\u0000",
        "\ud83e",
    ),
    *([], [""], ["conv"] * 50_000, [[]], {}, {"(.*.*)*X": 4}, {".*": 10**9}, {"a": {"b": {}}}, [None], "all-linear"),
    *(
        "resnet50",
        "vit_gigantic_patch14_224",
        "timm/mobilenetv2_100",
        "me/adapter",
        ".",
        "~",
        "pissa",
        "olora",
        "loftq",
    ),
)


def flip_bits(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(JSON_FILES + TENSOR_FILES)
    content = bytearray(file.read_bytes())
    # Often damage only the start of the file: the header of a safetensors file is there.
    end = draw.choice([min(len(content), 300), min(len(content), 5000), len(content)])
    for _ in range(draw.choice([1, 1, 2, 10])):
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(JSON_FILES + TENSOR_FILES)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))] + draw.choice([b"", b"", bytes(100)]))


def remove(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(JSON_FILES + TENSOR_FILES)
    file.unlink()
    if draw.random() < 0.5:
        draw.choice([Path.mkdir, lambda path: path.symlink_to("/dev/zero")])(file)


def change_header(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(TENSOR_FILES)
    header, data = _parts(file)
    first, second = draw.sample([name for name in header if name != "__metadata__"], 2)
    entry = header[first]
    change = draw.randrange(8)
    if change == 0:
        entry["shape"] = entry["shape"][::-1]
    elif change == 1:
        entry["shape"] = draw.choice([[2**40, 2**30], [2**63], [0, 2**64 - 1], [-1], [1] * 10_000, [], "a", [1.5]])
    elif change == 2:
        entry["dtype"] = draw.choice(["F16", "BF16", "I64", "F64", "U8", "F8_E4M3", "Q4", 7])
    elif change == 3:
        header[first], header[second] = header[second], header[first]
    elif change == 4:
        header[draw.choice(["../x", "", "a" * 10_000, first + ".weight"])] = header.pop(first)
    elif change == 5:
        entry["data_offsets"] = draw.choice([[0, 2**62], [5, 1], [-4, 0], [0], header[second]["data_offsets"]])
    elif change == 6:
        header |= {f"more.{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(20_000)}
    else:
        del header[first]
    _write(file, header, data)


def claim_header(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(TENSOR_FILES)
    content = file.read_bytes()
    size = draw.choice([0, 1, len(content), 2**20, 2**27, 2**31, 2**40, 2**63, 2**64 - 1])
    file.write_bytes(struct.pack("<Q", size) + content[8:])


def change_values(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(TENSOR_FILES)
    header, data = _parts(file)
    changed = bytearray(data)
    start = 4 * draw.randrange(len(data) // 4)
    changed[start : start + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf"), -float("inf"), 3e38, 0.0]))
    _write(file, header, bytes(changed))


def change_json(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(JSON_FILES)
    content = json.loads(file.read_text())
    value = draw.choice(HOSTILE_VALUES)
    if isinstance(content, list):
        content = draw.choice([value, [*content, value], [value] * len(content)])
    else:
        inner = content.get("pretrained_cfg", content) if draw.random() < 0.5 else content
        inner[draw.choice([*inner, "model_args", "pickle", "state_dict", "file"])] = value
    file.write_text(json.dumps(content))


def change_target(files: Path, draw: random.Random) -> None:
    file = files / "adapter_config.json"
    content = json.loads(file.read_text())
    keys = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"]
    content[draw.choice(keys)] = draw.choice(HOSTILE_VALUES)
    content["layers_to_transform"] = draw.choice([None, [0], list(range(10_000))])
    file.write_text(json.dumps(content))


def write_hostile_json(files: Path, draw: random.Random) -> None:
    file = files / draw.choice(JSON_FILES)
    text = file.read_text()
    depth = draw.choice([500, 5000, 500_000])
    hostile = [
        "[" * depth,
        '{"a":' * depth,
        re.sub(r"\{", '{"peft_type": "LORA", "architecture": "resnet18", ', text, count=1),
        json.dumps("x" * 2**22),
        re.sub(r": \d+", ": " + "9" * draw.choice([30, 5000, 100_000]), text),
        re.sub(r": \d+", draw.choice([": NaN", ": -Infinity", ": 1e400"]), text),
        text.replace("null", "[" * depth + "]" * depth, 1),
        text[:-1] + ', "a": 1' * 100_000 + "}",
        "\ufeff" + text,
        "",
    ]
    file.write_text(draw.choice(hostile))


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip_bits, truncate, remove, change_header, claim_header),
    *(change_values, change_json, change_target, write_hostile_json),
)


def _parts(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _write(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def run(adapter: Path, seed: int, base: torch.nn.Module, images: torch.Tensor) -> str:
    """Load the copy of the adapter that belongs to `seed`. Return `loaded`, or a text that starts with `refused`."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as parent:
        files = Path(parent) / "adapter"
        shutil.copytree(adapter, files)
        MUTATIONS[seed % len(MUTATIONS)](files, draw)
        try:
            model = load_pretrained(files, base=base if draw.random() < 0.5 else None)
        except (ValueError, OSError) as error:
            return f"refused: {error!s:.200}" if str(error) else "refused without a message"
        classes = model.get_base_model().num_classes
        assert model(images).shape == (len(images), classes)
        return "loaded"


def main(adapter: Path, first: int, last: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    base, images = load_backbone(str(adapter / "source_model")), torch.randn(1, 3, 32, 32)
    load_pretrained(adapter, base=base)(images)
    before = fingerprint(base), [name for name, _ in base.named_modules()]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, resource.RLIM_INFINITY))
    for seed in range(first, last):
        signal.alarm(SECONDS)
        try:
            outcome = run(adapter, seed, base, images)
        except BaseException as error:
            outcome = f"crashed: {type(error).__name__}: {error!s:.500}"
        if (fingerprint(base), [name for name, _ in base.named_modules()]) != before:
            outcome = f"changed the model, {outcome}"
        print(json.dumps({"seed": seed, "outcome": outcome}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
