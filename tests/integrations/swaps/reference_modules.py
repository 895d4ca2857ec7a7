"""Modules with the structure of the reference's, of prismatic's and of LLaVA's, in plain PyTorch."""

from functools import partial
from math import isqrt
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, VivitConfig, VivitModel

from tests.golden_files import load, weights


class LinearProjector(nn.Module):
    def __init__(self, width, llm_width):
        super().__init__()
        self.projector = nn.Linear(width, llm_width)
        self.layernorm = nn.Identity()

    def forward(self, x):
        return self.projector(self.layernorm(x))


class MLPProjector(LinearProjector):
    def __init__(self, width, llm_width):
        super().__init__(width, llm_width)
        self.projector = nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


class FusedMLPProjector(LinearProjector):
    def __init__(self, width, llm_width):
        super().__init__(width, llm_width)
        hidden = 4 * width
        layers = [nn.Linear(width, hidden), nn.Linear(hidden, llm_width), nn.Linear(llm_width, llm_width)]
        self.projector = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])


MLPS = {"linear": LinearProjector, "gelu-mlp": MLPProjector, "fused-gelu-mlp": FusedMLPProjector}


class AveragePoolingProjector(nn.Module):
    def __init__(self, width, llm_width, output_size, output_frames, mlp="linear"):
        super().__init__()
        self.output_size, self.output_frames = output_size, output_frames
        self.avg_pool = nn.AdaptiveAvgPool2d((output_size, output_size))
        self.projector = MLPS[mlp](width, llm_width) if mlp != "none" else nn.Identity()

    def forward(self, x):
        videos, frames, tokens, width = x.shape
        assert frames == self.output_frames
        side = isqrt(tokens)
        maps = x.reshape(videos * frames, side, side, width).permute(0, 3, 1, 2)
        pooled = self.avg_pool(maps).flatten(2).transpose(1, 2)
        return self.projector(pooled.reshape(videos, frames * self.output_size**2, width))


class AveragePooling3DProjector(nn.Module):
    def __init__(self, width, llm_width, output_frames, output_size, mlp="linear"):
        super().__init__()
        self.output_size, self.output_frames = output_size, output_frames
        self.avg_pooling = nn.AdaptiveAvgPool3d((output_frames, output_size, output_size))
        self.projector = MLPS[mlp](width, llm_width)

    def forward(self, x):
        side = isqrt(x.shape[2])
        maps = x.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)
        return self.projector(self.avg_pooling(maps).flatten(2).transpose(1, 2))


class CrossAttentionAdapter(nn.Module):
    def __init__(self, width, llm_width, token_length, encoders=4, positional_embedding=False):
        super().__init__()
        self.llm_dim, self.token_length, self.averagetoken = llm_width, token_length, True
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True, kdim=llm_width, vdim=llm_width)
        self.Q = nn.Parameter(torch.randn(1, width))
        self.num_encoder, self.positional_embedding = encoders, positional_embedding
        if positional_embedding:
            self.pe = nn.Parameter(torch.randn(encoders, llm_width))

    def forward(self, V):
        V = torch.stack([v.repeat(1, self.token_length, 1) if v.shape[1] == 1 else v for v in V], 1)
        keys = V.mean(2) + (self.pe if self.positional_embedding else 0)
        _, weights = self.attention(self.Q.expand(len(V), 1, -1), keys, keys)
        return torch.bmm(weights, V.flatten(2)).reshape(len(V), self.token_length, self.llm_dim), weights[:, 0]


class ScalarAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.randn(4))

    def forward(self, V):
        shares = self.scalar.softmax(0)
        return (torch.stack(V) * shares[:, None, None, None]).sum(0), shares[None]


