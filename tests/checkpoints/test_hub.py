"""Hub ids, with a hub that is a folder: what is fetched, and what is said when it fails."""

from __future__ import annotations

import fnmatch
import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import save_file

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import check_weights, load_networks
from retrofit.runtime.errors import NotFoundError, RetrofitError
from tests import tiny_models
from tests.single_files import name_wan_as_released


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """Serves folders of `tmp_path/repositories`; returns it and the list of fetched paths."""
    repositories, cache = tmp_path / "repositories", tmp_path / "cache"
    fetched = []

    def download(repo_id, *, revision=None, allow_patterns=(), ignore_patterns=()):
        source = repositories / repo_id / (revision or "main")
        target = cache / repo_id / (revision or "main")
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_dir() or not wanted:
                continue
            if any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)
            fetched.append(name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repositories, fetched


def test_configs_alone_are_fetched_to_inspect(fake_hub, pipeline, run_command):
    repositories, fetched = fake_hub
    shutil.copytree(pipeline, repositories / "owner/sd/main")
    answer = run_command("inspect", "owner/sd", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["family"] == "unet2d"
    assert "unet/config.json" in fetched
    assert not [name for name in fetched if name.endswith((".safetensors", "vocab.json"))]


def test_only_what_the_pipeline_is_made_of_is_fetched(fake_hub, pipeline):
    repositories, fetched = fake_hub
    folder = repositories / "owner/sd/main"
    shutil.copytree(pipeline, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, folder / "sd.safetensors")
    shutil.copy(weights, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    found = find_checkpoint("owner/sd")
    check_weights(found)
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert "tokenizer/tokenizer.json" in fetched


def test_a_repository_with_a_variant_only_still_comes(fake_hub, encoder):
    repositories, fetched = fake_hub
    folder = repositories / "owner/bert/main"
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    found = find_checkpoint("owner/bert")
    load_networks(found, [""], device="cpu")
    assert "model.fp16.safetensors" in fetched


def test_a_folder_and_a_revision_may_follow_the_name(fake_hub, pipeline):
    repositories, fetched = fake_hub
    shutil.copytree(pipeline, repositories / "owner/sd/v2")
    found = find_checkpoint("owner/sd/unet@v2")
    assert found.classes == {"": ("diffusers", "UNet2DConditionModel")}
    check_weights(found)
    assert all(name.startswith("unet/") for name in fetched)


def test_a_patched_checkpoint_on_the_hub_loads_patched(fake_hub, patched):
    import retrofit

    repositories, _ = fake_hub
    shutil.copytree(patched, repositories / "owner/sparse/main")
    model = retrofit.load("owner/sparse")
    assert len(retrofit.patch_of(model).report.patched) == 2


def test_a_folder_named_as_an_owner_does_not_hide_the_hub(fake_hub, encoder, tmp_path, monkeypatch):
    repositories, _ = fake_hub
    shutil.copytree(encoder, repositories / "owner/bert/main")
    shutil.copytree(encoder, tmp_path / "owner" / "minilm")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("owner/bert").classes == {"": ("transformers", "BertModel")}
    with pytest.raises(NotFoundError, match=r"Did you mean minilm\?"):
        find_checkpoint("owner/minilmm")


def test_a_repository_without_configs_is_no_checkpoint(fake_hub):
    repositories, _ = fake_hub
    (repositories / "owner/data/main").mkdir(parents=True)
    with pytest.raises(NotFoundError, match="no configs"):
        find_checkpoint("owner/data")


def test_one_file_of_a_repository_may_be_named(fake_hub, pipeline, tmp_path):
    repositories, fetched = fake_hub
    dense = tiny_models.make_wan()
    dense.save_config(tmp_path / "configs")
    folder = repositories / "owner/single/main"
    folder.mkdir(parents=True)
    for name in ("wan", "other"):
        save_file(name_wan_as_released(dense.state_dict()), folder / f"{name}.safetensors")
    found = find_checkpoint("owner/single/wan.safetensors", config=str(tmp_path / "configs"))
    assert found.layout == "single-file"
    assert fetched == ["wan.safetensors"]
    with pytest.raises(NotFoundError, match="has no file 'no.safetensors'"):
        find_checkpoint("owner/single/no.safetensors")


def test_the_configs_of_a_single_file_come_from_the_hub(fake_hub, tmp_path):
    repositories, fetched = fake_hub
    dense = tiny_models.make_wan()
    repository = repositories / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/main"
    dense.save_pretrained(repository / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (repository / "model_index.json").write_text(json.dumps(index))
    save_file(name_wan_as_released(dense.state_dict()), tmp_path / "wan.safetensors")
    found = find_checkpoint(tmp_path / "wan.safetensors", config="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert not [name for name in fetched if name.endswith(".safetensors")]
    loaded = load_networks(found, [""], device="cpu")
    assert torch.equal(loaded.proj_out.weight, dense.proj_out.weight)


def _make(kind):
    error = kind.__new__(kind)  # their constructors want the hub's whole response
    Exception.__init__(error, "as the hub says it")
    return error


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        (hub.GatedRepoError, NotFoundError, "hf auth login"),
        (hub.RepositoryNotFoundError, NotFoundError, "neither a folder here nor a repository"),
        (hub.RevisionNotFoundError, NotFoundError, "no revision 'v9'"),
        (hub.HFValidationError, NotFoundError, "neither a folder here nor a repository"),
        (hub.LocalEntryNotFoundError, RetrofitError, "can't be reached"),
        (hub.OfflineModeIsEnabled, RetrofitError, "HF_HUB_OFFLINE"),
        (ConnectionError, RetrofitError, "can't be reached"),
        (hub.HfHubHTTPError, RetrofitError, "the hub answered"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_fix(kind, expected, message, monkeypatch):
    def refuse(*arguments, **options):
        raise _make(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(expected, match=message) as caught:
        find_checkpoint("owner/name@v9")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == (2 if expected is NotFoundError else 1)
