"""Reduce the memory and time of training, with lean layers and with latent replay of the frozen first layers."""

from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
from peft_edge.lean.prepare import lean_summary, prepare_model_for_lean_training, undo_lean_training

__all__ = ["FeatureCache", "FrozenPrefix", "lean_summary", "prepare_model_for_lean_training", "undo_lean_training"]
