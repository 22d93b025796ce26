"""Checkpoints: written, found, read, refused."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retrofit.architectures import loading
from retrofit.architectures.pi3 import Pi3
from retrofit.architectures.vggt import VGGT
from retrofit.runtime.errors import CheckpointError, NotFoundError
from tests.architectures.small_networks import PI3_CONFIG, VGGT_CONFIG, small_pi3, small_vggt

COMMIT = "0123456789012345678901234567890123456789"


def same_state(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def saved_vggt(tmp_path: Path) -> Path:
    small_vggt().save_pretrained(tmp_path / "vggt")
    return tmp_path / "vggt"


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file) | change
    save_file({name: value for name, value in state.items() if value is not None}, file)


def test_a_saved_vggt_loads_again(saved_vggt: Path) -> None:
    loaded = VGGT.from_pretrained(saved_vggt)
    assert same_state(loaded, small_vggt())
    assert loaded.config == small_vggt().config
    assert not loaded.training
    assert loaded.ignored_keys == ()
    assert sorted(path.name for path in saved_vggt.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_saved_pi3_loads_again(tmp_path: Path) -> None:
    small_pi3().save_pretrained(tmp_path)
    loaded = Pi3.from_pretrained(str(tmp_path))
    assert same_state(loaded, small_pi3())
    images = torch.rand(1, 2, 3, 28, 42)
    with torch.no_grad():
        assert torch.equal(loaded(images)["points"], small_pi3()(images)["points"])


def test_a_loaded_network_can_be_changed_and_saved_over_its_source(saved_vggt: Path) -> None:
    before = (saved_vggt / "model.safetensors").read_bytes()
    loaded = VGGT.from_pretrained(saved_vggt)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight += 1
    assert (saved_vggt / "model.safetensors").read_bytes() == before
    loaded.save_pretrained(saved_vggt)
    again = VGGT.from_pretrained(saved_vggt)
    assert same_state(again, loaded)
    assert not same_state(again, small_vggt())


def test_a_weight_file_alone_is_read_with_the_config_beside_it(saved_vggt: Path) -> None:
    assert same_state(VGGT.from_pretrained(saved_vggt / "model.safetensors"), small_vggt())


def test_shards_are_read_through_their_index(saved_vggt: Path) -> None:
    state = load_file(saved_vggt / "model.safetensors")
    (saved_vggt / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: state[name] for name in members}, saved_vggt / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = saved_vggt / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same_state(VGGT.from_pretrained(saved_vggt), small_vggt())
    (saved_vggt / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected b.safetensors in it"):
        VGGT.from_pretrained(saved_vggt)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="expected a weight_map"):
        VGGT.from_pretrained(saved_vggt)


def test_the_trackers_tensors_are_read_past_and_named(saved_vggt: Path) -> None:
    names = ["track_head.tracker.query_ref_token", "track_head.feature_extractor.norm.bias"]
    rewrite(saved_vggt, {name: torch.zeros(3) for name in names})
    loaded = VGGT.from_pretrained(saved_vggt)
    assert loaded.ignored_keys == tuple(sorted(names))
    assert same_state(loaded, small_vggt())


def test_tensors_of_heads_that_the_config_lacks_are_read_past(saved_vggt: Path) -> None:
    config = json.loads((saved_vggt / "config.json").read_text())
    del config["point_head"]
    (saved_vggt / "config.json").write_text(json.dumps(config))
    loaded = VGGT.from_pretrained(saved_vggt)
    assert loaded.point_head is None
    assert all(name.startswith("point_head.") for name in loaded.ignored_keys)
    assert len(loaded.ignored_keys) == 62


def test_the_files_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    small_vggt().half().save_pretrained(tmp_path)
    kept = VGGT.from_pretrained(tmp_path)
    assert {weight.dtype for weight in kept.parameters()} == {torch.float16}
    raised = VGGT.from_pretrained(tmp_path, dtype=torch.float32)
    assert {weight.dtype for weight in raised.parameters()} == {torch.float32}
    mixed = VGGT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in mixed.aggregator.parameters()} == {torch.bfloat16}
    heads = [mixed.camera_head, mixed.depth_head, mixed.point_head]
    assert all(head is not None for head in heads)
    dtypes = {weight.dtype for head in heads if head for weight in head.parameters()}
    assert dtypes == {torch.float32}


def test_pi3_in_half_precision_keeps_its_last_layers_in_float32(tmp_path: Path) -> None:
    small_pi3().save_pretrained(tmp_path)
    model = Pi3.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.decoder[0].attn.qkv.weight.dtype == torch.bfloat16
    assert model.point_decoder.linear_out.weight.dtype == torch.bfloat16
    for head in (model.point_head.proj, model.conf_head.proj, model.camera_head.fc_rot):
        assert head.weight.dtype == torch.float32
    assert model.image_mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"camera_head.embed_pose.bias": None}, r"1 missing \(camera_head.embed_pose.bias\)"),
        ({"camera_head.extra": torch.zeros(1)}, r"1 unknown \(camera_head.extra\)"),
        ({"aggregator.camera_token": torch.zeros(1, 2, 1, 25)}, r"\[1, 2, 1, 25\] instead of"),
    ],
)
def test_weights_of_another_network_are_refused(
    saved_vggt: Path, change: dict[str, Tensor | None], message: str
) -> None:
    rewrite(saved_vggt, change)
    with pytest.raises(CheckpointError, match=message):
        VGGT.from_pretrained(saved_vggt)


def test_a_pi3_is_no_vggt(tmp_path: Path) -> None:
    small_pi3().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(VGGT_CONFIG))
    with pytest.raises(CheckpointError, match=r"missing \(.*, \.\.\.\); \d+ unknown"):
        VGGT.from_pretrained(tmp_path)


def test_a_cut_off_file_is_refused(saved_vggt: Path) -> None:
    file = saved_vggt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        VGGT.from_pretrained(saved_vggt)


def test_a_pickle_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Only safetensors weights are read"):
        VGGT.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_refused(saved_vggt: Path, text: str) -> None:
    (saved_vggt / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json: expected"):
        VGGT.from_pretrained(saved_vggt)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/place", "nowhere", "~/nowhere/at/all"])
def test_a_path_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(NotFoundError, match="no such file or folder"):
        VGGT.from_pretrained(source)


def put_in_cache(cache: Path, repo: str, folder: Path) -> None:
    """Lay a folder out as the hub's cache does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def test_a_hub_id_is_read_from_the_cache_without_network(saved_vggt: Path, tmp_path: Path) -> None:
    put_in_cache(tmp_path / "cache", "someone/small-vggt", saved_vggt)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert same_state(VGGT.from_pretrained("someone/small-vggt", **options), small_vggt())
    with pytest.raises(NotFoundError, match="config.json is not in the local cache"):
        VGGT.from_pretrained("someone/other", **options)


