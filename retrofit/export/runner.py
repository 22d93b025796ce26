"""Run an exported network on its probe, in a process that knows nothing of retrofit.

Run as a file, with nothing but PyTorch or ONNX Runtime: `python runner.py FOLDER`.
Prints one JSON object with the largest difference from the recorded output and the median time.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCKED = ("retrofit", "transformers", "diffusers")
ROUNDS = 5


class Blocker:
    """Makes imports of packages fail that an artefact must not need."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse those packages."""
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked while an export is verified")


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Tensors by path as the mappings they came from."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split("/")
        place = nested
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def open_pt2(folder: Path, record: dict[str, Any]) -> Callable[..., Any]:
    """What runs a graph of `torch.export`."""
    import torch

    if not record["portable"]:
        import retrofit.kernels  # noqa: F401 - registers the operators
    module = torch.export.load(folder / "model.pt2").module()

    def run(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return module(**nest(inputs))

    return run


def open_onnx(folder: Path, record: dict[str, Any]) -> Callable[..., Any]:
    """What runs a graph in ONNX Runtime."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: dict[str, Any]) -> Any:
        arrays = {name: inputs[record["names"][name]].numpy() for name in names}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


def main() -> None:
    """Run it, and say how far it is off and how long it takes."""
    folder = Path(sys.argv[1])
    record = json.loads((folder / "export.json").read_text())
    if record["portable"]:
        sys.meta_path.insert(0, Blocker())
    from safetensors.torch import load_file

    probe = load_file(folder / "probe.safetensors")
    inputs = {n.removeprefix("in."): x for n, x in probe.items() if n.startswith("in.")}
    wanted = [probe[f"out.{i}"] for i in range(sum(n.startswith("out.") for n in probe))]
    run = {"pt2": open_pt2, "onnx": open_onnx}[record["format"]](folder, record)
    found = run(inputs)
    scale = max(float(x.abs().max()) for x in wanted)
    differences = [
        float((a.float() - b.float()).abs().max()) if a.shape == b.shape else float("inf")
        for a, b in zip(found, wanted, strict=True)
    ]
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - started)
    found = {"difference": max(differences) / scale, "seconds": statistics.median(seconds)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
