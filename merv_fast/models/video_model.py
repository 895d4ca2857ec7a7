"""MervVideoModel: a video to visual tokens; and what every MERV class tells transformers about itself."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from merv_fast.encoders import AnyEncoderConfig, build_encoder
from merv_fast.errors import CheckpointError
from merv_fast.models.configuration import MervConfig
from merv_fast.models.quantization import language_model_only
from merv_fast.modules import Architecture, Tail, build_fusion, build_projector
from merv_fast.modules.attention import attention_of, check_attention, set_attention
from merv_fast.runtime.chunking import in_chunks
from merv_fast.runtime.concurrent import ConcurrentEncoders
from merv_fast.runtime.front_end import FrontEndGraphs
from merv_fast.runtime.placement import Placement, choose_devices, devices_of, move_encoders
from merv_fast.spans import span
from merv_fast.video.prepare import prepare_all

__all__ = ["MervPreTrainedModel", "MervVideoModel", "MervVideoOutput"]

logger = logging.getLogger("merv_fast")

CPU_BUDGET = 4 * 2**30

ALIVE = {False: 12, True: 104}
"""Numbers alive in an encoder at its peak for each number that it returns; of Hiera, whose first stage is the largest.
Measured: 11.0 to 11.3 in the four vision transformers, 96 in Hiera."""


@dataclass
class MervVideoOutput(BaseModelOutputWithPooling):
    """Visual tokens of a batch of videos.

    Args:
        pooler_output: [B, S, D], the tokens that enter the language model.
        encoder_weights: [B, E], the share of each encoder in them; None where the fusion has none.
    """

    encoder_weights: Tensor | None = None


class MervPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = MervConfig
    base_model_prefix = "video_model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video", "text")
    _no_split_modules = ("VisionTransformer", "Hiera", "Tail")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)
    supports_gradient_checkpointing = True  # of the language model; encoders are frozen, as a rule

    @property
    def device(self) -> torch.device:
        """Where the tail of the video model is; encoders may be elsewhere."""
        tail = getattr(self.base_model, "tail", None)
        weight = None if tail is None else next(tail.parameters(), None)
        return super().device if weight is None else weight.device

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but keys that do not fit raise instead of leaving random weights.

        A ``quantization_config`` holds for the language model alone, and a ``device_map`` never cuts an encoder in two.

        Raises:
            CheckpointError: lists the unknown, missing and misshapen keys.
        """
        kwargs["ignore_mismatched_sizes"] = True
        if kwargs.get("quantization_config") is not None:
            if issubclass(cls, MervVideoModel):
                rule = "left out: only a language model is quantised"
                raise ValueError(f"MervVideoModel.from_pretrained: quantization_config must be {rule}")
            kwargs["quantization_config"] = language_model_only(kwargs["quantization_config"])
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        try:
            with _without_load_report():
                model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{source}: cannot be read as weights ({error})") from error
        if getattr(model, "hf_device_map", None) and model.device.type == "meta":
            rule = "keep projectors and fusion (video_model.tail) on a device; all else may be offloaded"
            raise ValueError(f"from_pretrained: device_map must {rule}, got {model.hf_device_map}")
        faults = {
            "unknown": sorted(info["unexpected_keys"]),
            "missing": sorted(info["missing_keys"]),
            "misshapen": [f"{key} {list(got)} for {list(need)}" for key, got, need in sorted(info["mismatched_keys"])],
        }
        if any(faults.values()):
            listed = "; ".join(f"{kind} keys: {', '.join(keys)}" for kind, keys in faults.items() if keys)
            raise CheckpointError(f"{source or 'state_dict'}: the weights do not fit the model: {listed}")
        return (model, info) if output_loading_info else model

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], **kwargs: Any) -> None:
        """As in transformers; what is given for ``<name>_config`` goes to ``MervVideoModel.set_attention``.

        A name that is not among transformers' own can only be given so, part by part.
        """
        video, given = self.base_model, attn_implementation
        if isinstance(given, str):
            given = {"": given} | dict.fromkeys(self.config.sub_configs, given)
        keys = {f"{name}_config": name for name in video.encoders}
        chosen = {keys[key]: value for key, value in given.items() if key in keys}
        video._choices(chosen)
        super().set_attn_implementation({key: value for key, value in given.items() if key not in keys}, **kwargs)
        video.set_attention(chosen)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave each module the initial values of its own constructor: loading never needs others."""


class MervVideoModel(MervPreTrainedModel):
    """From frames to visual tokens: every encoder, its projector, and the fusion; no language model.

    Each step is a method, so that callers can time, cache or place them: ``prepare`` -> ``encode`` -> ``fuse``.

    Attributes:
        concurrent: runs the encoders; on a GPU side by side.
        ways: milliseconds of the ways to run them that `use_fastest` has tried, that which it chose first.
        encode_budget: bytes that encoding may take on each device beside weights and results, from which follows how
            many videos are encoded at a time. None is a quarter of a GPU's memory, and 4 GiB on a CPU.
    """

    _keys_to_ignore_on_load_unexpected = (r"^language_model\.",)

    def __init__(self, config: MervConfig) -> None:
        super().__init__(config)
        self.encoder_configs = configs = config.encoder_configs()
        width = config.get_text_config().hidden_size
        self.encoders = nn.ModuleDict({name: build_encoder(encoder) for name, encoder in configs.items()})
        for name, encoder in self.encoders.items():
            backend = getattr(config, f"{name}_config")._attn_implementation
            # Weights may yet be moved and cast: the first call tells whether it serves.
            set_attention(encoder, backend or "sdpa", placed=False)
            if backend is not None:
                getattr(config, f"{name}_config")._attn_implementation = attention_of(encoder)
        resampled = Architecture.parse(config.arch_specifier).resampler != "none"
        projectors = [
            build_projector(
                config.arch_specifier,
                encoder.width,
                width,
                config.projector_token_length if resampled else encoder.tokens_per_slot,
                encoder.slots,
                encoder.grid,
            )
            for encoder in configs.values()
        ]
        fusion = build_fusion(
            config.feature_fusion,
            len(configs),
            width,
            config.fusion_query_width,
            config.fusion_positional_embedding,
        )
        self.tail = Tail(projectors, fusion)
        self.num_video_tokens = self.tail.output_tokens
        self.concurrent = ConcurrentEncoders(self.encoders)
        self.ways: Mapping[str, float] = {}
        self.encode_budget: int | None = None
        self._warned_of: int | None = -1
        self._placed: Placement | None = None
        self.post_init()

    @property
    def attention(self) -> dict[str, str]:
        """What computes the attention of each encoder, by its name."""
        return {name: attention_of(encoder) for name, encoder in self.encoders.items()}

    def set_attention(self, backend: str | Mapping[str, str]) -> None:
        """Choose what computes the attention of all encoders, or of those that are named: ``{"dinov2": "xformers"}``.

        The choices are those of `merv_fast.modules.set_attention`, for the device and dtype that the model has now. If
        one does not serve, none is changed. Of ``fastest`` and ``flash_attention`` ``attention`` and the configuration
        say for each encoder what it was decided to be.

        Raises:
            ValueError: no such backend or encoder, or a device, dtype or head size that does not fit.
            ImportError: the package of the backend is missing.
            RuntimeError: the backend failed at a small attention here, or computed it wrongly; or ``fastest`` was asked
                for while a CUDA graph is captured.
        """
        for name, choice in self._choices(backend).items():
            set_attention(self.encoders[name], choice)
            getattr(self.config, f"{name}_config")._attn_implementation = attention_of(self.encoders[name])

    def _choices(self, backend: str | Mapping[str, str]) -> dict[str, str]:
        """The choice for each encoder that `set_attention` would make; raises what it would raise."""
        chosen = dict.fromkeys(self.encoders, backend) if isinstance(backend, str) else dict(backend)
        if unknown := sorted(chosen.keys() - set(self.encoders)):
            rule = f"among {', '.join(self.encoders)}"
            raise ValueError(f"MervVideoModel: encoders must be {rule}, got {', '.join(unknown)}")
        for name, choice in chosen.items():
            check_attention(self.encoders[name], choice)
        return chosen

    @property
    def compiled(self) -> list[str]:
        """Names of the encoders whose blocks `use_compile` has compiled."""
        first = {name: blocks_of(encoder)[0] for name, encoder in self.encoders.items()}
        return [name for name, block in first.items() if block._compiled_call_impl is not None]

    def use_compile(self, encoders: bool | Collection[str] = True, **options: Any) -> None:
        """Run the blocks of encoders as `torch.compile` makes them: of all, of none, or of those that are named.

        Block by block, for all blocks of an encoder are one piece of code, which is compiled once, at the next call. A
        copy of the model is not compiled, and nothing of it is saved.

        Args:
            encoders: which; the others run as they are written.
            options: of `torch.compile`, such as ``mode`` or ``backend``.

        Raises:
            ValueError: no such encoder.
        """
        chosen = set(self.encoders if encoders is True else encoders or ())
        if unknown := sorted(chosen - set(self.encoders)):
            rule = f"among {', '.join(self.encoders)}"
            raise ValueError(f"MervVideoModel: encoders must be {rule}, got {', '.join(unknown)}")
        for name, encoder in self.encoders.items():
            for block in blocks_of(encoder):
                block._compiled_call_impl = None
                if name in chosen:
                    block.compile(**options)
        if self.graphs is not None:
            self.graphs.pool.clear()

    @property
    def placement(self) -> Placement:
        """Where each encoder is now, and why."""
        devices, tail = devices_of(self.encoders), self.device
        if self._placed is not None and (self._placed.devices, self._placed.tail) == (devices, tail):
            return self._placed
        reason = "where the model is" if set(devices.values()) == {tail} else "moved by other means than place"
        return Placement(devices, tail, reason)

    def place(self, placement: str | Mapping[str, str | torch.device]) -> Placement:
        """Move encoders to devices of their own: ``{"dinov2": "cuda:1", "siglip": "cuda:2"}`` or ``"balanced"``.

        Encoders that are not named are, or come back, to the model's own device, where frames are prepared and the tail
        runs. `encode` sends each encoder its input and gathers the tokens, all encoders running at the same time. If
        one cannot be moved, none is. A state dict has the same names and values as before, and a placement is not saved
        with a model. ``model.to(device)`` moves all encoders to that device, which ends the placement;
        ``model.to(dtype)`` keeps it.

        Args:
            placement: as `merv_fast.runtime.placement.choose_devices` takes it; ``{}`` ends a placement.

        Returns:
            Where encoders are now and why, as ``placement`` and `explain` say too. With fewer than two GPUs
            ``"balanced"`` leaves them on the model's device, and a warning says so.

        Raises:
            ValueError: no such encoder or device, a model without weights or on the ``meta`` device, or what computes
                the attention of an encoder does not serve there.
            torch.OutOfMemoryError: an encoder does not fit.
        """
        if next(self.tail.parameters(), None) is None:
            raise ValueError("place: tail must have weights, which say where it is, got none")
        placed = choose_devices(placement, self.encoder_configs, self.device)
        move_encoders(self.encoders, placed.devices)
        self._placed = placed
        if placement == "balanced" and set(placed.devices.values()) == {placed.tail}:
            logger.warning("place: all encoders stay on %s: %s", placed.tail, placed.reason)
        return placed

    def prepare(self, pixel_values_videos: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Every encoder's input from the decoded frames, on the model's device.

        Args:
            pixel_values_videos: [B, F, 3, H, W], uint8 (or float in 0..1), or a list of B such [F, 3, H_i, W_i].

        Returns:
            E tensors [B, F_e, 3, S_e, S_e] in the model's dtype.
        """
        if not isinstance(pixel_values_videos, Tensor):
            return [
                torch.cat(parts) for parts in zip(*(self.prepare(v[None]) for v in pixel_values_videos), strict=True)
            ]
        return prepare_for(self.encoder_configs.values(), self._frames(pixel_values_videos), self.dtype)

    def _frames(self, pixel_values_videos: Tensor) -> Tensor:
        """[B, F, H, W, 3] on the model's device."""
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2] != 3:
            raise ValueError(
                "MervVideoModel: pixel_values_videos must be [B, F, 3, H, W] or a list of [F, 3, H, W], "
                f"got {list(pixel_values_videos.shape)}"
            )
        with span("copy") if pixel_values_videos.device != self.device else nullcontext():
            return pixel_values_videos.to(self.device).movedim(2, -1)

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every encoder's tokens: E tensors [B, T_e, N_e, C_e] from E prepared inputs [B, F_e, 3, S_e, S_e].

        So many videos at a time as ``encode_budget`` has room for; half as many once memory runs out. Encoders that are
        frozen run without gradients.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"MervVideoModel: inputs must be one per encoder ({len(self.encoders)}), got {len(inputs)}"
            )
        learns = any(tensor.requires_grad for tensors in (self.encoders.parameters(), inputs) for tensor in tensors)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and learns):
            # What a backward pass needs is kept in any case.
            return self.concurrent(inputs)
        call = self.concurrent if self.graphs is None else self.graphs.encode
        with torch.no_grad():
            return in_chunks(call, inputs, self.videos_at_once())

    def videos_at_once(self) -> int:
        """How many videos ``encode_budget`` has room for on every device, at least 1."""
        return max(1, self._room())

    def _room(self) -> int:
        """How many there is room for; if it is none, a warning says so once for each budget."""
        together: dict[torch.device, list[str]] = {}
        for name, device in self.placement.devices.items():
            together.setdefault(device, []).append(name)
        needs = {device: self.bytes_per_video(names) for device, names in together.items()}
        room = min(self._budget(device) // need for device, need in needs.items())
        if not room and self._warned_of != self.encode_budget:
            self._warned_of = self.encode_budget
            need, budget = (n / 2**20 for n in (max(needs.values()), min(map(self._budget, needs))))
            rule = "encode_budget should be at least the %.1f MiB that one video takes, got %.1f MiB"
            logger.warning(f"{rule}: videos are encoded one at a time", need, budget)
        return room

    def _budget(self, device: torch.device) -> int:
        if self.encode_budget is not None:
            return self.encode_budget
        on_gpu = device.type == "cuda"
        return torch.cuda.get_device_properties(device).total_memory // 4 if on_gpu else CPU_BUDGET

    def bytes_per_video(self, encoders: Iterable[str] | None = None) -> int:
        """What encoding one video takes at its peak, in those encoders or in all, beside weights and results."""
        configs = [self.encoder_configs[name] for name in encoders or self.encoders]
        numbers = (ALIVE[hasattr(c, "stages")] * c.slots * c.tokens_per_slot * c.width for c in configs)
        return sum(numbers) * self.dtype.itemsize

    def fuse(self, features: Sequence[Tensor]) -> MervVideoOutput:
        """Visual tokens [B, S, D] and encoder weights [B, E] from every encoder's tokens."""
        call = self.tail if self.graphs is None or torch.compiler.is_compiling() else self.graphs.fuse
        tokens, weights = call(list(features))
        return MervVideoOutput(pooler_output=tokens, encoder_weights=weights)

    graphs: FrontEndGraphs | None = None

    def replay(self, pixel_values_videos: Tensor) -> MervVideoOutput | None:
        """What `get_video_features` gives, by one CUDA graph; None where there is none, and the steps are to be taken.

        There is one after `use_graphs`, with gradients disabled, for uint8 frames whose shape has come before and that
        ``encode_budget`` has room for at once.

        Args:
            pixel_values_videos: [B, F, 3, H, W], uint8.
        """
        if self.graphs is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if pixel_values_videos.dtype != torch.uint8 or len(pixel_values_videos) > self.videos_at_once():
            return None
        try:
            output = self.graphs.replay(self._frames(pixel_values_videos))
        except torch.OutOfMemoryError as error:
            batch, reason = len(pixel_values_videos), str(error).partition("\n")[0]
            logger.warning("out of memory for a CUDA graph of %d videos, going on without (%s)", batch, reason)
            return None
        return None if output is None else MervVideoOutput(pooler_output=output[0], encoder_weights=output[1])

    def use_graphs(self, max_graphs: int | None = 4, max_bytes: int | None = None) -> None:
        """Replay what turns frames into tokens as CUDA graphs, of a plain call's kernels, while gradients are disabled.

        All of `get_video_features` is one graph for frames of a shape that comes for the second time; `encode` and
        `fuse`, called by themselves or for videos of several sizes, are one each. A small video is captured at once.
        ``graphs`` tells, printed, which there are and what they take; ``graphs.obstacle`` why there are none, as on a
        CPU or in training mode. A copy of the model has no graphs.

        Args:
            max_graphs: shapes that are kept of each of the three, the least recently used one making room; None for no
                graphs from now on.
            max_bytes: of all graphs and their buffers, all of which are dropped when there are more; None for no bound.

        Raises:
            ValueError: ``max_graphs`` is not positive.
        """
        if self.graphs is not None:
            self.graphs.pool.clear()
        self.graphs = None
        if max_graphs is not None:
            # Not a method, so that the model goes, with all that is captured of it, with its last name.
            prepare = partial(prepare_for, self.encoder_configs.values())
            num_frames = max(config.num_frames for config in self.encoder_configs.values())
            self.graphs = FrontEndGraphs(
                prepare, self.concurrent, self.tail, num_frames, max_graphs=max_graphs, max_bytes=max_bytes
            )

    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], return_dict: bool | None = None, **kwargs: Any
    ) -> MervVideoOutput | tuple[Any, ...]:
        """Visual tokens of a batch of videos; ``pooler_output`` is [B, S, D]."""
        output = self.replay(pixel_values_videos) if isinstance(pixel_values_videos, Tensor) else None
        if output is None:
            output = self.fuse(self.encode(self.prepare(pixel_values_videos)))
        return output.to_tuple() if return_dict is False else output

    def forward(
        self, pixel_values_videos: Tensor | Sequence[Tensor], **kwargs: Any
    ) -> MervVideoOutput | tuple[Any, ...]:
        """Same as ``get_video_features``."""
        return self.get_video_features(pixel_values_videos, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """A video model embeds no tokens; transformers asks for its first layer."""
        return next(iter(self.encoders.values()))


def prepare_for(configs: Collection[AnyEncoderConfig], frames: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Every encoder's input from frames [B, F, H, W, 3]."""
    return prepare_all(frames, [config.recipe for config in configs], [config.num_frames for config in configs], dtype)


def blocks_of(encoder: Any) -> nn.ModuleList:
    """What an encoder is made of."""
    return encoder.blocks


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers' table of keys out of the log: what it warns of raises here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
