"""Parameter-efficient fine-tuning of convolutional networks on edge devices, as an extension to Hugging Face PEFT.

Importing this package makes its tuners known to PEFT.
"""

from peft_edge.backbones import load_backbone
from peft_edge.hub import load_pretrained
from peft_edge.lean import FeatureCache, FrozenPrefix, lean_summary, prepare_model_for_lean_training, undo_lean_training
from peft_edge.tuners.conv_adapter import ConvAdapterConfig, ConvAdapterLayer, ConvAdapterModel
from peft_edge.tuners.conv_lora import ConvLoraConfig, ConvLoraLayer, ConvLoraModel
from peft_edge.tuners.norm import recalibrate

__version__ = "0.1.0"
__all__ = [
    "ConvAdapterConfig",
    "ConvAdapterLayer",
    "ConvAdapterModel",
    "ConvLoraConfig",
    "ConvLoraLayer",
    "ConvLoraModel",
    "FeatureCache",
    "FrozenPrefix",
    "lean_summary",
    "load_backbone",
    "load_pretrained",
    "prepare_model_for_lean_training",
    "recalibrate",
    "undo_lean_training",
]
