"""A folder in our format tells transformers where our classes are, also where nobody has imported us."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["MODULE", "write_auto_map"]

MODULE = "merv_fast_classes"
"""Name of the file that transformers imports from the folder."""

SOURCE = '''"""The classes of this model are those of merv_fast: pip install merv-fast."""

from merv_fast.models import (  # noqa: F401
    MervConfig,
    MervForConditionalGeneration,
    MervProcessor,
    MervVideoModel,
    MervVideoProcessor,
)
'''

AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "MervConfig",
        "AutoModel": "MervVideoModel",
        "AutoModelForMultimodalLM": "MervForConditionalGeneration",
        "AutoModelForImageTextToText": "MervForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "MervProcessor", "AutoVideoProcessor": "MervVideoProcessor"},
}
"""What each file says of the Auto classes."""


def write_auto_map(folder: str | Path) -> None:
    """Let ``from_pretrained(folder, trust_remote_code=True)`` of transformers' Auto classes find ours.

    A model that was saved needs it to be loaded from the hub by those who have not imported ``merv_fast``; installed it
    must be all the same.

    Args:
        folder: with ``config.json``, and ``processor_config.json`` if there is a processor.
    """
    folder = Path(folder)
    (folder / f"{MODULE}.py").write_text(SOURCE)
    for name, classes in AUTO_MAPS.items():
        if (path := folder / name).is_file():
            values = json.loads(path.read_text())
            values["auto_map"] = {auto: f"{MODULE}.{ours}" for auto, ours in classes.items()}
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
