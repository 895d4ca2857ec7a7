"""The encoders as cases: one by one and all four, ours, the reference's way, and transformers' own.

On a GPU at full size in bfloat16; on a CPU small ones, with the blocks that are not run in the same proportion.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    VivitConfig,
    VivitModel,
)

from bench import baselines
from bench.baselines import ReferenceEncoder, run_block
from bench.cases import COMPILED, EAGER, MERV, OURS, Case, Setup, Way, compile_once
from bench.comparison import Entry
from bench.counting import count, parameters
from merv_fast.encoders import EncoderConfig, VisionTransformer, convert_state_dict, encoder_config
from merv_fast.kernels._launch import Cost
from merv_fast.models.configuration import MERV_BASE, MervConfig, MervEncoderConfig
from merv_fast.models.video_model import MervVideoModel

__all__ = [
    "GRAPHED",
    "OURS_COMPILED",
    "SERIAL",
    "TRANSFORMERS",
    "encoder_configs",
    "entries",
    "place",
    "rand_pixels",
    "sizes",
    "video_model",
]

TRANSFORMERS, SERIAL, OURS_COMPILED = "transformers", "merv_fast, one after another", "merv_fast, compiled"
GRAPHED = "merv_fast, CUDA graph"
BATCHES, ALONE = {"cuda": (1, 2, 4, 8), "cpu": (1, 4)}, {"cuda": (1, 8), "cpu": (1,)}
"""Of all four, and of each alone."""
SMALL = {"image_size": 112, "width": 192, "heads": 3, "mlp_width": 768, "depth": 4}


def entries(device: str) -> Iterator[Entry]:
    """All four encoders, then each alone."""
    setup = Setup(device, torch.bfloat16 if device == "cuda" else torch.float32, MERV)
    configs = encoder_configs(device)
    for B in BATCHES[device]:
        yield all_encoders(setup, B, configs)
    for config in configs.values():
        for B in ALONE[device]:
            yield one_encoder(setup, B, config)


def encoder_configs(device: str) -> dict[str, EncoderConfig]:
    """merv-base's by family, in its order."""
    found = {}
    for name, frames in MERV_BASE.items():
        full = encoder_config(name, frames)
        side = SMALL["image_size"]
        recipe = replace(full.recipe, size=side, short_side=side)
        small = replace(full, **SMALL, blocks=SMALL["depth"] - (full.depth - full.blocks), recipe=recipe)
        found[full.family] = full if device == "cuda" else small
    return found


def one_encoder(setup: Setup, B: int, config: EncoderConfig) -> Entry:
    """Ours, the reference's, and transformers' where it has one; all with the same random weights."""

    def make() -> tuple:
        peer = build_peer(setup, config) if config.family in PEERS else None
        return rand_pixels(setup, B, config), *build(setup, config, peer), peer

    def ours(pixels: Tensor, encoder: nn.Module, *rest: Any) -> Tensor:
        return encoder(pixels)

    def theirs(pixels: Tensor, encoder: nn.Module, whole: nn.Module, *rest: Any, run: Any = None) -> Tensor:
        return whole(pixels, run)

    def peers(pixels: Tensor, encoder: nn.Module, whole: nn.Module, peer: nn.Module) -> Tensor:
        return patches_of(peer, config, pixels)

    ways = [Way(OURS, ours, [theirs]), Way(EAGER, theirs)]
    if config.family in PEERS:
        ways.append(Way(TRANSFORMERS, peers))
    if setup.device == "cuda" and B == 1:
        # Block by block: a graph of all would compile for a minute, and run the same kernels.
        ways.append(Way(COMPILED, partial(theirs, run=compile_once(run_block)), [theirs]))
    name = f"encoder, {config.family}, {sizes(config)}"
    cost = partial(encoder_cost, [config], B, setup.dtype.itemsize)
    return Entry(Case(name, B, make, theirs, ways, cost), setup, product_of(config, B))


def all_encoders(setup: Setup, B: int, configs: dict[str, EncoderConfig]) -> Entry:
    """What a video model does, against one encoder after the other as the reference runs them."""

    on_gpu = setup.device == "cuda"
    compiles = on_gpu and B in ALONE["cuda"]

    def make() -> tuple:
        model = video_model(setup, configs)
        wholes = nn.ModuleList(place(setup, ReferenceEncoder(encoder)) for encoder in model.encoders.values())
        graphed, compiled = (copy.deepcopy(model) if needed else None for needed in (on_gpu, compiles))
        if graphed is not None:
            graphed.use_graphs()
        if compiled is not None:
            compiled.use_compile(dynamic=False)
        return [rand_pixels(setup, B, config) for config in configs.values()], model, wholes, graphed, compiled

    def ours(pixels: list[Tensor], model: MervVideoModel, *rest: Any) -> list[Tensor]:
        return model.encode(pixels)

    def ours_graphed(pixels: list[Tensor], model: Any, wholes: Any, graphed: Any, *rest: Any) -> list[Tensor]:
        if graphed.graphs.encode.obstacle:
            raise RuntimeError(f"encoders: they must be one graph, got {graphed.graphs}")
        return graphed.encode(pixels)

    def ours_compiled(pixels: list[Tensor], model: Any, wholes: Any, graphed: Any, compiled: Any) -> list[Tensor]:
        return compiled.encode(pixels)

    def serially(pixels: list[Tensor], model: MervVideoModel, *rest: Any) -> list[Tensor]:
        return baselines.encode(model.encoders.values(), pixels)

    def theirs(pixels: list[Tensor], model: Any, wholes: nn.ModuleList, *rest: Any, run: Any = None) -> list[Tensor]:
        return baselines.encode([partial(whole, run=run) for whole in wholes], pixels)

    ways = [Way(OURS, ours, [theirs]), Way(EAGER, theirs)]
    if on_gpu:
        ways += [Way(SERIAL, serially, [theirs]), Way(GRAPHED, ours_graphed, [theirs])]
    if compiles:
        ways.append(Way(OURS_COMPILED, ours_compiled, [theirs]))
        ways.append(Way(COMPILED, partial(theirs, run=compile_once(run_block)), [theirs]))
    name = f"encoders, all four, {sizes(configs['dinov2'])}"
    cost = partial(encoder_cost, list(configs.values()), B, setup.dtype.itemsize)
    # Most of the work is that of the two widest.
    return Entry(Case(name, B, make, theirs, ways, cost), setup, product_of(configs["dinov2"], B))


