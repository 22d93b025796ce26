"""README.md of an export: what it is, how it runs, what was measured."""

from __future__ import annotations

from typing import Any

RUNS = {
    "pt2": """```py
import torch{imports}

module = torch.export.load("{file}").module()
outputs = module({arguments})  # a tuple of tensors
```""",
    "onnx": """```py
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
outputs = session.run(None, {{{arguments}}})
```""",
}

PADDED = """
Hidden tokens are never read. A shorter text is cut into blocks or windows by the padded length, as
in every graph, where the patched network in Python goes by its own length: pad little.
"""


def make_card(record: dict[str, Any], file: str) -> str:
    """The text."""
    methods = record["recipe"].get("method") or " + ".join(
        rule["method"] for rule in record["recipe"]["rules"]
    )
    imports = "" if record["portable"] else "\nimport retrofit.kernels  # its operators"
    named = record.get("names") or {name: name for name in record["inputs"]}
    sign = ": " if record["format"] == "onnx" else "="
    quote = '"' if record["format"] == "onnx" else ""
    arguments = ", ".join(f"{quote}{name}{quote}{sign}{name}" for name in named)
    run = RUNS[record["format"]].format(file=file, imports=imports, arguments=arguments)
    inputs = "\n".join(
        f"| `{name}` | {entry['shape']} | {entry['dtype']} |"
        for name, entry in record["inputs"].items()
    )
    work, seconds = record["work"], record["seconds"]
    needs = "PyTorch" if record["format"] == "pt2" else "ONNX Runtime"
    if not record["portable"]:
        needs += " and `retrofit-attention`"
    padded = PADDED if "attention_mask" in record["inputs"] else ""
    exported = f"{work['exported']:.3g}" if "exported" in work else ""
    rows = " and any number of rows" if record["dynamic"] else ""
    return f"""# {record["source"]} with {methods}

`{file}` holds the network of `{record["source"]}` (family {record["family"]}) with its attention
replaced by {methods}. It needs {needs}, and takes inputs of this size{rows}:

| input | shape | dtype |
|---|---|---|
{inputs}
{padded}
{run}

| | in Python | as exported |
|---|---|---|
| dense, seconds | {seconds["dense"]:.3g} | {seconds["exported_dense"]:.3g} |
| patched, seconds | {seconds["patched"]:.3g} | {seconds["exported"]:.3g} |
| dense, floating-point operations | {work["dense"]:.3g} | |
| patched, floating-point operations | {work["ideal"]:.3g} | {exported} |

Its output on the probe (`probe.safetensors`) is {record["verified"]["difference"]:.1e} of the
largest value away from the patched network's, which is {record["difference_from_dense"]:.2g} away
from dense (random input: a fingerprint, which says nothing of quality).
"""
