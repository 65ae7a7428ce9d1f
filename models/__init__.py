"""All kinds of model: their registry, building them, loading weights into them."""

from models.exported import meta_of
from models.registry import ARCHITECTURE, FAST, INFERENCE_KINDS, KINDS, SCRIPTS_OWN, SPEEDRUN, build_model
from models.weights import (
    as_kind,
    fill,
    find_for_inference,
    is_dense,
    load,
    load_for_inference,
    load_model,
    load_parameters,
    load_weights,
    model_for_training,
    note_other_schedule,
    run_evaluations,
    unsharded,
    with_ranks,
)

__all__ = [
    "ARCHITECTURE", "FAST", "INFERENCE_KINDS", "KINDS", "SCRIPTS_OWN", "SPEEDRUN", "as_kind", "build_model",
    "fill", "find_for_inference", "is_dense", "load", "load_for_inference", "load_model", "load_parameters",
    "load_weights", "meta_of", "model_for_training", "note_other_schedule", "run_evaluations", "unsharded",
    "with_ranks",
]
