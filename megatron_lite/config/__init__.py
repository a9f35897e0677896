"""What a run is: the schema, the rules across keys, and reading it from files and the command line."""

from __future__ import annotations

from megatron_lite.config.keys import KeyHelp, key_help
from megatron_lite.config.load import load_config, to_yaml, with_world
from megatron_lite.config.problems import ConfigError, Problem
from megatron_lite.config.schema import (
    CheckpointConfig,
    DataConfig,
    InitConfig,
    KernelsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RopeScaling,
    RunConfig,
    RunSettings,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "InitConfig",
    "KernelsConfig",
    "KeyHelp",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Problem",
    "RopeScaling",
    "RunConfig",
    "RunSettings",
    "TrainConfig",
    "key_help",
    "load_config",
    "to_yaml",
    "with_world",
]
