"""Which device runs which encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from merv_fast.encoders import build_encoder
from merv_fast.encoders.registry import AnyEncoderConfig
from merv_fast.modules.attention import attention_of, check_attention
from merv_fast.runtime.concurrent import share_out

__all__ = ["Placement", "bytes_copied", "choose_devices", "devices_of", "encoder_flops", "move_encoders"]


@dataclass(frozen=True)
class Placement:
    """Where encoders are.

    Args:
        devices: of each encoder, by its name.
        tail: where frames are prepared, and where the encoders' tokens come together.
        reason: why it is so, in words.
    """

    devices: dict[str, torch.device]
    tail: torch.device
    reason: str

    def __str__(self) -> str:
        parts = [f"{name} on {device}" for name, device in self.devices.items()]
        return f"{', '.join(parts)}; the rest on {self.tail}: {self.reason}"


def choose_devices(
    placement: str | Mapping[str, str | torch.device], configs: Mapping[str, AnyEncoderConfig], tail: torch.device
) -> Placement:
    """What ``placement`` asks for, checked; nothing is moved.

    Args:
        placement: a device for each encoder that is not to be where ``tail`` is; or ``balanced``: the encoder with
            most FLOPs first, each to the GPU that has least to do, that of ``tail`` first. All GPUs count as equally
            fast. With fewer than two all encoders are where ``tail`` is, and the reason says so.
        configs: of the encoders, by their names.
        tail: the model's own device.

    Raises:
        ValueError: no such encoder or device, a model on the ``meta`` device, or ``balanced`` with several GPUs and a
            model on none of them.
    """
    if tail.type == "meta":
        raise ValueError("place: model must have weights, got one on the meta device")
    if isinstance(placement, str):
        if placement != "balanced":
            raise ValueError(f"place: placement must be 'balanced' or a device for each encoder, got {placement!r}")
        return balance(configs, tail)
    if unknown := sorted(placement.keys() - configs.keys()):
        raise ValueError(f"place: encoders must be among {', '.join(configs)}, got {', '.join(unknown)}")
    chosen = {name: existing_device(device) for name, device in placement.items()}
    devices = {name: chosen.get(name, tail) for name in configs}
    return Placement(devices, tail, "as asked for")


def balance(configs: Mapping[str, AnyEncoderConfig], tail: torch.device) -> Placement:
    """The encoders over all GPUs, by their FLOPs."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        return Placement(dict.fromkeys(configs, tail), tail, f"nothing to balance, {len(gpus) or 'no'} GPU here")
    if tail not in gpus:
        raise ValueError(f"place: model must be on a GPU for its encoders to be balanced over several, got {tail}")
    # Of the heaviest neither input nor output is copied.
    gpus.sort(key=lambda gpu: gpu != tail)
    names, flops = list(configs), [encoder_flops(config) for config in configs.values()]
    shares = share_out(flops, len(gpus))
    devices = {names[index]: gpu for gpu, share in zip(gpus, shares, strict=False) for index in share}
    loads = {gpu: sum(flops[index] for index in share) for gpu, share in zip(gpus, shares, strict=False)}
    listed = ", ".join(f"{gpu} {load / 1e12:.3g}" for gpu, load in loads.items())
    return Placement({name: devices[name] for name in names}, tail, f"balanced, TFLOPs a video: {listed}")


def encoder_flops(config: AnyEncoderConfig) -> int:
    """FLOPs of one video in an encoder, counted on the ``meta`` device.

    Without those of attention over frames alone, 0.1% of LanguageBind's.
    """
    with torch.device("meta"):
        encoder = build_encoder(config)
        pixels = torch.empty(1, config.num_frames, 3, config.image_size, config.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(pixels)
    return counter.get_total_flops()


def existing_device(device: str | torch.device) -> torch.device:
    """``device`` as tensors name theirs.

    Raises:
        ValueError: it is neither the CPU nor a GPU that is here.
    """
    count = torch.cuda.device_count()
    rule = f"cpu{''.join(f', cuda:{index}' for index in range(count))}"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"place: devices must be among {rule}, got {device!r}") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda" or (found.index or 0) >= count:
        raise ValueError(f"place: devices must be among {rule}, got {str(device)!r}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def devices_of(encoders: nn.ModuleDict) -> dict[str, torch.device]:
    """Where the weights of encoders are."""
    return {name: next(encoder.parameters()).device for name, encoder in encoders.items()}


def move_encoders(encoders: nn.ModuleDict, devices: Mapping[str, torch.device]) -> None:
    """Move encoders to their devices: all of them, or none if one cannot be there.

    Raises:
        ValueError, RuntimeError: what computes the attention of an encoder does not serve there.
        torch.OutOfMemoryError: one does not fit.
    """
    before = {name: here for name, here in devices_of(encoders).items() if here != devices[name]}
    try:
        for name in before:
            encoders[name].to(devices[name])
            for backend in filter(None, attention_of(encoders[name]).split(", ")):
                check_attention(encoders[name], backend)
    except BaseException:
        for name, device in before.items():
            encoders[name].to(device)
        raise


def bytes_copied(configs: Mapping[str, AnyEncoderConfig], placement: Placement, itemsize: int) -> int:
    """Bytes of one video that go from the tail's device to encoders elsewhere, and back.

    What is sent are prepared inputs, not frames: to the encoders of merv-full in bfloat16 4.8 MB each, 9.6 MB to ViViT,
    whatever the video. Its frames would be 16.7 MB at 640 x 272 and 199 MB at 1920 x 1080 to each device, or half of it
    where nothing needs more than 16, and each would prepare them by itself. Back come 8.4 or 4.8 MB.
    """
    numbers = 0
    for name, config in configs.items():
        if placement.devices[name] != placement.tail:
            numbers += config.num_frames * 3 * config.image_size**2
            numbers += config.slots * config.tokens_per_slot * config.width
    return numbers * itemsize