class FakeHub:
    """Stands in for the hub's download: a folder, or an error."""

    def __init__(self, folder: Path | None = None, error: Exception | None = None) -> None:
        self.folder, self.error, self.asked = folder, error, []

    def __call__(self, repo: str, name: str, **options: str) -> str:
        self.asked.append((repo, name, options))
        if self.error is not None:
            raise self.error
        if self.folder is None or not (self.folder / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(self.folder / name)


def test_a_hub_id_is_downloaded_file_by_file(
    saved_vggt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(saved_vggt)
    monkeypatch.setattr(loading, "hf_hub_download", hub)
    assert same_state(VGGT.from_pretrained("someone/vggt", revision="v1"), small_vggt())
    names = ["config.json", "model.safetensors.index.json", "model.safetensors"]
    assert hub.asked == [("someone/vggt", name, {"revision": "v1"}) for name in names]


def test_a_repository_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PI3_CONFIG))
    monkeypatch.setattr(loading, "hf_hub_download", FakeHub(tmp_path))
    with pytest.raises(CheckpointError, match=r"someone/pi3: expected model.safetensors in it"):
        Pi3.from_pretrained("someone/pi3")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "access has to be asked for"),
        ("RepositoryNotFoundError", "no such repository or revision on the hub"),
        ("RevisionNotFoundError", "no such repository or revision on the hub"),
        ("HFValidationError", "no such repository or revision on the hub"),
        ("LocalEntryNotFoundError", "the hub was not reached"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    error: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(huggingface_hub.errors, error)
    raised = kind.__new__(kind)
    monkeypatch.setattr(loading, "hf_hub_download", FakeHub(error=raised))
    with pytest.raises(NotFoundError, match=message):
        VGGT.from_pretrained("someone/vggt")


def test_any_other_answer_of_the_hub_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = huggingface_hub.errors.HfHubHTTPError
    error = kind.__new__(kind, "500 Server Error")
    error.args = ("500 Server Error",)
    monkeypatch.setattr(loading, "hf_hub_download", FakeHub(error=error))
    with pytest.raises(CheckpointError, match="the hub refused config.json: 500 Server Error"):
        VGGT.from_pretrained("someone/vggt")