class SelfAttention(nn.Module):
    """timm's, three projections in one."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.q_norm, self.k_norm = heads, nn.Identity(), nn.Identity()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden, act=nn.GELU):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act(), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, width, heads, scaled):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), SelfAttention(width, heads)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 4 * width)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.pool, self.pos_embed = heads, "token", None
        self.latent = nn.Parameter(torch.randn(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 4 * width)

    def forward(self, x):
        q = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (x + self.mlp(self.norm(x)))[:, 0]


class TimmViT(nn.Module):
    def __init__(self, embed_dim, depth, num_heads, img_size, patch, registers=0, num_classes=0):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch, patch)
        self.patch_embed.img_size, self.patch_embed.patch_size = (img_size, img_size), (patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim)) if registers else None
        self.reg_token = nn.Parameter(torch.randn(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch) ** 2, embed_dim))
        self.blocks = nn.Sequential(*[TimmBlock(embed_dim, num_heads, registers > 0) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(embed_dim, eps=1e-6), nn.Identity()
        self.attn_pool = None if registers else AttentionPool(embed_dim, num_heads)
        self.global_pool = "token" if registers else "map"
        self.prefix = 1 + registers if registers else 0

    def embed(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        tokens = [] if self.cls_token is None else [self.cls_token, self.reg_token]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1)

    def get_intermediate_layers(self, x, n=1, return_prefix_tokens=False, norm=False):
        x, found = self.embed(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in n:
                y = self.norm(x) if norm else x
                parts = y[:, self.prefix :], y[:, : self.prefix]
                found.append(parts if return_prefix_tokens else parts[0])
        return tuple(found)

    def forward(self, x):
        x = self.norm(self.blocks(self.embed(x)))
        return x[:, 0] if self.attn_pool is None else self.attn_pool(x)


def unpack_tuple(fn):
    def wrapper(*args, **kwargs):
        result = fn(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    return wrapper


def one_block(vit, **kwargs):
    """The tokens of the last block but one, put in the place of the forward as the reference and prismatic do."""
    vit.forward = unpack_tuple(partial(vit.get_intermediate_layers, n={len(vit.blocks) - 2}, **kwargs))
    return vit


class ClipAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClipLayer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        width, heads = shape.hidden_size, shape.num_attention_heads
        self.t = shape.num_frames
        self.temporal_embedding = nn.Parameter(torch.randn(1, self.t, width))
        self.temporal_attn, self.temporal_layer_norm1 = ClipAttention(width, heads), nn.LayerNorm(width)
        self.self_attn, self.layer_norm1 = ClipAttention(width, heads), nn.LayerNorm(width)
        self.mlp, self.layer_norm2 = Mlp(width, shape.intermediate_size), nn.LayerNorm(width)

    def forward(self, x):
        over_time = x.unflatten(0, (-1, self.t)).transpose(1, 2).flatten(0, 1) + self.temporal_embedding
        over_time = over_time + self.temporal_attn(self.temporal_layer_norm1(over_time))
        x = over_time.unflatten(0, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class LanguageBindTower(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.config, width = shape, shape.hidden_size
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, shape.patch_size, shape.patch_size, bias=False)
        self.embeddings.position_embedding = nn.Embedding(1 + (shape.image_size // shape.patch_size) ** 2, width)
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.encoder.layers = nn.ModuleList(ClipLayer(shape) for _ in range(shape.num_hidden_layers))

    def forward(self, videos, output_hidden_states=True):
        x = self.embeddings.patch_embedding(videos.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        states = [self.pre_layrnorm(x + self.embeddings.position_embedding.weight)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return SimpleNamespace(hidden_states=[state.unflatten(0, (len(videos), -1)) for state in states])


class LangBindVideoBackbone(nn.Module):
    def __init__(self, shape, token="noclass"):
        super().__init__()
        self.featurizer, self.token = LanguageBindTower(shape).eval(), token

    def forward(self, video_values, is_image):
        x = self.featurizer(video_values, output_hidden_states=True).hidden_states[-2]
        match self.token:
            case "average":
                x = x.mean(-2)
            case "classemb":
                x = x[:, :, 0]
            case "noclass":
                x = x[:, :, 1:]
            case "classemb-at-first":
                return torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].flatten(1, 2)], 1)
        return x.reshape(len(x), -1, x.shape[-1])


class FrameBackbone(nn.Module):
    """The reference's DINOv2 and SigLIP backbones."""

    def __init__(self, vit):
        super().__init__()
        self.featurizer = vit.eval()

    def forward(self, video_values, is_image):
        x = self.featurizer(video_values.flatten(0, 1))
        return x.reshape(len(video_values), -1, x.shape[-1])


class VivitBackbone(nn.Module):
    def __init__(self, featurizer):
        super().__init__()
        self.featurizer = featurizer.eval()

    def forward(self, video_values, is_image):
        return self.featurizer(video_values).last_hidden_state[:, 1:]


