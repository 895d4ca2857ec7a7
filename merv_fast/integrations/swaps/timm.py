"""timm's vision transformers, as MERV and prismatic use them: one block's tokens, a class token, or the pooled one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from merv_fast.encoders import EncoderConfig
from merv_fast.integrations.swaps.findings import own
from merv_fast.integrations.swaps.kinds import Kind, recipe

__all__ = ["timm_vit"]


def timm_vit(module: Any) -> Kind | str | None:
    """How timm's ``VisionTransformer`` encodes; why ours is another; None of another module."""
    if not (hasattr(module, "patch_embed") and hasattr(module, "blocks") and hasattr(module, "pos_embed")):
        return None
    if not len(module.blocks) or not hasattr(module.blocks[0], "attn"):
        return None
    if difference := next(differences(module), None):
        return difference
    wanted = wanted_tokens(module)
    if isinstance(wanted, str):
        return wanted
    first, mlp = module.blocks[0], module.blocks[0].mlp
    prefix = module.cls_token is not None
    registers = getattr(module, "reg_token", None)
    config = EncoderConfig(
        name=type(module).__name__,
        family="dinov2",  # whose checkpoints have timm's names
        source="",
        files=(),
        recipe=recipe(module.patch_embed.img_size[0]),
        image_size=module.patch_embed.img_size[0],
        num_frames=1,
        patch=module.patch_embed.patch_size[0],
        width=module.pos_embed.shape[-1],
        depth=len(module.blocks),
        heads=first.attn.num_heads,
        mlp_width=mlp.fc1.out_features,
        class_token=prefix,
        register_tokens=0 if registers is None else registers.shape[1],
        layer_scale=hasattr(first.ls1, "gamma"),
        activation="gelu" if mlp.act.approximate == "none" else "gelu_tanh",
        eps=first.norm1.eps,
        **wanted["config"],
    )
    return Kind("timm", config, frames, wanted["returned"](config), own_forward(module), module)


def frames(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """``[R, 3, S, S]`` as videos of one frame."""
    return args[0][:, None] if len(args) == 1 and not kwargs else None


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that was there, which may be one that a caller has put in the place of the class's."""
    given = own(module, "forward")
    return type(module).forward if given is None else lambda module, *args, **kwargs: given(*args, **kwargs)


def differences(module: Any) -> Iterator[str]:
    """What a transformer does that ours does not."""
    embed = module.patch_embed
    if getattr(module, "dynamic_img_size", False):
        yield "it takes pictures of any size"
    if embed.patch_size[0] != embed.patch_size[1] or embed.img_size[0] != embed.img_size[1]:
        yield "its patches or pictures are not square"
    if not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity):
        yield "its patches are normalised"
    patches = (embed.img_size[0] // embed.patch_size[0]) ** 2
    if module.pos_embed is None or module.pos_embed.shape[1] != patches:
        yield "its class token has a position"
    for name in ("norm_pre", "patch_drop"):
        if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
            yield f"it has a {name}"
    for block in module.blocks:
        yield from block_differences(block)


def block_differences(block: Any) -> Iterator[str]:
    """Those of one block."""
    attention, mlp = block.attn, block.mlp
    if attention.qkv.bias is None or attention.proj.bias is None:
        yield "its attention has no biases"
    for part, name in ((attention, "q_norm"), (attention, "k_norm"), (attention, "norm"), (mlp, "norm")):
        if not isinstance(getattr(part, name, nn.Identity()), nn.Identity):
            yield f"its {type(part).__name__} has a {name}"
    if not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
        yield "its norms are no LayerNorms"
    if not isinstance(mlp.act, nn.GELU) or not hasattr(mlp, "fc2"):
        yield f"its MLP is no GELU between two layers but {type(mlp).__name__}"


def wanted_tokens(module: Any) -> dict[str, Any] | str:
    """Which tokens its forward returns: the fields of our configuration, and what makes its return value of them."""
    given = own(module, "forward")
    if given is not None:
        return from_partial(given, len(module.blocks))
    for name in ("head", "fc_norm"):
        if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
            return f"it has a {name}"
    pool = getattr(module, "attn_pool", None)
    whole = {"blocks": len(module.blocks), "final_norm": True}
    if pool is not None:
        if pool.latent.shape[1] != 1 or pool.pos_embed is not None or pool.pool != "token":
            return "its attention pools to more than one token"
        return {"config": {**whole, "tokens": "pooled"}, "returned": lambda config: one_token}
    if module.global_pool != "token":
        return f"it pools by {module.global_pool!r}"
    return {"config": {**whole, "tokens": "class"}, "returned": lambda config: one_token}


def one_token(tokens: Tensor) -> Tensor:
    """``[R, 1, 1, C]`` -> ``[R, C]``."""
    return tokens[:, 0, 0]


def from_partial(given: Callable[..., Any], depth: int) -> dict[str, Any] | str:
    """What a forward asks for that is ``partial(get_intermediate_layers, n={i})``, perhaps inside another function."""
    inner = [given, *(cell.cell_contents for cell in getattr(given, "__closure__", None) or ())]
    calls = [each for each in inner if isinstance(each, partial) and each.func.__name__ == "get_intermediate_layers"]
    if not calls:
        return "its forward has been replaced by one that is not get_intermediate_layers"
    asked = dict(calls[0].keywords)
    layers, prefix = asked.pop("n", 1), asked.pop("return_prefix_tokens", False)
    normed = asked.pop("norm", False)
    layers = range(depth - layers, depth) if isinstance(layers, int) else layers
    if len(layers) != 1 or any(asked.values()) or calls[0].args:
        return "its forward returns more than the tokens of one block"
    (last,) = layers
    config = {"blocks": range(depth)[last] + 1, "final_norm": normed, "tokens": "all" if prefix else "grid"}
    return {"config": config, "returned": with_prefix if prefix else lambda config: lambda tokens: tokens[:, 0]}


def with_prefix(config: EncoderConfig) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Patches and, apart from them, class token and registers."""

    def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
        prefix, patches = tokens[:, 0].tensor_split([config.prefix_tokens], dim=1)
        return patches, prefix

    return split
