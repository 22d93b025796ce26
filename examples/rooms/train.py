r"""Train the small VGGT on rooms that are drawn while it trains.

    python examples/rooms/train.py --work runs/rooms --minutes 100
    python examples/rooms/train.py --work runs/rooms --minutes 100 --resume
    python examples/rooms/train.py --work runs/more --minutes 100 --start examples/rooms/model

The work folder holds the training state (written every few minutes) and the log. The result is
`model/` in it: a folder that `VGGT.from_pretrained` loads. The schedule follows the clock, so that
the learning rate reaches its end whatever the machine manages in that time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from losses import camera_loss, depth_loss, place_loss
from render import Views, render_views
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from retrofit.architectures.cameras import decode_pose, encode_pose, unproject_depth
from retrofit.architectures.vggt import VGGT
from retrofit.evaluate.geometry import absolute_relative_error, pose_errors, true_rotations

LOG = logging.getLogger("rooms")
SIZE = 64  # pixels
FRAMES = 32  # views per step, over all scenes
HELD_OUT = 10_000_000  # seeds from here on are never trained on
GUIDED_LAYERS = (3, 5)
CONFIG = {
    "aggregator": {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "patch_embed": "conv",
        "init_values": 1.0,
    },
    "camera_head": {"trunk_depth": 2, "num_heads": 4, "init_values": 1.0},
    "depth_head": {
        "features": 32,
        "out_channels": [32, 48, 64, 64],
        "intermediate_layer_idx": [1, 3, 4, 5],
    },
}


class PlainAttention(TorchFunctionMode):
    """Attention as two products: on a CPU, the fused one's backward takes half of the step."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the one function."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        return scores.softmax(dim=-1).to(value.dtype) @ value


class Training:
    """The network with its optimizers, running average and clock, saved as one file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Start from random weights, or from those of `--start`."""
        torch.manual_seed(arguments.seed)
        self.path: Path = arguments.work / "state.pt"
        self.seed, self.seconds = arguments.seed, arguments.minutes * 60
        self.rate, self.hues = arguments.rate, arguments.hues
        self.started_trained = arguments.start is not None
        self.model = load(arguments.start) if arguments.start else build()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        # say where each patch lies, from the last layers' tokens; not part of the model
        width = 2 * self.model.config.aggregator.embed_dim
        self.guides = nn.ModuleList(nn.Linear(width, 6) for _ in GUIDED_LAYERS)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if "blocks." in name and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        wide = [p for _, p in named if id(p) not in chosen and p.ndim > 1]
        wide += list(self.guides.parameters())
        thin = [p for _, p in named if p.ndim <= 1]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": wide, "weight_decay": 0.01}, {"params": thin, "weight_decay": 0.0}],
                betas=(0.9, 0.98),
                fused=True,
            ),
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        ]
        self.step, self.before = 0, 0.0
        self.sums: dict[str, float] = {}
        self.started = self.saved = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the time that is spent, 0 to 1."""
        spent = self.before + time.monotonic() - self.started
        return min(1.0, spent / self.seconds)

    def views(self) -> Views:
        """Draw this step's scenes: pairs at first, then up to eight views of each."""
        progress = 1.0 if self.started_trained else self.progress
        choices = (3, 4, 6) if progress < 0.3 else (2, 3, 4, 6, 8)
        number = choices[self.step % len(choices)]
        hues = self.hues * min(1.0, max(0.0, (progress - 0.4) / 0.35))
        seed = self.seed * 1_000_000 + self.step
        return render_views(seed, FRAMES // number, number, SIZE, hues=hues)

    def update(self, views: Views) -> None:
        """Take one step down the losses."""
        rate = self.rate * min(1.0, (self.step + 1) / 60)
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * self.progress)) / 2
        for optimizer, share in zip(self.optimizers, (0.5, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * rate
        losses = compute_losses(self.model, self.guides, views)
        loss = 3 * losses["camera"] + losses["depth"] + 2 * losses["place"]
        if not loss.isfinite():
            raise SystemExit(f"the loss is {loss.item()} at step {self.step}")
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.guides.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()),
                list(self.model.parameters()),
                max(1 / 300, 1 / (1 + self.step / 10)),
            )
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()

    def report(self) -> None:
        """Write the mean losses of 20 steps, every 200 steps the errors on unseen rooms."""
        if self.step % 20 == 0:
            means = ", ".join(f"{name} {value / 20:.4f}" for name, value in self.sums.items())
            spent = self.before + time.monotonic() - self.started
            LOG.info("step %d, %.0f s: %s", self.step, spent, means)
            self.sums.clear()
        if self.step % 200 == 0:
            LOG.info("step %d, unseen rooms: %s", self.step, measure(self.average))
        if time.monotonic() - self.saved > 180:
            self.save()

    def save(self) -> None:
        """Write state and model; a run that dies while writing leaves the previous ones."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "guides": self.guides.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.before + time.monotonic() - self.started,
        }
        fresh = self.path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self.path)
        export(self.average, self.path.parent / "model")
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Go on from the state file."""
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.guides.load_state_dict(state["guides"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step, self.before = state["step"], state["seconds"]
        LOG.info("going on from step %d", self.step)


def build() -> VGGT:
    """Build the network with random weights; its first guess at a pose looks straight ahead."""
    model = VGGT.from_config(CONFIG)
    with torch.no_grad():
        bias = model.get_parameter("camera_head.pose_branch.fc2.bias")
        bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 0, 0.9, 1.35, 1.35]) / 4)  # 4 refinements add up
    return model


