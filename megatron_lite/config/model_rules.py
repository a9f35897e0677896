"""Rules of the model section."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.nearest import (
    Rule,
    around,
    divides_either_way,
    divisors,
    fixes,
    multiples_around,
)
from megatron_lite.config.problems import Problem
from megatron_lite.config.values import Values


def heads_divide_hidden(v: Values) -> Iterator[Problem]:
    hidden, heads = v["model.hidden_size"], v["model.num_heads"]
    gpt2 = v["model.family"] == "gpt2"
    if v.given("model.head_dim") and not gpt2:
        return
    if hidden % heads:
        unit = heads if gpt2 else 2 * heads  # rotary pairs the halves of a head
        rule = f"must be divisible by model.num_heads = {heads}"
        remedy = "" if gpt2 else "or give model.head_dim"
        yield Problem(
            "model.hidden_size", hidden, rule, remedy, fixes("model.hidden_size", multiples_around(hidden, unit))
        )
    elif gpt2 and v["model.head_dim"] != hidden // heads:
        rule = f"must be hidden_size / num_heads = {hidden} / {heads} for gpt2"
        yield Problem("model.head_dim", v["model.head_dim"], rule, "", fixes("model.head_dim", [hidden // heads]))


def head_dim_is_even(v: Values) -> Iterator[Problem]:
    head_dim = v["model.head_dim"]
    if v["model.family"] == "gpt2" or head_dim % 2 == 0:
        return
    if not v.given("model.head_dim") and v["model.hidden_size"] % v["model.num_heads"]:
        return  # a default that rests on a division that does not come out; that rule speaks
    rule = "must be even, because rotary positions pair the two halves of a head"
    yield Problem("model.head_dim", head_dim, rule, "", fixes("model.head_dim", multiples_around(head_dim, 2)))


def kv_heads_divide_heads(v: Values) -> Iterator[Problem]:
    heads, kv_heads = v["model.num_heads"], v["model.num_kv_heads"]
    key = "model.num_kv_heads"
    if v["model.family"] == "gpt2":
        if kv_heads != heads:
            rule = f"must equal model.num_heads = {heads}: GPT-2 has no grouped-query attention"
            yield Problem(key, kv_heads, rule, "", fixes(key, [heads]))
    elif heads % kv_heads:
        legal = [n for n in divisors(heads) if divides_either_way(n, v["parallel.tp"])] or divisors(heads)
        rule = f"must divide model.num_heads = {heads}, so that each group of query heads shares one"
        yield Problem(key, kv_heads, rule, "", fixes(key, around(kv_heads, legal)))


def rope_scaling_fits(v: Values) -> Iterator[Problem]:
    scaling, key = v["model.rope_scaling"], "model.rope_scaling"
    if scaling is None:
        return
    if v["model.family"] == "gpt2":
        rule = "must be null for gpt2, which has learned positions and no rotary ones"
        yield Problem(key, scaling.model_dump(), rule, "", fixes(key, [None]))
    elif scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        rule = f"must be less than {key}.high_freq_factor = {scaling.high_freq_factor}"
        legal = [min(1.0, scaling.high_freq_factor / 2)]
        low = f"{key}.low_freq_factor"
        yield Problem(low, scaling.low_freq_factor, rule, "", fixes(low, legal))
    elif scaling.type == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        rule = f"must be less than {key}.beta_fast = {scaling.beta_fast}"
        slow = f"{key}.beta_slow"
        yield Problem(slow, scaling.beta_slow, rule, "", fixes(slow, [min(1.0, scaling.beta_fast / 2)]))
    elif scaling.type in ("yarn", "ntk") and v["model.rope_theta"] <= 1:
        rule = f"must be more than 1, the base of powers from which {scaling.type} works"
        yield Problem("model.rope_theta", v["model.rope_theta"], rule, "", fixes("model.rope_theta", [10000.0]))


def activation_fits(v: Values) -> Iterator[Problem]:
    family, key = v["model.family"], "model.activation"
    legal = ["gelu", "gelu_erf"] if family == "gpt2" else ["swiglu", "geglu", "reglu"]
    if v[key] not in legal:
        rule = f"must be {' or '.join(legal)} for {family}, whose feed-forward block has " + (
            "one projection upwards" if family == "gpt2" else "a gate"
        )
        yield Problem(key, v[key], rule, "", fixes(key, legal))


def sliding_window_fits(v: Values) -> Iterator[Problem]:
    window, first = v["model.sliding_window"], v["model.sliding_window_from"]
    family, num_layers = v["model.family"], v["model.num_layers"]
    key, from_key = "model.sliding_window", "model.sliding_window_from"
    if window is not None and family not in ("mistral", "qwen2"):
        rule = f"must be null for {family}, in which every token sees all tokens before it"
        mends = fixes(key, [None]) + (fixes("model.family", ["mistral"]) if family == "llama" else ())
        yield Problem(key, window, rule, "", mends)
    elif first and (window is None or family != "qwen2"):
        why = "qwen2 alone has layers with and without one" if window else f"there is no {key}"
        yield Problem(from_key, first, f"must be 0, because {why}", "", fixes(from_key, [0]))
    elif first >= num_layers:
        rule = f"must be less than model.num_layers = {num_layers}, so that a layer has the window"
        yield Problem(from_key, first, rule, f"or set {key}=null", fixes(from_key, [num_layers - 1]))


RULES: tuple[Rule, ...] = (
    heads_divide_hidden,
    head_dim_is_even,
    kv_heads_divide_heads,
    rope_scaling_fits,
    activation_fits,
    sliding_window_fits,
)
