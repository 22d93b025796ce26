"""Name the tensors of a VGGT checkpoint that this package's network has no part for."""

from __future__ import annotations

from collections import Counter

from retrofit.architectures.recognition import TRACK_HEAD, is_read_past
from retrofit.checkpoints import Checkpoint
from retrofit.checkpoints.weights import find_weights, read_header


def tensors_read_past(checkpoint: Checkpoint) -> list[str]:
    """Tensors that loading leaves in the files, by name.

    Where no weights are at hand (a hub id of which only configs were fetched), `track_head.*`
    stands for those of a VGGT that was trained with a tracker.
    """
    library, class_name = checkpoint.classes.get("", ("", ""))
    if library != "retrofit":
        return []
    config = checkpoint.config("")
    files = [checkpoint.file] if checkpoint.file else find_weights(checkpoint.root)
    if files:
        names = [name for file in files for name in read_header(file)]
        return sorted(name for name in names if is_read_past(class_name, config, name))
    trained = class_name == "VGGT" and "aggregator" not in config
    return [f"{TRACK_HEAD}.*"] if trained and config.get("enable_track", True) else []


def summarise(names: list[str]) -> str:
    """`track_head.* (212 tensors)` for each part, `track_head.*` where they were not counted."""
    counts = Counter(name.split(".")[0] for name in names if not name.endswith(".*"))
    known = [f"{part}.* ({number} tensors)" for part, number in counts.items()]
    return ", ".join(known + [name for name in names if name.endswith(".*")])
