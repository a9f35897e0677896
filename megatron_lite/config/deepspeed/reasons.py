"""DeepSpeed's keys that have no effect here, with the reason that a user is told."""

from __future__ import annotations

from collections.abc import Mapping

_BUCKETS = "a bucket is a unit (the embedding, a layer, the head), whatever its size"
_GATHERING = "parameters are gathered unit by unit, the next one ahead of use"
_EXACT = "what is sent is not quantised here: the same mathematics, more exactly, in more bytes"

ZERO: Mapping[str, str] = {
    "allgather_partitions": "parameters are gathered by all-gather, always",
    "allgather_bucket_size": _BUCKETS,
    "reduce_bucket_size": _BUCKETS,
    "reduce_scatter": "gradients are reduced by exchanging slices, always",
    "use_multi_rank_bucket_allreduce": "gradients are reduced by exchanging slices, always",
    "overlap_comm": "communication overlaps with backward, always, and changes no bit",
    "contiguous_gradients": "gradients live in flat buckets, always",
    "sub_group_size": "the optimizer's step goes bucket by bucket",
    "load_from_fp32_weights": "a checkpoint holds fp32 master weights",
    "elastic_checkpoint": "a checkpoint holds global tensors, which any layout loads",
    "prefetch_bucket_size": _GATHERING,
    "stage3_prefetch_bucket_size": _GATHERING,
    "param_persistence_threshold": _GATHERING,
    "stage3_param_persistence_threshold": _GATHERING,
    "model_persistence_threshold": _GATHERING,
    "stage3_model_persistence_threshold": _GATHERING,
    "max_live_parameters": _GATHERING + "; parallel.gather_policy says how long they stay",
    "stage3_max_live_parameters": _GATHERING + "; parallel.gather_policy says how long they stay",
    "max_reuse_distance": _GATHERING + "; parallel.gather_policy says how long they stay",
    "stage3_max_reuse_distance": _GATHERING + "; parallel.gather_policy says how long they stay",
    "module_granularity_threshold": _GATHERING,
    "stage3_module_granularity_threshold": _GATHERING,
    "use_all_reduce_for_fetch_params": _GATHERING,
    "stage3_use_all_reduce_for_fetch_params": _GATHERING,
    "allgather_sequential": _GATHERING,
    "stage3_allgather_sequential": _GATHERING,
    "gather_16bit_weights_on_model_save": "`megatron-lite convert` writes whole weights from any checkpoint",
    "stage3_gather_16bit_weights_on_model_save": "`megatron-lite convert` writes whole weights from any checkpoint",
    "stage3_gather_fp16_weights_on_model_save": "`megatron-lite convert` writes whole weights from any checkpoint",
    "ignore_unused_parameters": "every parameter of a model here is used",
    "legacy_stage1": "there is one implementation of all stages",
    "round_robin_gradients": "a rank's slice of each bucket is fixed",
    "grad_hooks": "gradients are reduced as soon as a bucket has all of them, always",
    "zero_quantized_weights": _EXACT,
    "zero_quantized_nontrainable_weights": "every parameter is trained",
    "zero_quantized_gradients": _EXACT,
    "zeropp_loco_param": _EXACT,
    "mics_hierarchical_params_gather": "parallel.zero_group is gathered in one collective",
    "memory_efficient_linear": "parallel.recompute says what backward keeps",
    "pipeline_loading_checkpoint": "any layout loads any checkpoint",
    "override_module_apply": "weights are made from the seed and their names, slice by slice",
    "log_trace_cache_warnings": "nothing is traced",
    "enable_sanity_checks": "the order of communication is proven before the run (`megatron-lite check`)",
    "save_muon_momentum_buffer_in_memory": "offload.optimizer says where the optimizer's state is kept",
    "leaf_module": "units are the embedding, a layer, the head",
}