def build(setup: Setup, config: EncoderConfig, peer: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    """Ours, with the weights of ``peer`` if there is one, and the reference's with those of ours."""
    with torch.device(setup.device):
        encoder = VisionTransformer(config)
        if peer is not None:
            encoder.load_state_dict(convert_state_dict(config, peer.state_dict()))
        whole = ReferenceEncoder(encoder)
    return place(setup, encoder), place(setup, whole)


def video_model(setup: Setup, configs: dict[str, EncoderConfig]) -> MervVideoModel:
    """All of MERV before its language model, with random weights."""
    named = {f"{name}_config": MervEncoderConfig.from_encoder(config) for name, config in configs.items()}
    width = configs["dinov2"].width
    # Only its width matters: the visual tokens have it.
    text = LlamaConfig(hidden_size=4 * width, num_hidden_layers=1)
    config = MervConfig(encoders=list(configs), text_config=text, projector_token_length=16, **named)
    with torch.device(setup.device):
        return place(setup, MervVideoModel(config))


def place(setup: Setup, module: nn.Module) -> Any:
    return module.to(setup.device, setup.dtype).eval()


def rand_pixels(setup: Setup, B: int, config: EncoderConfig) -> Tensor:
    return setup.rand(B, config.num_frames, 3, config.image_size, config.image_size)


def sizes(config: EncoderConfig) -> str:
    return f"{config.image_size} px, {config.blocks} blocks of {config.width}"


def product_of(config: EncoderConfig, B: int) -> tuple[int, int, int]:
    """The largest product of a block: every token into the MLP's hidden layer."""
    rows, columns = config.patch_grid
    slots = config.num_frames // config.tubelet
    prefix = config.prefix_tokens * (1 if config.attention == "joint" else slots)
    return B * (slots * rows * columns + prefix), config.width, config.mlp_width


def encoder_cost(configs: Sequence[EncoderConfig], B: int, itemsize: int, *arguments: Any) -> Cost:
    """Products of the blocks that are needed; pixels and weights read once, tokens written."""
    macs = numbers = 0
    for config in configs:
        with torch.device("meta"):
            encoder = VisionTransformer(config)
            pixels = rand_pixels(Setup("meta", torch.float32, MERV), 1, config)
        tokens, needed = count(encoder, pixels)
        macs += needed.macs
        numbers += parameters(encoder) + B * (pixels.numel() + tokens.numel())
    return Cost(2 * B * macs, numbers * itemsize)


def dinov2(config: EncoderConfig) -> nn.Module:
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=config.width,
            num_attention_heads=config.heads,
            num_hidden_layers=config.blocks,
            mlp_ratio=config.mlp_width // config.width,
            image_size=config.image_size,
            patch_size=config.patch,
            num_register_tokens=config.register_tokens,
        )
    )
    # MERV takes the stream before it.
    model.layernorm = nn.Identity()
    return model


def siglip(config: EncoderConfig) -> nn.Module:
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.width,
            num_attention_heads=config.heads,
            num_hidden_layers=config.blocks,
            intermediate_size=config.mlp_width,
            image_size=config.image_size,
            patch_size=config.patch,
            hidden_act="gelu",
            vision_use_head=False,
        )
    )
    # Older releases keep the transformer one level down.
    tower = getattr(model, "vision_model", model)
    tower.post_layernorm = nn.Identity()
    return model


def vivit(config: EncoderConfig) -> nn.Module:
    return VivitModel(
        VivitConfig(
            hidden_size=config.width,
            num_attention_heads=config.heads,
            num_hidden_layers=config.blocks,
            intermediate_size=config.mlp_width,
            image_size=config.image_size,
            num_frames=config.num_frames,
            # The same function as its gelu_fast, with constants that are exact in float64 too.
            hidden_act="gelu_pytorch_tanh",
        ),
        add_pooling_layer=False,
    )


PEERS: dict[str, Callable[[EncoderConfig], nn.Module]] = {"dinov2": dinov2, "siglip": siglip, "vivit": vivit}


def build_peer(setup: Setup, config: EncoderConfig) -> nn.Module:
    """transformers' encoder with random weights."""
    with torch.device(setup.device):
        peer = PEERS[config.family](config)
    for name, parameter in peer.named_parameters():
        # Ours holds sums of these with others: with zeros both hold the same numbers in every dtype.
        if name.endswith(("cls_token", "projection.bias", "patch_embedding.bias")):
            nn.init.zeros_(parameter)
    return place(setup, peer)


def patches_of(peer: nn.Module, config: EncoderConfig, pixels: Tensor) -> Tensor:
    """``[B, T, N, C]`` from a model of images, or of a video."""
    slots = config.num_frames // config.tubelet
    images = pixels if config.attention == "joint" else pixels.flatten(0, 1)
    return peer(images).last_hidden_state[:, config.prefix_tokens :].reshape(len(pixels), slots, -1, config.width)
