"""What is where in the folder of a run: the names that training writes and reports and conversion read."""

from __future__ import annotations

LOCK = ".lock"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
UTILISATION = "utilisation.json"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
PICTURE = "loss.svg"
PIPELINE = "pipeline.json"
PIPELINE_TRACE = "pipeline.trace.json"
LAYER_COSTS = "layer_costs.json"
REPORT = "report.html"
