from __future__ import annotations

import platform

import torch

from peft_edge.machine import load_average, package_info, system_info


def test_versions_and_the_lack_of_a_package_are_told() -> None:
    packages = package_info("no-such-package")
    assert packages["torch-version"] == torch.__version__.partition("+")[0]
    assert packages["no-such-package-version"] is None


def test_the_machine_is_named_with_what_else_is_given() -> None:
    machine = system_info(accelerator="cpu")
    assert (machine["system"], machine["accelerator"]) == (platform.system(), "cpu")
    assert all(isinstance(value, str) for value in machine.values())
    load = load_average()
    assert load is None or load >= 0