class Merv(nn.Module):
    """The reference's model object, from the golden files: its parts under its names, and its forward pass."""

    def __init__(self, name="model_cross_attention_avg_lq_linear"):
        super().__init__()
        tensors, shape = load(name)
        self.slots = 8
        mlp, width = shape["arch_specifier"].split("+")[-1], shape["llama"]["hidden_size"]
        self.video_backbones = nn.ModuleList(
            [LangBindVideoBackbone(golden_shape("languagebind")), dinov2(), VivitBackbone(vivit()), siglip()]
        )
        side = isqrt(shape["projector_token_length"])
        self.projectors = nn.ModuleList(AveragePoolingProjector(48, width, side, 8, mlp) for _ in range(4))
        self.feature_fusion = CrossAttentionAdapter(
            shape["cross_attention_embed_dim"], width, shape["visual_feature_length"]
        )
        self.llm_backbone = nn.Module()
        self.llm_backbone.llm = LlamaForCausalLM(LlamaConfig(**shape["llama"]))
        for index, family in enumerate(["languagebind", "dinov2", "vivit", "siglip"]):
            load_golden(self.video_backbones[index].featurizer, family)
        for group in ("projectors", "feature_fusion", "llm_backbone"):
            self.get_submodule(group).load_state_dict(weights(tensors, f"checkpoint.{group}."))
        self.requires_grad_(False).eval()

    def visual(self, video_values):
        """Visual tokens and encoder weights."""
        features = [backbone(video, None) for backbone, video in zip(self.video_backbones, video_values, strict=True)]
        everyone = torch.arange(len(features[0]))
        features = [x[everyone].unflatten(1, (self.slots, -1)) for x in features]
        return self.feature_fusion([project(x) for project, x in zip(self.projectors, features, strict=True)])

    def forward(self, input_ids, attention_mask, video_values):
        tokens, _ = self.visual(video_values)
        embeds = self.llm_backbone.llm.get_input_embeddings()(input_ids)
        embeds = torch.cat([embeds[:, :1], tokens, embeds[:, 1:]], 1)
        mask = torch.cat([attention_mask[:, :1], torch.ones(tokens.shape[:2]), attention_mask[:, 1:]], 1)
        return self.llm_backbone.llm(inputs_embeds=embeds, attention_mask=mask).logits


def golden_shape(family):
    """The configuration of a golden encoder."""
    return SimpleNamespace(layer_norm_eps=1e-5, **load(f"encoder_{family}")[1]["config"])


def load_golden(module, family):
    """The weights of a golden encoder, also under the names that transformers now has for them."""
    state = weights(load(f"encoder_{family}")[0])
    if family == "vivit":
        for old, new in {
            "encoder.layer.": "layers.",
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        }.items():
            if not set(state) <= set(module.state_dict()):
                state = {key.replace(old, new): value for key, value in state.items()}
    module.load_state_dict(state)
    return module


def dinov2(**kwargs):
    return FrameBackbone(
        one_block(
            load_golden(TimmViT(**load("encoder_dinov2")[1]["config"], patch=14, registers=4), "dinov2"), **kwargs
        )
    )


def siglip():
    return FrameBackbone(one_block(load_golden(TimmViT(**load("encoder_siglip")[1]["config"], patch=16), "siglip")))


def vivit():
    return load_golden(VivitModel(VivitConfig(**load("encoder_vivit")[1]["config"]), add_pooling_layer=False), "vivit")


class DinoSigLip(nn.Module):
    """Prismatic's fused backbone, and the projector after it."""

    def __init__(self):
        super().__init__()
        shape = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 56, "patch": 14}
        self.dino_featurizer = one_block(TimmViT(**shape, registers=4)).eval()
        self.siglip_featurizer = one_block(TimmViT(**shape)).eval()
        self.projector = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))
        self.requires_grad_(False)

    def forward(self, pixel_values):
        dino, siglip = self.dino_featurizer(pixel_values["dino"]), self.siglip_featurizer(pixel_values["siglip"])
        return self.projector(torch.cat([dino, siglip], dim=2))


class Llava(nn.Module):
    """LLaVA-NeXT's way from features to pooled tokens."""

    def __init__(self, depth=2, mode="average", side=6, width=24, llm_width=32):
        super().__init__()
        self.model, self.side, self.config = nn.Module(), side, SimpleNamespace(mm_spatial_pool_mode=mode)
        layers = [nn.Linear(width, llm_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
        self.model.mm_projector = layers[0] if depth == 1 else nn.Sequential(*layers)

    def get_model(self):
        return self.model

    def get_2dPool(self, image_feature, stride=2):
        frames, _, width = image_feature.shape
        maps = image_feature.view(frames, self.side, self.side, -1).permute(0, 3, 1, 2).contiguous()
        if self.config.mm_spatial_pool_mode == "average":
            maps = avg_pool2d(maps, stride)
        else:
            size = [-(-self.side // stride)] * 2
            maps = interpolate(maps, size=size, mode="bilinear")
        return maps.permute(0, 2, 3, 1).view(frames, -1, width)

    def forward(self, features, sizes, stride=2):
        """Videos of ``sizes`` frames among ``features`` [frames, side * side, C]; a single frame is not pooled."""
        parts = torch.split(self.model.mm_projector(features), sizes)
        return [self.get_2dPool(part, stride) if len(part) > 1 else part for part in parts]
