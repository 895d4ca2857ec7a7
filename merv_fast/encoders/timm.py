"""How timm names a vision transformer; DINOv2 and SigLIP are published this way."""

TIMM_NAMES = {
    "cls_token": "class",
    "reg_token": "registers",
    "pos_embed": "position",
    "patch_embed.proj": "patch",
    "blocks.{}.norm1": "blocks.{}.norm1",
    "blocks.{}.attn.qkv": "blocks.{}.attention.qkv",
    "blocks.{}.attn.proj": "blocks.{}.attention.proj",
    "blocks.{}.ls1.gamma": "blocks.{}.scale1",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "blocks.{}.ls2.gamma": "blocks.{}.scale2",
    "norm": "norm",
    "attn_pool.latent": "pool.latent",
    "attn_pool.q": "pool.q",
    "attn_pool.kv": "pool.kv",
    "attn_pool.proj": "pool.proj",
    "attn_pool.norm": "pool.norm",
    "attn_pool.mlp.fc1": "pool.mlp.fc1",
    "attn_pool.mlp.fc2": "pool.mlp.fc2",
}
