"""The check of an export: transformers, on the folder that was written, computes what our model does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.func import functional_call

from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.transformer import Transformer

NUM_SEQUENCES, MAX_TOKENS = 2, 96
# Both sides compute in float32, from weights that are rounded to the dtype of the files, so that this dtype makes no
# difference between them. What does is the order in which each of them adds and rounds. How much that is for these
# weights and tokens our own forward pass shows: its float32 logits against its float64 ones. transformers' float32
# logits are as far from the float64 ones: 0.8 to 1.2 times over families, 4 to 32 layers, weights of usual and of five
# times the usual size. 8 times leaves room for other orders; a rotary base that is 10% off, or a window that is off by
# one, differs by hundreds of times. The floor is for models that are so small that they hardly round: one unit in the
# last place of the largest logit.
ROOM, FLOOR = 8.0, 2.0**-23
BYTES_PER_WEIGHT = 4
# Where tokenizers split differently: contractions, numbers, spaces, line ends, accents (composed or not), scripts.
SAMPLE_TEXT = (
    "It's 2026,  and they'LL see 12345.67 cats\n\n  on\tmats! "
    "na\u00efve nai\u0308ve \u65e5\u672c\u8a9e \U0001f600 <|x|>\r\n"
)


def import_transformers() -> Any:
    """The package. Raises CheckpointError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "an export is checked against transformers, and that is not installed: install it with "
            "`pip install 'megatron-lite[transformers]'`, or add --no-check to export unchecked"
        ) from error
    return transformers


def refuse_too_large(model: ModelConfig) -> None:
    """Raises CheckpointError if transformers could not hold the model in float32 in the memory that is free."""
    needed, free = parameter_table(model).num_parameters * BYTES_PER_WEIGHT, _available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"the check of the export runs the model in transformers in float32, which takes {needed / 1e9:,.0f} GB, "
            f"and {free / 1e9:,.0f} GB of memory are free: export on a larger machine, or add --no-check"
        )


class OwnForward:
    """Our logits for a few random sequences, computed layer by layer while the weights go by.

    Holds one layer (and the embedding, where the head is tied to it), in float32 and in float64, never the model.

    dtype: that the weights are rounded to before they are used. ``logits`` after the last weight: float64
    ``[NUM_SEQUENCES, tokens, V]``. ``noise``: the largest difference of the float32 logits from those, absolute.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        self.model = with_short_window(model)
        self.has_shorter_window = self.model.sliding_window != model.sliding_window
        self.ids = random_ids(model)
        self._dtype = dtype
        with torch.device("meta"):
            self._stage = Transformer(self.model, KernelsConfig())
        self._x = {torch.float32: self.ids, torch.float64: self.ids}
        self._part, self._values = "embedding", dict[str, Tensor]()
        self._embedding: Tensor | None = None

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hands on (global name, whole parameter), which come in the order of the table, and computes with them."""
        for name, whole in tensors:
            part = _part_of(name)
            if part != self._part:
                self._run()
                self._part, self._values = part, {}
            self._values[name.removeprefix(f"{part}.")] = whole.detach().to("cpu", self._dtype)
            yield name, whole

    def finish(self) -> tuple[Tensor, float]:
        """(``logits``, ``noise``). Raises CheckpointError if the logits are not all finite."""
        self._run()
        if self.model.tie_embeddings:
            assert self._embedding is not None
            self._part, self._values = "head", {"weight": self._embedding}
            self._run()
        logits, rough = self._x[torch.float64], self._x[torch.float32].double()
        if not bool(logits.isfinite().all()):
            raise CheckpointError(
                "the model's own logits are not finite: its weights are too large to compute with; export an earlier "
                "checkpoint of the run"
            )
        return logits, float((rough - logits).abs().max())

    @torch.no_grad()
    def _run(self) -> None:
        """Takes the activations through the part whose weights are there."""
        if self._part == "embedding" and self.model.tie_embeddings:
            self._embedding = self._values["tokens.weight"]
        module = self._stage.get_submodule(self._part)
        for dtype, x in self._x.items():
            weights = {name: value.to(dtype) for name, value in self._values.items()}
            if self._part == "head":
                self._x[dtype] = (x @ weights["weight"].t()).view(*self.ids.shape, -1)
                continue
            needs = () if self._part == "final_norm" else (self._sequences(dtype),)
            self._x[dtype] = functional_call(module, weights, (x, *needs))

    def _sequences(self, dtype: torch.dtype) -> Any:
        batch_size, seq_len = self.ids.shape
        return self._stage.sequences(batch_size, seq_len, None, None, torch.empty((), dtype=dtype))


