"""MERV in vLLM: prompts as embeddings, offline and to a server, and the model itself as a plugin."""

from merv_fast.integrations.vllm.client import complete
from merv_fast.integrations.vllm.prompts import payload, prompt_embeds

__all__ = ["complete", "payload", "prompt_embeds"]
