"""What names of timm's tell: against timm's own models, whose parameters do not say it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from peers import peer

from core.vit import VitConfig
from vit_distill.formats import architectures
from vit_distill.formats.canonical import entries
from vit_distill.formats.checkpoint import Beside
from vit_distill.formats.inference import infer_config
from vit_distill.formats.reading import read_format

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_rope_224.naver_in1k", "rotary positions"),
        ("vit_small_patch16_rope_mixed_ape_224", "rotary positions"),
        ("vit_medium_patch16_rope_reg1_gap_256", "rotary positions"),
        ("vit_base_patch16_lingbot", "rotary positions"),
        ("vit_large_patch16_sapiens2", "rotary positions"),
        ("vit_pe_spatial_base_patch16_512", "rotary positions"),
        ("eva02_large_patch14_448", "rotary positions"),
        ("eva_giant_patch14_224", "EVA"),
        ("beit_base_patch16_224", "BEiT"),
        ("beitv2_large_patch16_224", "BEiT"),
        ("beit3_base_patch16_224", "BEiT"),
        ("vit_base_patch16_rpn_224", "norms after attention"),
        ("vit_relpos_base_patch16_rpn_224", "norms after attention"),
        ("test_vit3", "attention pooling of registers"),
    ],
)
def test_what_only_looks_like_a_plain_vit_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"architecture '{name.split('.')[0]}': expected a plain ViT.*{reason}"):
        architectures.named_settings(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224.augreg_in21k", {"norm_eps": 1e-6, "activation": "gelu"}),
        ("deit3_small_patch16_224", {"norm_eps": 1e-6, "activation": "gelu"}),
        ("eva_large_patch14_196", {"norm_eps": 1e-6, "activation": "gelu"}),  # a plain ViT, unlike the other EVAs
        ("vit_large_patch14_clip_336.openai", {"norm_eps": 1e-5, "activation": "gelu"}),
        ("vit_base_patch32_clip_quickgelu_224", {"norm_eps": 1e-5, "activation": "quick_gelu"}),
        ("vit_base_patch16_siglip_gap_224", {"norm_eps": 1e-6, "activation": "gelu"}),
        ("vit_large_patch16_siglip_gap_384", {"norm_eps": 1e-6, "activation": "gelu"}),
        ("vit_large_patch16_siglip_gap_512", {"norm_eps": 1e-6, "activation": "gelu_tanh"}),
        ("vit_base_patch16_siglip_224.v2_webli", {"norm_eps": 1e-6, "activation": "gelu"}),
        ("vit_so400m_patch14_siglip_gap_384", {"norm_eps": 1e-6, "activation": "gelu"}),
        ("vit_so400m_patch16_siglip_gap_256", {"norm_eps": 1e-6, "activation": "gelu_tanh"}),
        ("vit_giantopt_patch16_siglip_gap_256", {"norm_eps": 1e-6, "activation": "gelu_tanh", "num_heads": 16}),
        ("vit_base_patch16_gap_224", {"norm_eps": 1e-6, "activation": "gelu", "num_heads": 16}),
        (
            "vit_huge_plus_patch16_dinov3.lvd1689m",
            {"norm_eps": 1e-5, "activation": "gelu", "position": "rotary", "pool": "mean"},
        ),
        ("test_vit", {"norm_eps": 1e-6, "activation": "gelu", "num_heads": 2}),
    ],
)
def test_settings_by_name(name: str, expected: dict[str, Any]) -> None:
    assert architectures.named_settings(name) == expected


def test_every_model_of_timm_is_read_as_it_is_or_refused() -> None:
    """Of each ViT that timm can build: either an error, or timm's own block, epsilon, activation, heads and pooling."""
    timm, torch = peer("timm"), peer("torch")
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Attention, Block, LayerNorm, VisionTransformer

    patterns = ["vit_*", "deit*", "eva*", "beit*", "flexivit*", "test_vit*", "aimv2*", "samvit*"]
    names = timm.list_models(patterns, exclude_filters="*sapiens2*")  # which cannot be built with one block
    read = []
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, depth=1)
        tensors = {key: np.broadcast_to(np.float32(0), tuple(value.shape)) for key, value in model.state_dict().items()}
        config_json = {"architecture": name, "global_pool": getattr(model, "global_pool", "token")}
        beside = Beside(config_json | {"pretrained_cfg": {"input_size": model.pretrained_cfg["input_size"]}})
        try:
            found, _ = read_format(tensors, beside)
            position = found.settings.get("position", "learned")
            settings = infer_config(found.state, found.source_name, position=position) | found.settings
        except ValueError:
            continue
        heads = settings.get("num_heads") or architectures.standard_heads(settings["width"])
        config = VitConfig(**settings | {"num_heads": heads or 1})  # without customary heads they are asked for
        if {entry.name for entry in entries(config)} != set(found.state):
            continue  # load_teacher refuses what is missing and what has no place
        read.append(name)
        block = model.blocks[0]
        plain = (VisionTransformer, Block, Attention)
        classes = (Eva, EvaBlock, EvaAttention) if config.position == "rotary" else plain
        assert (type(model), type(block), type(block.attn), type(block.norm1)) == (*classes, LayerNorm), name
        assert config.norm_eps == block.norm1.eps, name
        assert config.mlp == "swiglu" or config.activation == ACTIVATIONS[type(block.mlp.act).__name__], name
        assert heads in (None, block.attn.num_heads), name
        if config.position == "rotary":
            rope = (type(model.rope).__name__, model.rope.temperature, model.rope.rotate_half, model.rope.grid_offset)
            assert rope == ("RotaryEmbeddingDinoV3", config.rotary_base, True, 0), name
            named = architectures.architecture_config(name)
            assert dataclasses.replace(named, depth=1) == config, name
            continue
        assert config.position_on_prefix == (not model.no_embed_class and model.num_prefix_tokens > 0), name
        assert config.pool == {"token": "token", "map": "attention"}.get(model.global_pool, "mean"), name
        if config.pool == "attention":
            pool = model.attn_pool
            assert (type(pool).__name__, pool.pool, pool.num_heads) == ("AttentionPoolLatent", "token", heads), name
            assert (pool.norm.eps, ACTIVATIONS[type(pool.mlp.act).__name__]) == (1e-6, config.activation), name
            assert not model.pool_include_prefix, name
        if "siglip" in name:
            assert dataclasses.replace(architectures.architecture_config(name), depth=1) == config, name
    assert {"vit_base_patch16_224", "deit3_base_patch16_224", "eva_large_patch14_196", "flexivit_base"} <= set(read)
    assert {
        "vit_so400m_patch16_siglip_gap_256",
        "vit_base_patch16_gap_224",
        "vit_base_patch14_reg1_tipsv2",
        "test_vit",
    } <= set(read)
    assert sum("dinov3" in name for name in read) == 12
    assert sum("siglip" in name for name in read) == 34  # all but the two of NaFlex, which are no plain ViTs
    assert "vit_so150m_patch16_reg4_map_256" in read