@dataclass(frozen=True)
class Checked:
    """What transformers made of an export.

    difference: the largest of its logits from ours, relative to the largest logit. reads_tokenizer: whether
    AutoTokenizer encodes text as the tokenizer's file does; True without a tokenizer.
    """

    difference: float
    reads_tokenizer: bool


def compare(folder: Path, own: OwnForward) -> Checked:
    """Lets transformers compute with the export in ``folder`` what our model has computed.

    Raises CheckpointError if that is more than rounding explains, or if transformers does not load the folder.
    """
    expected, noise = own.finish()
    found = _their_logits(folder, own).double()
    if found.shape != expected.shape:
        raise CheckpointError(
            f"transformers computes logits of shape {list(found.shape)} from the export, this model "
            f"{list(expected.shape)}; please report it"
        )
    largest = float(expected.abs().max())
    bound = ROOM * max(noise, FLOOR * largest)
    difference = float((found - expected).abs().max())
    if not difference <= bound:  # a NaN is no agreement
        raise CheckpointError(
            "transformers computes another function from the export than this model does: on random tokens the "
            f"logits, of at most {largest:.3g}, differ by {difference:.3g}, where rounding explains {bound:.3g}. "
            "Nothing was exported; this is a defect of the export or of the installed transformers: please report it"
        )
    return Checked(difference / max(largest, torch.finfo(torch.float64).tiny), _reads_tokenizer(folder))


def with_short_window(model: ModelConfig) -> ModelConfig:
    """The model with a sliding window that the sequences of the check are longer than, where it has one."""
    if model.sliding_window is None:
        return model
    return model.model_copy(update={"sliding_window": min(model.sliding_window, max(1, _num_tokens(model) // 2))})


def random_ids(model: ModelConfig) -> Tensor:
    """int64 ``[NUM_SEQUENCES, tokens]``, always the same for a model."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (NUM_SEQUENCES, _num_tokens(model)), generator=generator)


def _num_tokens(model: ModelConfig) -> int:
    return min(MAX_TOKENS, model.max_seq_len)


def _part_of(name: str) -> str:
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def _their_logits(folder: Path, own: OwnForward) -> Tensor:
    transformers = import_transformers()
    try:
        with _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            if own.has_shorter_window:
                config.sliding_window = own.model.sliding_window
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=True,
            )
            wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind.endswith("_keys")}
            if wrong:
                raise ValueError(f"it loads with {wrong}")
            with torch.no_grad():
                logits: Tensor = model.eval()(own.ids, use_cache=False).logits
            return logits
    except Exception as error:  # whatever a library raises on files that it cannot use
        raise CheckpointError(f"transformers {transformers.__version__} cannot run the export: {error}") from error


def _reads_tokenizer(folder: Path) -> bool:
    """Not for every tokenizer: transformers 5 takes the text rules of Qwen's tokenizer for every qwen2 model."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return True
    transformers = import_transformers()
    try:
        with _quiet(transformers):
            auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            found = auto(SAMPLE_TEXT, add_special_tokens=False)["input_ids"]
    except Exception:  # whatever a library raises on a tokenizer that it cannot use
        return False
    return bool(found == Tokenizer.from_file(str(file)).encode(SAMPLE_TEXT, add_special_tokens=False).ids)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    logging = transformers.utils.logging
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _available_bytes() -> int | None:
    """Memory that a process can still have, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
