"""How fast `megatron-lite data` is beside `tokenizers` itself, which encodes the same texts in memory on all cores.

    python -m benchmarks.tokenizing                      # the sources of Python's standard library as JSON lines
    python -m benchmarks.tokenizing --megabytes 200 --rounds 5 --compression gz

Ours reads files, parses JSON, hashes texts into splits, encodes, and writes token files and their index to disk. The
peer is one `encode_batch_fast` of the same texts with the same tokenizer, and nothing else: its ids are not even
made into a list. The two take turns. The ratio is that of their speeds: 1 means that all the rest costs nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from megatron_lite.data.documents import python_standard_library_files
from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.data.tokenizer_training import train_tokenizer


def texts_of_size(num_bytes: int) -> list[str]:
    """Documents of at least `num_bytes` in all; what comes again is marked, so that no two are the same."""
    files = [path.read_text(encoding="utf-8") for path in python_standard_library_files()]
    files = [text for text in files if text]
    texts: list[str] = []
    size, turn = 0, 0
    while size < num_bytes:
        for text in files:
            texts.append(f"# {turn}\n{text}" if turn else text)
            size += len(text.encode())
            if size >= num_bytes:
                break
        turn += 1
    return texts


def write_lines(folder: Path, texts: list[str], compression: str) -> Path:
    path = folder / ("corpus.jsonl" + (f".{compression}" if compression else ""))
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if compression == "gz":
        content = gzip.compress(content, 6)
    elif compression == "zst":
        import zstandard

        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def time_peer(tokenizer: Tokenizer, texts: list[str]) -> float:
    start = time.perf_counter()
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.perf_counter() - start
    assert len(encodings) == len(texts)
    return seconds


def time_ours(path: Path, out: Path, tokenizer: Path) -> tuple[float, int]:
    """(seconds, tokens)"""
    start = time.perf_counter()
    summary = prepare_corpus([path], out, tokenizer=tokenizer, overwrite=True, progress=False)
    seconds = time.perf_counter() - start
    os.remove(out / "meta.json")  # or the next round finds that there is nothing to do
    return seconds, sum(split.tokens for split in summary.splits)


def measure(megabytes: float, rounds: int, vocab_size: int, compression: str) -> float:
    """Prints the rounds; returns the median of the ratios of speeds, ours / peer."""
    texts = texts_of_size(int(megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(texts[:300], vocab_size).save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        path = write_lines(folder, texts, compression)
        print(f"{size / 1e6:.1f} MB of text in {len(texts):,} documents, {path.name}, {os.cpu_count()} cores")
        ratios = []
        for number in range(rounds + 1):
            peer = time_peer(tokenizer, texts)
            ours, num_tokens = time_ours(path, folder / "out", folder / "tokenizer.json")
            label = f"round {number}" if number else "warm-up"
            speeds = size / peer / 1e6, size / ours / 1e6
            print(f"{label}: tokenizers {speeds[0]:.2f} MB/s, ours {speeds[1]:.2f} MB/s, ratio {peer / ours:.3f}")
            if number:
                ratios.append(peer / ours)
        print(f"{num_tokens:,} tokens, {num_tokens / ours / 1e6:.2f} M tokens/s in the last round")
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50.0, help="size of the text (default: 50)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after a warm-up (default: 5)")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of the byte-level BPE (default: 32000)")
    parser.add_argument(
        "--compression", choices=("", "gz", "zst"), default="", help="of the JSON lines (default: none)"
    )
    parser.add_argument("--at-least", type=float, help="end with code 1 if the median ratio is lower")
    arguments = parser.parse_args()
    ratio = measure(arguments.megabytes, arguments.rounds, arguments.vocab_size, arguments.compression)
    print(f"median ratio: {ratio:.3f} (speed of ours / that of tokenizers' encode_batch_fast)")
    if arguments.at_least is not None and ratio < arguments.at_least:
        sys.exit(f"below {arguments.at_least}")


if __name__ == "__main__":
    main()
