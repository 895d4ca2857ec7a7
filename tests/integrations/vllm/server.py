"""A server that takes embeddings by the rules of vLLM 0.33 and answers with a language model of transformers.

The rules are those of ``vllm/renderers/embed_utils.py`` and ``vllm/entrypoints/openai/completion/protocol.py``.
"""

import base64
import binascii
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Refused(ValueError):
    """What vLLM answers with status 400."""


def load_embeds(text, hidden_size, dtype):
    """The embeddings in one entry of ``prompt_embeds``."""
    try:
        data = base64.b64decode(text, validate=True)
        with torch.sparse.check_sparse_tensor_invariants():
            tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (binascii.Error, RuntimeError, EOFError) as error:
        raise Refused(f"prompt_embeds could not be read: {error}") from error
    if not isinstance(tensor, torch.Tensor):
        raise Refused("prompt_embeds is no tensor")
    tensor = tensor.squeeze(0) if tensor.dim() > 2 else tensor
    if tensor.dim() != 2 or tensor.shape[1] != hidden_size:
        raise Refused(f"prompt_embeds must be [tokens, {hidden_size}], got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise Refused(f"prompt_embeds must be floating point, got {tensor.dtype}")
    return tensor.to(dtype)


class Engine:
    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.requests = []

    @torch.inference_mode()
    def answer(self, text, max_tokens):
        embeds = load_embeds(text, self.model.config.hidden_size, self.model.dtype)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        pad = self.tokenizer.pad_token_id
        ids = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad
        )
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)


@contextmanager
def serving(engine):
    """The engine behind a port of this machine; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engine.requests.append((self.path, dict(self.headers), body))
            try:
                if not body.get("prompt_embeds"):
                    raise Refused("Either prompt or prompt_embeds must be provided")
                texts = [engine.answer(each, body["max_tokens"]) for each in body["prompt_embeds"]]
                # In another order than they were asked, as a server may.
                choices = [{"index": index, "text": text} for index, text in enumerate(texts)][::-1]
                self.reply(200, {"choices": choices})
            except Refused as error:
                self.reply(400, {"error": {"message": str(error)}})

        def reply(self, status, values):
            data = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
