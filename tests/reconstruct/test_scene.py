"""From a network's output to a scene, and the memory that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from retrofit.architectures.vggt import VGGT
from retrofit.patching.patch import patch
from retrofit.reconstruct import Reconstructor, Settings
from retrofit.reconstruct.memory import MemoryModel
from retrofit.reconstruct.scene import fit_intrinsics, to_scene
from retrofit.runtime.errors import NonFiniteError, UnsupportedError
from tests.architectures.small_networks import VGGT_CONFIG, small_vggt
from tests.reconstruct.conftest import seeing_vggt


def test_focal_lengths_are_those_that_the_points_were_seen_with() -> None:
    generator = torch.Generator().manual_seed(3)
    depth = 1 + torch.rand(2, 21, 35, generator=generator)
    u, v = torch.arange(35) - 17.5, (torch.arange(21) - 10.5)[:, None]
    local = torch.stack([u / 30 * depth, v / 26 * depth, depth], dim=-1)
    found = fit_intrinsics(local, torch.rand(depth.shape, generator=generator))
    expected = torch.tensor([[30, 0, 17.5], [0, 26, 10.5], [0, 0, 1]])
    assert torch.allclose(found, expected.expand(2, 3, 3), atol=1e-3)


def test_a_network_without_a_depth_head_is_refused() -> None:
    model = small_vggt(depth_head=None)
    images = torch.rand(2, 3, 56, 56)
    with pytest.raises(UnsupportedError, match="a camera and a depth head"):
        to_scene(model(images), images, [])


def test_nan_stops_with_the_name_of_what_holds_it() -> None:
    model = seeing_vggt()
    images = torch.rand(2, 3, 56, 56)
    predictions = model(images)
    predictions["depth"][0, 1, 3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity in depth"):
        to_scene(predictions, images, [])


def test_progress_counts_every_block_of_the_network(networks, photos) -> None:
    told: list[tuple[str, int, int]] = []
    reconstructor = Reconstructor(networks["vggt"], settings=Settings(size=56))
    files = sorted(photos.iterdir())
    reconstructor.run(files, progress=lambda *step: told.append(step))
    steps = [step for step in told if step[0] == "reconstructing"]
    blocks = 2 * VGGT_CONFIG["aggregator"]["depth"] + VGGT_CONFIG["dino"]["depth"]
    assert steps == [("reconstructing", i, blocks) for i in range(blocks + 1)]


def test_half_precisions_are_computed_in_float32_on_a_cpu_unless_asked_for(
    networks, photos, tmp_path
) -> None:
    seeing_vggt().bfloat16().save_pretrained(tmp_path / "half")
    files = sorted(photos.iterdir())[:2]
    kept = Reconstructor(tmp_path / "half", settings=Settings(size=56, dtype="bfloat16"))
    raised = Reconstructor(tmp_path / "half", settings=Settings(size=56))
    for reconstructor, expected in ((kept, torch.bfloat16), (raised, torch.float32)):
        reconstructor.run(files, check_memory=False)
        assert reconstructor.open().aggregator.camera_token.dtype == expected


def test_offloading_gives_the_same_scene(networks, photos) -> None:
    files = sorted(photos.iterdir())
    scenes = [
        Reconstructor(networks["vggt"], settings=Settings(size=56, offload=offload)).run(files)
        for offload in (False, True)
    ]
    assert torch.equal(scenes[0].scene.points, scenes[1].scene.points)


CONFIG = {
    "aggregator": {"embed_dim": 256, "depth": 3, "num_heads": 4, "patch_embed": "conv"},
    "camera_head": {"trunk_depth": 1},
    "depth_head": {"features": 64, "intermediate_layer_idx": [0, 1, 1, 2]},
}
MEASURE = """
import sys
import torch
from retrofit.architectures.vggt import VGGT
from retrofit.patching.patch import patch
from retrofit.runtime.memory import peak_memory, restart_peak
from tests.reconstruct.test_scene import CONFIG, SETTINGS, SIZE, VIEWS
torch.set_num_threads(1)
before = 0
with torch.inference_mode():
    VGGT.from_config(CONFIG)(torch.rand(1, 1, 3, 28, 28))  # libraries and their workspaces
    restart_peak()
    before = peak_memory()
    model = VGGT.from_config(CONFIG).eval()
    if len(sys.argv) > 1:
        patch(model, "block-sparse", **SETTINGS[sys.argv[1]])
    model(torch.rand(1, VIEWS, 3, *SIZE))
print(peak_memory() - before)
"""
VIEWS, SIZE = 12, (196, 252)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"keep": 0.25},
    "means": {"keep": 0.25, "order": "tiles", "borders": "tiles", "dropped": "mean"}
    | {"selection": "error", "block_size": (16, 16)},
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to restart the mark")
@pytest.mark.parametrize("patched", [[], ["plain"], ["means"]], ids=lambda names: "".join(names))
def test_the_predicted_peak_is_right_within_15_percent(patched: list[str]) -> None:
    def prepare(network: Any) -> None:
        for name in patched:
            patch(network, "block-sparse", **SETTINGS[name])

    predicted = MemoryModel(lambda: VGGT.from_config(CONFIG), SIZE, prepare=prepare).need(VIEWS)
    # every tensor goes back to the system when it is freed, as larger ones always do
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, *patched]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    assert measured > 100e6  # large enough that the allocator's own slack is small
    assert abs(predicted - measured) < 0.15 * measured, (predicted, measured)


def test_as_many_views_fit_as_are_said_to() -> None:
    model = MemoryModel(lambda: VGGT.from_config(VGGT_CONFIG), (56, 70))
    available = 30_000_000
    fitting = model.fitting(available)
    assert model.need(fitting) <= available < model.need(round(1.1 * fitting) + 2)
    assert model.fitting(1000) == 0


def test_heads_in_smaller_chunks_need_less() -> None:
    needs = [
        MemoryModel(lambda: VGGT.from_config(VGGT_CONFIG), (112, 112), frames_per_chunk=n).need(16)
        for n in (2, 16)
    ]
    assert needs[0] < needs[1]
