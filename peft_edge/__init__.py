"""Parameter-efficient fine-tuning of convolutional networks for edge devices, as an extension of Hugging Face PEFT.

Once both PEFT and this package are imported, in either order, this package registers its tuners with PEFT. Each name in
`__all__` is imported when it is first used, so that the command line starts without importing torch.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from peft_edge.backbones import load_backbone
    from peft_edge.hub import load_pretrained
    from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
    from peft_edge.lean.prepare import lean_summary, prepare_model_for_lean_training, undo_lean_training
    from peft_edge.tuners.conv_adapter import ConvAdapterConfig, ConvAdapterLayer, ConvAdapterModel
    from peft_edge.tuners.conv_lora import ConvLoraConfig, ConvLoraLayer, ConvLoraModel
    from peft_edge.tuners.norm import recalibrate

__version__ = "0.1.0"
__all__ = [
    "ConvAdapterConfig", "ConvAdapterLayer", "ConvAdapterModel", "ConvLoraConfig", "ConvLoraLayer", "ConvLoraModel",
    "FeatureCache", "FrozenPrefix", "lean_summary", "load_backbone", "load_pretrained",
    "prepare_model_for_lean_training", "recalibrate", "undo_lean_training",
]  # fmt: skip


def __getattr__(name: str) -> object:
    for module in ("tuners", "lean", "backbones", "hub") if name in __all__ else ():
        public = vars(import_module(f"{__name__}.{module}"))
        if name in public:
            return globals().setdefault(name, public[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_imported: set[str] = set()  # names of modules whose import is complete: `peft`, and modules of this package


def _register_with_peft(module: ModuleType) -> None:
    """Import `tuners` and `hub` once PEFT is imported and no module of this package is still being imported.

    The import of `tuners` registers the tuners with PEFT. The import hooks at the end of this file call this function
    after the import of PEFT and of each direct submodule of this package, perhaps in several threads at once.
    """
    _imported.add(module.__name__)
    if "peft" in _imported and not any(map(_is_half_imported, {*sys.modules})):
        import_module(f"{__name__}.tuners")
        import_module(f"{__name__}.hub")


def _is_half_imported(module: str) -> bool:
    package, _, name = module.rpartition(".")
    if module in _imported or not module.startswith(f"{__name__}."):
        return False
    # A module becomes an attribute of its package when its import is complete.
    return package in sys.modules and name not in vars(sys.modules[package])


for _name in ["peft", *(f"{__name__}.{module.name}" for module in iter_modules(__path__))]:
    register_post_import_hook(_register_with_peft, _name)