OFFLOAD: Mapping[str, str] = {
    "pin_memory": "memory that is copied to and from a GPU is pinned, always",
    "buffer_count": "reads go one bucket ahead, writes one behind",
    "buffer_size": "a buffer holds one bucket",
    "max_in_cpu": "what is offloaded to nvme is kept there, but for the buckets in use",
    "pipeline_read": "reads go one bucket ahead, always",
    "pipeline_write": "writes go one bucket behind, always",
    "fast_init": "the files are written once, at the start",
    "ratio": "the whole state is offloaded, or nothing",
    "super_offload": "copies overlap with the optimizer's step, always",
    "cpuadam_cores_perc": "train.threads says how many cores a process uses",
}

_LOGGED = "metrics.jsonl has each step's times, tokens per second and memory"
TOP: Mapping[str, str] = {
    "steps_per_print": "train.log_interval says how often a line is printed",
    "wall_clock_breakdown": _LOGGED,
    "memory_breakdown": _LOGGED,
    "dump_state": "the run's folder has its whole config",
    "log_level": "there is one level",
    "prescale_gradients": "a gradient is divided once, by the tokens of the whole batch",
    "gradient_predivide_factor": "a gradient is divided once, by the tokens of the whole batch",
    "sparse_gradients": "the embedding's gradient is dense",
    "disable_allgather": "parameters are gathered by all-gather, always",
    "seq_parallel_communication_data_type": "activations are sent in train.precision",
    "seq_parallel_comm_data_type": "activations are sent in train.precision",
    "zero_allow_untested_optimizer": "every optimizer here works with every stage",
    "zero_force_ds_cpu_optimizer": "there is one optimizer, on the device where its state is",
    "graph_harvesting": "no graph of the step is captured",
    "managed_gradient_accumulation": "gradients are accumulated by the run, always",
    "vocabulary_size": "model.vocab_size says it",
    "dataloader_drop_last": "every step has a whole batch",
    "use_data_before_expert_parallelism": "there are no experts",
    "check_overflow": "in fp16 every step is checked, on all ranks",
    "allgather_size": "a key of the oldest form of zero_optimization",
}

SECTIONS: Mapping[str, str] = {
    "activation_checkpointing": "parallel.recompute and parallel.recompute_layers say what is computed again",
    "pipeline": "parallel.pp, schedule, partition and recompute_layers say it",
    "tensor_parallel": "parallel.tp says it",
    "expert_parallel": "there are no experts",
    "aio": "offload to nvme chooses its own block size and depth",
    "flops_profiler": _LOGGED + ", and the share of the peak FLOPS",
    "comms_logger": _LOGGED,
    "timers": _LOGGED,
    "tensorboard": "run.tensorboard says it",
    "wandb": "run.wandb says it",
    "comet": "metrics.jsonl, TensorBoard and wandb are there",
    "csv_monitor": "metrics.jsonl has the same numbers",
    "monitor_config": "metrics.jsonl, TensorBoard and wandb are there",
    "checkpoint": "the checkpoint section says it; any layout loads what any other saved",
    "nebula": "checkpoints are written in the background by the checkpoint section",
    "datastates_ckpt": "checkpoints are written in the background by the checkpoint section",
    "compile": "nothing is compiled here",
    "hybrid_engine": "`megatron-lite generate` makes text",
    "autotuning": "it is a matter of DeepSpeed's launcher",
    "elasticity": "",
    "weight_quantization": "weights are not quantised",
}
"""Objects whose every key is ignored for one reason. elasticity is refused where it is enabled."""

CHANGES: Mapping[str, str] = {
    "amp": "asks for Apex's mixed precision; bf16 and fp16 say it here",
    "torch_autocast": "asks for torch's autocast; bf16 and fp16 say it here",
    "progressive_layer_drop": "leaves out layers at random, which this program does not",
    "curriculum_learning": "changes the length of sequences over time, which this program does not",
    "data_efficiency": "changes the order and the tokens of the data, which this program does not",
    "compression_training": "changes the model, which this program does not",
    "quantize_training": "changes the model, which this program does not",
    "sparse_attention": "changes the model's attention; model.sliding_window is what there is",
    "eigenvalue": "is a part of quantize_training, which this program has not",
    "elasticity": "computes the batch sizes when the job starts; train_batch_size says it here",
}
"""Objects that change what is computed. They are refused where they are enabled, and ignored where they are not."""
