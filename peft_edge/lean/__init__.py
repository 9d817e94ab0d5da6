"""Training in little memory: frozen layers that keep only what the backward pass needs."""

from peft_edge.lean.prepare import prepare_model_for_lean_training, undo_lean_training
from peft_edge.lean.summary import lean_summary

__all__ = ["lean_summary", "prepare_model_for_lean_training", "undo_lean_training"]