def load(folder: Path) -> VGGT:
    """Load trained weights in float32, ready to be trained further."""
    return VGGT.from_pretrained(folder, dtype=torch.float32).train()


def export(model: VGGT, folder: Path) -> None:
    """Write the network in half precision."""
    copy.deepcopy(model).half().save_pretrained(folder)


def compute_losses(model: VGGT, guides: nn.ModuleList, views: Views) -> dict[str, Tensor]:
    """Losses of cameras, depth and places; the trunk in bfloat16, the camera head in float32."""
    images, size = views.images, views.images.shape[-2:]
    camera_head: Any = model.camera_head
    depth_head: Any = model.depth_head
    with PlainAttention():
        with torch.autocast("cpu", torch.bfloat16):
            layers = model.aggregator(images, model.config.tapped_layers)
            depth, confidence = depth_head(
                layers,
                (size[0], size[1]),
                num_special_tokens=model.aggregator.num_special_tokens,
                frames_per_chunk=None,
            )
            special = model.aggregator.num_special_tokens
            places = [
                guide(layers[layer][:, :, special:])
                for layer, guide in zip(GUIDED_LAYERS, guides, strict=True)
            ]
        poses = camera_head(layers[model.config.aggregator.depth - 1][:, :, 0].float())
    target = encode_pose(views.extrinsics, views.intrinsics, (size[0], size[1]))
    points, rays = find_places(views, model.config.aggregator.patch_size)
    return {
        "camera": camera_loss(poses, target),
        "depth": depth_loss(depth[..., 0].float(), confidence.float(), views.depth),
        "place": torch.stack([place_loss(found, points, rays) for found in places]).mean(),
    }


def find_places(views: Views, patch: int) -> tuple[Tensor, Tensor]:
    """Point and unit ray of the pixel in the middle of every patch, `[S, N, P, 3]` each."""
    points = unproject_depth(views.depth, views.extrinsics, views.intrinsics)
    points = points[:, :, patch // 2 :: patch, patch // 2 :: patch].flatten(2, 3)
    rotation, translation = views.extrinsics[..., :3], views.extrinsics[..., 3:]
    centres = -(rotation.mT @ translation).transpose(-1, -2)  # [S, N, 1, 3]
    return points, functional.normalize(points - centres, dim=-1)


@torch.no_grad()
def measure(model: VGGT, scenes: int = 16, num_views: int = 4) -> str:
    """Errors on unseen rooms with hues of any kind, and with those of the first steps."""
    model.eval()
    parts = []
    for hues in (1.0, 0.0):
        views = render_views(HELD_OUT, scenes, num_views, SIZE, hues=hues)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(views.images)
        extrinsics, _ = decode_pose(predicted["pose_enc"].float(), (SIZE, SIZE))
        errors, _ = pose_errors(extrinsics, views.extrinsics)
        true = true_rotations(views.extrinsics)
        relative = absolute_relative_error(predicted["depth"][..., 0].float(), views.depth)
        values = {
            "hues": hues,
            "AbsRel": round(relative.mean().item(), 4),
            "rotation": round(errors.median().item(), 2),
            "of": round(true.median().item(), 2),
        }
        parts.append(json.dumps(values))
    return ", ".join(parts)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the small VGGT.")
    parser.add_argument("--work", type=Path, required=True, help="folder of state, log and result")
    parser.add_argument("--minutes", type=float, default=100.0, help="length of the training")
    parser.add_argument("--start", type=Path, help="trained weights to go on from")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--hues", type=float, default=1.0, help="how free a room's hues become")
    parser.add_argument("--final-scenes", type=int, default=64, help="measured at the end")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(arguments.work / "train.log"),
    ]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=handlers)
    LOG.setLevel(logging.INFO)
    training = Training(arguments)
    if arguments.resume:
        training.resume()
    count = sum(parameter.numel() for parameter in training.model.parameters())
    LOG.info("%d parameters, seed %d, rate %g", count, arguments.seed, arguments.rate)
    while training.progress < 1:
        training.update(training.views())
        training.report()
    end = measure(training.average, scenes=arguments.final_scenes)
    LOG.info("step %d, the end: %s", training.step, end)
    training.save()


if __name__ == "__main__":
    main()
