"""A model of two encoders and 16 visual tokens, clips, and a data file about them: training at a size of seconds."""

import dataclasses
import json

import av
import numpy as np
import torch
from transformers import LlamaConfig

from merv_fast.encoders import encoder_config
from merv_fast.models import MervConfig, MervForConditionalGeneration, MervModel
from merv_fast.models.configuration import MervEncoderConfig
from merv_fast.training.stages import RECOMPUTE
from tests.models.random_merv import tiny_processor

ENCODERS = {"dinov2-video-all-tokens": (4, 42), "vivit-google-b-all-no-cls-16frames": (8, 48)}
"""Frames and side of the pictures, 3 x 3 patches each."""

WORDS = ("red ball", "blue box", "green square", "yellow circle", "person", "shape", "color", "room")
ANSWERS = [f"{verb} {word}." for word in WORDS for verb in ("The", "No")]
QUICK = {"dataloader_num_workers": 0, "disable_tqdm": True, "save_strategy": "no", RECOMPUTE: False}


def small_model(seed=0, prompt_format="pure"):
    encoders = {}
    for encoder_id, (frames, side) in ENCODERS.items():
        full = encoder_config(encoder_id, 32)
        recipe = dataclasses.replace(full.recipe, size=side)
        sizes = {"width": 32, "heads": 2, "mlp_width": 64, "depth": 3, "image_size": side}
        sizes |= {"recipe": recipe, "num_frames": frames}
        encoders[full.family] = dataclasses.replace(full, **sizes, blocks=3 - (full.depth - full.blocks))
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = MervConfig(
        encoders=list(encoders),
        text_config=text,
        projector_token_length=4,
        fusion_query_width=32,
        video_token_id=3,
        model_id="small",
        prompt_format=prompt_format,
        trained=False,
        **{f"{name}_config": MervEncoderConfig.from_encoder(encoder) for name, encoder in encoders.items()},
    )
    torch.manual_seed(seed)
    model = MervForConditionalGeneration(config)
    return MervModel(model, tiny_processor(model))


def write_clips(folder, count):
    """Clips of two sizes; each has a pattern of its own, which moves."""
    paths = []
    for index in range(count):
        size = (48, 64) if index % 3 else (64, 48)
        noise = np.random.default_rng(index).integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
        picture = noise.repeat(16, axis=0).repeat(16, axis=1)
        with av.open(str(folder / f"{index}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for frame in range(10):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(picture, frame, axis=1), format="rgb24")))
            file.mux(stream.encode())
        paths.append(folder / f"{index}.mp4")
    return paths


def conversation(answer, question="What happens?", **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**media, "conversations": turns}


def write_data(folder, entries, name="data.json"):
    (folder / name).write_text(json.dumps(entries))
    return folder / name
