"""A language model's prefill, dense and patched: seconds, perplexity and next tokens, interleaved.

    python -m benchmarks.language_models MODEL --tokens 2048,8192 --dtype bfloat16,float32
    python -m benchmarks.language_models MODEL --text book.txt --method exact --json

MODEL is a folder of transformers. Without `--text` the prose is Python's own help topics and the
descriptions of installed packages. Perplexity is that of the model's own next tokens, logits taken
a few hundred tokens at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import retrofit
from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.libraries import open_tokenizer
from retrofit.checkpoints.opening import load_networks
from retrofit.evaluate.samples import collect_documents
from retrofit.runtime.machine import processor_name

ROWS = 256  # of logits at once


def long_ids(model: Path, text: Path | None, length: int) -> Tensor:
    """The first tokens of a long text, `[1, length]`."""
    tokenizer = open_tokenizer(model)
    if text is not None:
        prose = text.read_text(encoding="utf-8")
    else:
        documents = collect_documents(lambda piece: len(piece) > 2500, 40 + length // 250)
        prose = "\n\n".join(piece for _, piece in documents)
    ids = tokenizer(prose, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < length:
        raise SystemExit(f"expected {length} tokens of text, got {ids.shape[1]}; give --text")
    return ids[:, :length]


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> tuple[float, Tensor]:
    """Seconds of the network without its head, and its hidden states."""
    started = time.perf_counter()
    hidden = model.model(input_ids=ids, use_cache=True).last_hidden_state
    return time.perf_counter() - started, hidden


@torch.no_grad()
def judge(model: Any, hidden: Tensor, ids: Tensor) -> tuple[float, Tensor]:
    """Perplexity of the next tokens, and the likeliest of each."""
    total, likeliest = 0.0, []
    targets = ids[0, 1:]
    for states, wanted in zip(hidden[0, :-1].split(ROWS), targets.split(ROWS), strict=True):
        logits = model.lm_head(states).float()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        likeliest.append(logits.argmax(-1))
    return float(torch.tensor(total / len(targets)).exp()), torch.cat(likeliest)


def measure(model: Any, ids: Tensor, method: str, rounds: int) -> dict[str, Any]:
    """Medians of interleaved runs after one to warm up, and what the output is worth."""
    seconds: dict[str, list[float]] = {"dense": [], method: []}
    outputs = {}
    for i in range(rounds + 1):
        for name in seconds:
            patch = None if name == "dense" else retrofit.patch(model, name)
            taken, outputs[name] = prefill(model, ids)
            if patch is not None:
                patch.remove()
            if i:
                seconds[name].append(taken)
    (dense, before), (patched, after) = (judge(model, outputs[name], ids) for name in seconds)
    ratios = [a / b for a, b in zip(seconds["dense"], seconds[method], strict=True)]
    return {
        "tokens": ids.shape[1],
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "speed": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "perplexity": {"dense": dense, method: patched},
        "same_next_token": float((before == after).double().mean()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", default="exact")
    parser.add_argument("--tokens", default="2048")
    parser.add_argument("--dtype", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for dtype in arguments.dtype.split(","):
        checkpoint = find_checkpoint(str(arguments.model))
        model = load_networks(checkpoint, [""], device="cpu", dtype=dtype)
        for length in map(int, arguments.tokens.split(",")):
            ids = long_ids(arguments.model, arguments.text, length)
            line = {"dtype": dtype, **measure(model, ids, arguments.method, arguments.rounds)}
            lines.append(line)
            speed, perplexity = line["speed"], line["perplexity"]
            if not arguments.json:
                print(
                    f"{dtype} {length} tokens: {speed['median']:.2f}x ({speed['least']:.2f} to "
                    f"{speed['most']:.2f}), {line['seconds']['dense']:.2f} s dense; perplexity "
                    f"{perplexity['dense']:.3f} -> {perplexity[arguments.method]:.3f}; "
                    f"{line['same_next_token']:.1%} of next tokens stay",
                    flush=True,
                )
    if arguments.json:
        print(
            json.dumps({"processor": processor_name(), "method": arguments.method, "lines": lines})
        )


if __name__ == "__main__":
    main()
