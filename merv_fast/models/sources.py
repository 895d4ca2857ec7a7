"""Where a model's parts are found: a local path that the caller names, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from merv_fast.encoders import AnyEncoderConfig, convert_state_dict, read_weights
from merv_fast.models.reference import CHECKPOINT, CONFIG

__all__ = ["MODELS", "Sources"]

HUB_REPO = "tyleryzhu/merv"

MODELS = {
    "merv-frozen": "MERV Frozen",
    "merv-full": "MERV Full",
    "languagebind-single": "LanguageBind Single Encoder",
    "dinov2-single": "DINOv2 Single Encoder",
    "vivit-single": "ViViT Single Encoder",
    "siglip-single": "SigLIP Single Encoder",
}
"""Published models of the reference by id, with the names it also takes."""


@dataclass(frozen=True)
class Sources:
    """What the caller says of where things are.

    Args:
        hf_token: token for gated repositories (LLaMA-2).
        cache_dir: folder for downloads, default that of huggingface_hub.
        llm_path: local folder with the language model's ``config.json`` and tokenizer.
        encoder_paths: local file or folder with the weights of each encoder, by the reference's encoder id.
        encoder_configs: configuration of an encoder that is not the published one, by the reference's encoder id.
    """

    hf_token: str | None = None
    cache_dir: str | Path | None = None
    llm_path: str | Path | None = None
    encoder_paths: Mapping[str, str | Path] = field(default_factory=dict)
    encoder_configs: Mapping[str, AnyEncoderConfig] = field(default_factory=dict)

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments of transformers' ``from_pretrained``."""
        return {"token": self.hf_token, "cache_dir": self.cache_dir}

    def has_file(self, source: str | Path, name: str) -> bool:
        """Whether a folder or a repository on the hub has that file."""
        if Path(source).is_dir():
            return (Path(source) / name).is_file()
        try:
            return self.download(str(source), name).is_file()
        except FileNotFoundError:
            return False

    def run_files(self, model_id: str) -> tuple[Path, Path]:
        """Paths of ``config.json`` and checkpoint of a published model, downloaded if need be."""
        return (
            self.download(HUB_REPO, f"{model_id}/{CONFIG}"),
            self.download(HUB_REPO, f"{model_id}/{CHECKPOINT}"),
        )

    def encoder_weights(self, encoder_id: str, config: AnyEncoderConfig) -> dict[str, Tensor]:
        """State dict of an encoder under our names."""
        path = self.encoder_paths.get(encoder_id) or self.download(config.source, config.files)
        return convert_state_dict(config, read_weights(Path(path)))

    def download(self, repo: str, files: str | tuple[str, ...]) -> Path:
        """Local path of the first of ``files`` that ``repo`` has."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        names = (files,) if isinstance(files, str) else files
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, token=self.hf_token, cache_dir=self.cache_dir))
            except EntryNotFoundError:
                continue
        raise FileNotFoundError(
            f"{repo}: none of {', '.join(names)} on the hub or in its cache; a local path can be given instead"
        )
