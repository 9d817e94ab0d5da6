"""What a measurement was made with: the machine, and the versions of the packages."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("accelerate", "datasets", "peft", "timm", "torch", "torchvision", "transformers")
_CPU_INFO = Path("/proc/cpuinfo")


def package_info(*more: str) -> dict[str, str | None]:
    """Returns the versions of the packages that results depend on, and of others; None for one that is missing."""
    return {f"{name}-version": _version(name) for name in (*_PACKAGES, *more)}


def system_info(**more: str) -> dict[str, str]:
    """Returns the names of the system and of its processor, and what else is given."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "version": platform.version(),
        "machine": platform.machine(),
        "processor": platform.processor() or _cpu_model(),
        **more,
    }


def load_average() -> float | None:
    """Returns how many processes wanted a core in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
