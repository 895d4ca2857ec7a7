"""Read the outputs of the reference implementation that lie in tests/golden."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and decoded metadata of ``golden/<name>.safetensors``."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = {
            key: json.loads(value) if value[:1] in '{["0123456789' else value
            for key, value in (file.metadata() or {}).items()
        }
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


def weights(tensors: dict[str, Tensor], prefix: str = "weight.") -> dict[str, Tensor]:
    """The state dict stored under ``prefix``."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
