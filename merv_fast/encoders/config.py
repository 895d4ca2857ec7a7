"""EncoderConfig: everything that fixes one vision transformer and what it returns."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from merv_fast.video.prepare import Recipe

__all__ = ["EncoderConfig", "Tokens"]

Tokens = Literal["grid", "all", "class", "mean", "class-first", "classes-first", "pooled"]


@dataclass(frozen=True)
class EncoderConfig:
    """One vision transformer; ``dataclasses.asdict`` makes it JSON and ``from_dict`` reads it back.

    A slot is ``tubelet`` consecutive frames of ``n`` patches. ``tokens`` says which tokens are returned:

    | tokens | slots T | tokens a slot N |
    |---|---|---|
    | ``grid`` | F / tubelet | n patches, row by row |
    | ``all`` | F / tubelet (joint attention: 1) | prefix, then patches |
    | ``class`` | F / tubelet (joint: 1) | the class token |
    | ``mean`` | F / tubelet | mean of all tokens |
    | ``class-first`` | 1 | mean of the slots' class tokens, then the patches of every slot |
    | ``classes-first`` | 1 | class tokens of every slot, then the patches of every slot |
    | ``pooled`` | F / tubelet | output of the attention-pool head |

    Args:
        name: the reference's id of the encoder.
        family: whose naming its checkpoints follow (``languagebind``, ``dinov2``, ``vivit``, ``siglip``).
        source: repository of its weights on the hub.
        files: files of that repository which hold the weights; the first that exists is taken.
        recipe: how frames become pixels.
        image_size: side of the frames in pixels, a multiple of ``patch``.
        num_frames: frames of a video, a multiple of ``tubelet`` and of ``temporal_window``.
        patch: side of a patch in pixels.
        width, depth, heads, mlp_width: the transformer; ``depth`` is that of the checkpoint.
        blocks: how many of the ``depth`` blocks are run; only those exist.
        tokens: which tokens are returned, see above.
        tubelet: frames of a slot.
        attention: ``frame`` (within each slot) or ``joint`` (all tokens of the video together).
        temporal_window: frames that attend to each other, patch by patch, first in every block; or None.
        class_token: whether a class token is first.
        register_tokens: how many registers follow the class token.
        embedding_norm: whether a LayerNorm comes before the first block.
        layer_scale: whether each residual branch is scaled by a learned vector.
        final_norm: whether a LayerNorm follows the last block that is run.
        activation: ``gelu`` (exact) or ``gelu_tanh`` (its tanh approximation, ``gelu_fast`` of transformers).
        eps: of every LayerNorm.
        slot_stride: every how many slots are returned (``grid`` only).

    Raises:
        ValueError: a field breaks one of these rules.
    """

    name: str
    family: str
    source: str
    files: tuple[str, ...]
    recipe: Recipe
    image_size: int
    num_frames: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    blocks: int
    tokens: Tokens
    tubelet: int = 1
    attention: Literal["frame", "joint"] = "frame"
    temporal_window: int | None = None
    class_token: bool = True
    register_tokens: int = 0
    embedding_norm: bool = False
    layer_scale: bool = False
    final_norm: bool = False
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    eps: float = 1e-6
    slot_stride: int = 1

    def __post_init__(self) -> None:
        for name in ("patch", "width", "heads", "mlp_width", "tubelet", "slot_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder: {name} must be at least 1, got {getattr(self, name)}")
        if self.temporal_window is not None and self.temporal_window < 2:
            raise ValueError(f"encoder: temporal_window must be at least 2, got {self.temporal_window}")
        if self.image_size < self.patch or self.image_size % self.patch:
            rule = f"a positive multiple of the patch ({self.patch})"
            raise ValueError(f"encoder: image_size must be {rule}, got {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"encoder: heads must divide width ({self.width}), got {self.heads}")
        if not 1 <= self.blocks <= self.depth:
            raise ValueError(f"encoder: blocks must be 1 to depth ({self.depth}), got {self.blocks}")
        choices = {
            "tokens": get_args(Tokens),
            "attention": ("frame", "joint"),
            "activation": ("gelu", "gelu_tanh"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"encoder: {name} must be one of {list(values)}, got {getattr(self, name)!r}")
        if self.tokens in ("class", "class-first", "classes-first") and not self.class_token:
            raise ValueError(f"encoder: tokens must do without a class token, got {self.tokens!r}")
        if self.attention == "joint" and (self.temporal_window or self.tokens in ("mean", "pooled")):
            rule = f"'frame' with temporal_window {self.temporal_window} and tokens {self.tokens!r}"
            raise ValueError(f"encoder: attention must be {rule}, got 'joint'")
        if self.slot_stride > 1 and self.tokens != "grid":
            raise ValueError(f"encoder: slot_stride must be 1 with tokens {self.tokens!r}, got {self.slot_stride}")
        self.check_frames(self.num_frames)

    def check_frames(self, frames: int) -> None:
        """Raise ``ValueError`` unless a video of so many frames can be encoded."""
        multiple = self.tubelet * (self.temporal_window or 1)
        if frames < 1 or frames % multiple:
            raise ValueError(f"{self.name}: frames must be a positive multiple of {multiple}, got {frames}")
        if self.attention == "joint" and frames != self.num_frames:
            raise ValueError(f"{self.name}: frames must be {self.num_frames}, as positions are, got {frames}")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a frame."""
        side = self.image_size // self.patch
        return side, side

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.register_tokens

    @property
    def slots(self) -> int:
        """Temporal slots T that are returned for ``num_frames`` frames."""
        if self.tokens in ("class-first", "classes-first"):
            return 1
        if self.attention == "joint" and self.tokens in ("all", "class"):
            return 1
        return len(range(0, self.num_frames // self.tubelet, self.slot_stride))

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a returned slot's tokens, (1, 1) for a single one, None where they are no grid."""
        if self.tokens in ("class", "mean", "pooled"):
            return 1, 1
        return self.patch_grid if self.tokens == "grid" else None

    @property
    def tokens_per_slot(self) -> int:
        """Tokens N of a returned slot."""
        patches = self.patch_grid[0] * self.patch_grid[1]
        slots = self.num_frames // self.tubelet
        match self.tokens:
            case "grid":
                return patches
            case "all":
                return self.prefix_tokens + patches * (slots if self.attention == "joint" else 1)
            case "class-first":
                return 1 + slots * patches
            case "classes-first":
                return (1 if self.attention == "joint" else slots) + slots * patches
            case _:
                return 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncoderConfig":
        """The configuration whose ``dataclasses.asdict`` (perhaps through JSON) is ``values``.

        Raises:
            ValueError: a key is unknown or missing.
        """
        needed = {field.name: field.default is MISSING for field in fields(cls)}
        unknown = sorted(values.keys() - needed.keys())
        missing = sorted(name for name, must in needed.items() if must and name not in values)
        if unknown or missing:
            listed = f"unknown {unknown}, missing {missing}"
            raise ValueError(f"EncoderConfig: keys must be the fields of EncoderConfig, got {listed}")
        recipe = values["recipe"]
        recipe = Recipe(**recipe) if isinstance(recipe, Mapping) else recipe
        return cls(**{**values, "files": tuple(values["files"]), "recipe": recipe})
