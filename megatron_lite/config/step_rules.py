"""Rules of the steps: batch, learning rate, evaluation, kernels."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.nearest import (
    Rule,
    fixes,
    multiples_around,
)
from megatron_lite.config.problems import Problem, override
from megatron_lite.config.values import Unreadable, Values


def sequence_fits_model(v: Values) -> Iterator[Problem]:
    seq_len, most = v["train.seq_len"], v["model.max_seq_len"]
    if seq_len > most:
        rule = f"must be at most model.max_seq_len = {most}"
        yield Problem("train.seq_len", seq_len, rule, "", fixes("train.seq_len", [most]))


def batch_is_whole_microbatches(v: Values) -> Iterator[Problem]:
    batch, micro = v["train.global_batch_size"], v["train.micro_batch_size"]
    key = "train.global_batch_size"
    try:
        dp = v.dp
        rule = f"must be divisible by train.micro_batch_size * dp = {micro} * {dp} = {micro * dp}"
    except Unreadable:
        dp = 1
        rule = f"must be divisible by train.micro_batch_size = {micro}"
    if batch % (micro * dp):
        yield Problem(key, batch, rule, "", fixes(key, multiples_around(batch, micro * dp)))


def warmup_ends(v: Values) -> Iterator[Problem]:
    warmup, steps, key = v["optim.warmup_steps"], v["train.num_steps"], "optim.warmup_steps"
    if warmup > steps:
        rule = f"must be at most train.num_steps = {steps}"
        yield Problem(key, warmup, rule, "", fixes(key, [steps]))


def decay_fits(v: Values) -> Iterator[Problem]:
    schedule, key = v["optim.schedule"], "optim.decay_steps"
    decay, warmup, steps = v[key], v["optim.warmup_steps"], v["train.num_steps"]
    if warmup > steps or schedule == "constant":
        return
    if schedule == "wsd" and warmup + decay > steps:
        rule = f"with optim.warmup_steps = {warmup} must be at most train.num_steps = {steps}"
        room = steps - warmup
        alternatives = fixes(key, [room]) if room else fixes("optim.warmup_steps", [max(0, steps - decay)])
        if not room and decay > steps:
            alternatives = (alternatives[0] + (override(key, steps),),)
        yield Problem(key, decay, rule, "", alternatives)
    elif schedule != "wsd" and decay < warmup:
        rule = f"must be at least optim.warmup_steps = {warmup}"
        yield Problem(key, decay, rule, "", fixes(key, [warmup]))


def min_lr_below_lr(v: Values) -> Iterator[Problem]:
    lr, min_lr, key = v["optim.lr"], v["optim.min_lr"], "optim.min_lr"
    if min_lr > lr:
        yield Problem(key, min_lr, f"must be at most optim.lr = {lr}", "", fixes(key, [lr]))


def evaluation_has_data(v: Values) -> Iterator[Problem]:
    interval, key, split = v["train.eval_interval"], "train.eval_interval", v["data.split"]
    if interval and not v["data.valid"] and not (split and split[1]):
        rule = "asks for evaluations, but data.valid is empty"
        remedy = "or give data.valid, or a part of data.train by data.split"
        yield Problem(key, interval, rule, remedy, fixes(key, [0]))


def kernel_fits_device(v: Values) -> Iterator[Problem]:
    kernel, device, key = v["kernels.rms_norm"], v["run.device"], "kernels.rms_norm"
    if (kernel, device) in (("cuda", "cpu"), ("cpu", "cuda")):
        rule = f"cannot run with run.device = {device}"
        yield Problem(key, kernel, rule, "", fixes(key, ["auto"]) + fixes("run.device", [kernel]))


RULES: tuple[Rule, ...] = (
    sequence_fits_model,
    batch_is_whole_microbatches,
    warmup_ends,
    decay_fits,
    min_lr_below_lr,
    evaluation_has_data,
    kernel_fits_device,
)
