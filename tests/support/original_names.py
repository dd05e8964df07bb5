"""The state of a module under the names that original single files have for it: the way back from what hires reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hires.checkpoints.configs import ldm_unet_names
from hires.checkpoints.families import FAMILIES


def ldm_state(network: nn.Module, vae: nn.Module, texts: tuple[nn.Module, ...]) -> dict[str, Tensor]:
    """The single-file state of SDXL (two towers) or SD1.5 (one), with the leftovers that real files carry."""
    sdxl = len(texts) == 2
    state = {f"model.diffusion_model.{key}": value for key, value in unet_to_ldm(network).items()}
    state |= {f"first_stage_model.{key}": value for key, value in vae_to_ldm(vae).items()}
    first = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    state |= {first + key: value for key, value in clip_to_ldm(texts[0]).items()}
    state[first + "text_model.embeddings.position_ids"] = torch.arange(77)[None].float()
    if sdxl:
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in clip_to_openclip(texts[1]).items()}
    else:
        state["alphas_cumprod"] = torch.rand(1000)
    return state


def unet_to_ldm(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    modules = {key.rpartition(".")[0] for key in state}
    names = ldm_unet_names(modules, network.config.layers_per_block)
    return {f"{names[module]}.{leaf}": state[f"{module}.{leaf}"] for module, _, leaf in (k.rpartition(".") for k in state)}


def vae_to_ldm(vae: nn.Module) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)

    def renamed(key: str) -> str:
        for i in range(levels):
            key = key.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
            key = key.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            key = key.replace(f"up_blocks.{i}.resnets.", f"up.{levels - 1 - i}.block.")
            key = key.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
        for mine, theirs in (
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
        ):  # fmt: skip
            key = key.replace(mine, theirs)
        return key

    state = {renamed(key): value for key, value in vae.state_dict().items()}
    return {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in state.items()}


def clip_to_ldm(tower: nn.Module) -> dict[str, Tensor]:
    """Names as transformers had them when the files were made: everything under text_model."""
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tower.state_dict().items()}


def clip_to_openclip(tower: nn.Module) -> dict[str, Tensor]:
    state = {key.removeprefix("text_model."): value for key, value in tower.state_dict().items()}
    result = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "text_projection": state.pop("text_projection.weight").T,
        "logit_scale": torch.tensor(4.6),
    }
    for leaf in ("weight", "bias"):
        result[f"ln_final.{leaf}"] = state.pop(f"final_layer_norm.{leaf}")
        for i in range(tower.config.num_hidden_layers):
            mine, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            heads = [state.pop(f"{mine}.self_attn.{name}_proj.{leaf}") for name in "qkv"]
            result[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(heads)
            for ours, other in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                result[f"{theirs}.{other}.{leaf}"] = state.pop(f"{mine}.{ours}.{leaf}")
    assert not state, sorted(state)
    return result


def pixart_to_pth(network: nn.Module, family: str) -> dict[str, Tensor]:
    """The original naming of PixArt, with the two tensors that are no weights of the network."""
    state = dict(network.state_dict())
    width, caption = network.config.cross_attention_dim, network.config.caption_channels
    grid = network.config.sample_size // network.config.patch_size
    result = {
        "pos_embed": torch.zeros(1, grid**2, width),
        "y_embedder.y_embedding": torch.zeros(FAMILIES[family].tokens, caption),
        "final_layer.scale_shift_table": state.pop("scale_shift_table"),
    }
    pairs = {
        "pos_embed.proj": "x_embedder.proj", "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2", "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    }  # fmt: skip
    for ours, other in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar")):
        for ours_leaf, other_leaf in (("linear_1", "0"), ("linear_2", "2")):
            pairs[f"adaln_single.emb.{ours}_embedder.{ours_leaf}"] = f"{other}_embedder.mlp.{other_leaf}"
    for i in range(network.config.num_layers):
        result[f"blocks.{i}.scale_shift_table"] = state.pop(f"transformer_blocks.{i}.scale_shift_table")
        for ours, other in (
            ("attn1.to_out.0", "attn.proj"), ("attn2.to_q", "cross_attn.q_linear"), ("attn2.to_out.0", "cross_attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2"),
        ):  # fmt: skip
            pairs[f"transformer_blocks.{i}.{ours}"] = f"blocks.{i}.{other}"
        for leaf in ("weight", "bias"):
            block = f"transformer_blocks.{i}"
            result[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([state.pop(f"{block}.attn1.to_{n}.{leaf}") for n in "qkv"])
            both = torch.cat([state.pop(f"{block}.attn2.to_{n}.{leaf}") for n in "kv"])
            result[f"blocks.{i}.cross_attn.kv_linear.{leaf}"] = both
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        result[f"{pairs[module]}.{leaf}"] = value
    return result
