"""What a config may say, and what is said about one that is wrong."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from retrofit.architectures.pi3_config import Pi3Config
from retrofit.architectures.vggt_config import VGGTConfig
from retrofit.runtime.errors import ConfigError
from tests.architectures.small_networks import PI3_CONFIG, VGGT_CONFIG


def changed(config: dict[str, Any], part: str, **settings: Any) -> dict[str, Any]:
    return config | {part: config.get(part, {}) | settings}


def test_a_vggt_config_survives_being_written_and_read() -> None:
    config = VGGTConfig.from_dict(VGGT_CONFIG)
    assert config.aggregator.embed_dim == 24
    assert config.depth_head is not None
    assert (config.depth_head.dim_in, config.depth_head.output_dim) == (48, 2)
    assert VGGTConfig.from_dict(config.to_dict()) == config


def test_a_pi3_config_survives_being_written_and_read() -> None:
    config = Pi3Config.from_dict(PI3_CONFIG)
    assert Pi3Config.from_dict(config.to_dict()) == config


def test_an_empty_config_is_the_public_checkpoint() -> None:
    assert VGGTConfig.from_dict({}) == VGGTConfig()
    assert Pi3Config.from_dict({}) == Pi3Config()
    assert VGGTConfig().tapped_layers == (4, 11, 17, 23)


def test_a_nested_config_has_only_the_parts_it_names() -> None:
    config = VGGTConfig.from_dict({"aggregator": VGGT_CONFIG["aggregator"]})
    assert config.dino is None
    assert config.camera_head is None
    assert config.point_head is None
    assert config.depth_head is None
    assert config.tapped_layers == (5,)


def test_a_named_patch_embedding_brings_its_own_sizes() -> None:
    aggregator = {"embed_dim": 384, "num_heads": 6, "patch_embed": "dinov2_vits14_reg"}
    config = VGGTConfig.from_dict({"aggregator": aggregator})
    assert config.dino is not None
    assert (config.dino.depth, config.dino.num_heads) == (12, 6)


def test_the_flat_form_turns_heads_off() -> None:
    config = VGGTConfig.from_dict({"enable_point": False, "enable_track": True, "img_size": 280})
    assert config.point_head is None
    assert config.depth_head is not None
    assert config.dino is not None
    assert config.dino.img_size == 280


def test_only_layers_that_a_head_reads_are_tapped() -> None:
    config = VGGTConfig.from_dict({k: v for k, v in VGGT_CONFIG.items() if k != "camera_head"})
    assert config.tapped_layers == (0, 1, 3, 4)
    assert VGGTConfig.from_dict(VGGT_CONFIG).tapped_layers == (0, 1, 3, 4, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"embed_dims": 32}, r"unknown settings \['embed_dims'\]"),
        ({"embed_dim": 512}, "dino.embed_dim: expected 512 to fit the aggregator, got 1024"),
        ({"embed_dim": "wide"}, "aggregator.embed_dim: expected a whole number, got 'wide'"),
        (VGGT_CONFIG | {"track_head": {}}, "unknown part 'track_head'"),
        (VGGT_CONFIG | {"aggregator": 3}, "aggregator: expected a mapping of settings, got 3"),
        (changed(VGGT_CONFIG, "aggregator", deph=2), "unknown setting 'deph'. Did you mean depth"),
        (changed(VGGT_CONFIG, "aggregator", depth=2.5), "depth: expected a whole number, got 2.5"),
        (changed(VGGT_CONFIG, "aggregator", depth=True), "depth: expected a whole number, got Tru"),
        (changed(VGGT_CONFIG, "aggregator", qk_norm=1), "qk_norm: expected true or false, got 1"),
        (changed(VGGT_CONFIG, "aggregator", depth=0), "depth: expected a number above 0, got 0"),
        (changed(VGGT_CONFIG, "aggregator", rope_freq=-1), "rope_freq: expected a number above 0"),
        (changed(VGGT_CONFIG, "aggregator", num_heads=4), "expected a multiple of 16, got 24"),
        (changed(VGGT_CONFIG, "aggregator", aa_block_size=4), "a multiple of 4, got 6"),
        (changed(VGGT_CONFIG, "aggregator", aa_order=["frame"]), "expected frame and global"),
        (changed(VGGT_CONFIG, "aggregator", aa_order="frame"), r"expected a list like \['frame'"),
        (changed(VGGT_CONFIG, "aggregator", patch_embed="vit"), "patch_embed: got 'vit'"),
        (changed(VGGT_CONFIG, "dino", block_chunks=4), "block_chunks: expected 0, got 4"),
        (changed(VGGT_CONFIG, "dino", num_register_tokens=-1), "must not be below 0, got -1"),
        (changed(VGGT_CONFIG, "dino", img_size=71), "expected a multiple of 14, got 71"),
        (changed(VGGT_CONFIG, "dino", patch_size=None), "patch_size: expected a whole number"),
        (changed(VGGT_CONFIG, "camera_head", dim_in=60), "camera_head.dim_in: expected 48"),
        (changed(VGGT_CONFIG, "camera_head", num_heads=5), "expected a multiple of 5, got 48"),
        (changed(VGGT_CONFIG, "depth_head", activation="expo"), "activation: got 'expo'"),
        (changed(VGGT_CONFIG, "depth_head", conf_activation="no"), "conf_activation: got 'no'"),
        (changed(VGGT_CONFIG, "depth_head", output_dim=1), "output_dim: expected 2 or more, got 1"),
        (changed(VGGT_CONFIG, "depth_head", activation="xy_inv_log"), "expected 4 for xy_inv_log"),
        (changed(VGGT_CONFIG, "depth_head", out_channels=[8, 8]), "expected 4 numbers"),
        (changed(VGGT_CONFIG, "depth_head", out_channels=[8, 8, 6, 8]), "multiple of 4, got 6"),
        (changed(VGGT_CONFIG, "depth_head", features=12), "expected a multiple of 8, got 12"),
        (
            changed(VGGT_CONFIG, "point_head", intermediate_layer_idx=[0, 1, 2, 6]),
            "expected layers below the depth 6, got 6",
        ),
    ],
)
def test_a_wrong_vggt_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VGGTConfig.from_dict(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"decoder_size": "huge"}, "expected small, base or large, got 'huge'"),
        ({"decoder_size": "small"}, "encoder.embed_dim: expected 384, the decoder's width"),
        ({"pos_type": "sincos"}, "expected rope and a number, as rope100, got sincos"),
        ({"decoder_sise": "small"}, "unknown setting 'decoder_sise'"),
        (PI3_CONFIG | {"dec_depth": 3}, "dec_depth: expected an even number, got 3"),
        (PI3_CONFIG | {"dec_num_heads": 4}, "expected a multiple of 16, got 24"),
        (changed(PI3_CONFIG, "head", heads=3), "expected a multiple of 12, got 16"),
        (changed(PI3_CONFIG, "head", depth=0), "depth: expected a number above 0, got 0"),
    ],
)
def test_a_wrong_pi3_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pi3Config.from_dict(config)


def test_every_problem_is_named_at_once() -> None:
    config = changed(VGGT_CONFIG, "aggregator", depth=0, nun_heads=2)
    config = changed(config, "camera_head", trunk_depth="deep")
    with pytest.raises(ConfigError) as error:
        VGGTConfig.from_dict(config)
    for word in ("aggregator.depth", "nun_heads", "camera_head.trunk_depth"):
        assert word in str(error.value)


def test_unknown_hub_settings_are_passed_over_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert VGGTConfig.from_dict({"license": "x"}, strict=False) == VGGTConfig()
        assert Pi3Config.from_dict({"license": "x"}, strict=False) == Pi3Config()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "VGGT config",
        "Pi3 config",
    ]


def test_a_missing_position_type_is_the_default() -> None:
    assert Pi3Config.from_dict({"pos_type": None}) == Pi3Config()
    assert Pi3Config.from_dict({"pos_type": "rope50"}).decoder.rope_base == 50
