import copy
import pickle
import sys
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch import Tensor, nn

from merv_fast.encoders import build_encoder
from merv_fast.modules.attention import (
    HeadAttention,
    attention,
    attention_choices,
    attention_of,
    attention_versions,
    check_attention,
    set_attention,
)
from merv_fast.modules.attention_backends import BACKENDS, backend_version, check_backend, fault, load_backend
from tests.budgets import FLOAT64, low_precision, relative_error
from tests.encoders.small_encoders import SMALL
from tests.modules.attention_packages import MODULES, VARIANTS, definition, install, remove

ON_CPU = ["eager", "sdpa", "sdpa_flash"]
SHAPES = {"tokens": (2, 4, 37, 37, 16), "pooled queries": (3, 2, 9, 36, 72), "one row": (1, 12, 65, 65, 64)}
"""Rows, heads, queries, keys, head size."""


def heads(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def packed(shape: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What a packed linear layer gives, and its q, k and v as views."""
    R, H, queries, keys, d = SHAPES[shape]
    qkv = heads(R, keys, 3 * H * d)
    q, k, v = qkv.unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4)
    return qkv, (q[:, :, :queries], k, v)


def chosen(backend: str, head_size: int) -> HeadAttention:
    module = HeadAttention(head_size)
    module.choose(backend)
    return module


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_definition_in_float64(lead):
    q, k, v = heads(*lead, 4, 5, 6), heads(*lead, 4, 7, 6), heads(*lead, 4, 7, 6) + 1
    assert relative_error(attention(q, k, v), definition(q, k, v)) < FLOAT64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_strided_heads_and_gradients_in_float64(backend, shape):
    qkv, _ = packed(shape)
    qkv.requires_grad_()
    _, H, queries, _, d = SHAPES[shape]
    q, k, v = qkv.unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4)
    q = q[:, :, :queries]
    got, expected = chosen(backend, d)(q, k, v), definition(q, k, v)
    assert relative_error(got, expected) < FLOAT64
    weight = heads(*got.shape)
    (gradient,) = torch.autograd.grad((got * weight).sum(), qkv, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), qkv)
    assert relative_error(gradient, expected_gradient) < FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ON_CPU)
def test_low_precision(backend, dtype):
    q, k, v = (t.to(dtype) for t in packed("tokens")[1])
    exact = definition(q.double(), k.double(), v.double())
    got = chosen(backend, 16)(q, k, v)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max().item() <= low_precision(definition(q, k, v), exact)


def test_eager_sums_in_float32():
    # Equal scores: in bfloat16 a softmax of 300 ones would round each share before it is used.
    q, k = torch.zeros(1, 1, 1, 8).bfloat16(), torch.zeros(1, 1, 300, 8).bfloat16()
    got = load_backend("eager")(q, k, torch.ones(1, 1, 300, 8).bfloat16())
    share = torch.tensor(1 / 300).bfloat16().float()
    assert torch.equal(got, (300 * share).bfloat16().expand(1, 1, 1, 8))
    # Above what float16 holds, were the sum not in float32.
    q = torch.full((1, 1, 1, 8), 4.0).half()
    assert load_backend("eager")(q, q, q).isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_whole_graph_compiles(backend):
    _, (q, k, v) = packed("tokens")
    module = chosen(backend, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v), definition(q, k, v)) < FLOAT64
    # What a compiled module computes follows a later choice.
    module.choose("eager" if backend != "eager" else "sdpa")
    assert torch.equal(compiled(q, k, v), module(q, k, v))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packages_are_given_views_with_tokens_first(monkeypatch, variant, shape):
    stand_in = install(monkeypatch, variant)
    R, H, queries, keys, d = SHAPES[shape]
    qkv = packed(shape)[0].bfloat16()
    q, k, v = qkv.unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4)
    got = chosen(variant.split()[0], d)(q[:, :, :queries], k, v)
    exact = definition(*(t.double() for t in (q[:, :, :queries], k, v)))
    # Stand-ins round but once.
    assert torch.equal(got, exact.bfloat16())
    for index, (tensor, tokens) in enumerate(zip(stand_in.calls[-1], (queries, keys, keys), strict=True)):
        assert tensor.shape == (R, tokens, H, d)
        assert tensor.stride() == (keys * 3 * H * d, 3 * H * d, d, 1)
        assert tensor.data_ptr() == qkv.data_ptr() + 2 * index * H * d
    # Joining the heads costs no copy.
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_pass_through_packages(monkeypatch, variant):
    install(monkeypatch, variant)
    leaves = [t.half().detach().requires_grad_() for t in packed("tokens")[1]]
    weight = heads(2, 4, 37, 16).half()
    got = torch.autograd.grad((chosen(variant.split()[0], 16)(*leaves) * weight).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad((definition(*wide) * weight.double()).sum(), wide)
    low = torch.autograd.grad((definition(*leaves) * weight).sum(), leaves)
    for one, rough, right in zip(got, low, expected, strict=True):
        assert (one.double() - right).abs().max().item() <= low_precision(rough, right)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch_goes_to_no_package(monkeypatch, variant):
    install(monkeypatch, variant)
    empty = torch.zeros(0, 2, 5, 16, dtype=torch.bfloat16)
    assert chosen(variant.split()[0], 16)(empty, empty, empty).shape == empty.shape


@pytest.mark.parametrize("backend", MODULES)
def test_a_package_is_tried_before_it_is_trusted(monkeypatch, backend):
    stand_in = install(monkeypatch, backend)
    check_backend(backend, 16, torch.device("cpu"), torch.bfloat16)
    check_backend(backend, 16, torch.device("cpu"), torch.bfloat16)
    assert len(stand_in.calls) == 1
    check_backend(backend, 32, torch.device("cpu"), torch.bfloat16)
    assert [call[0].shape[-1] for call in stand_in.calls] == [16, 32]

    wrong = install(monkeypatch, backend)
    wrong.scale = 1.1
    rule = f"result of {backend} must be right for heads of 16 in bfloat16 on cpu .or choose sdpa., got an error of"
    with pytest.raises(RuntimeError, match=rule):
        check_backend(backend, 16, torch.device("cpu"), torch.bfloat16)
    q = torch.zeros(1, 2, 5, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=rule):
        chosen(backend, 16)(q, q, q)


def test_what_a_trial_finds():
    where = torch.device("cpu"), torch.bfloat16
    assert fault(definition, 16, *where) is None

    def broken(q, k, v):
        raise RuntimeError("needs an Ampere GPU")

    assert fault(broken, 16, *where) == "RuntimeError: needs an Ampere GPU"
    for wrong in (
        lambda q, k, v: definition(q, k, v) * float("nan"),
        lambda q, k, v: definition(q, v, k),
        lambda q, k, v: definition(q, k.flip(1), v),
        lambda q, k, v: definition(q, k, v).flip(0),
        lambda q, k, v: definition(q, k[:, :, :64], v[:, :, :64]),
        lambda q, k, v: definition(q * q.shape[-1] ** 0.5, k, v),
    ):
        assert fault(wrong, 16, *where).startswith("an error of ")
    assert fault(lambda q, k, v: definition(q.bfloat16(), k.bfloat16(), v.bfloat16()), 16, where[0], torch.float32)


def test_a_trial_is_the_same_under_autocast_and_leaves_random_numbers_alone():
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert fault(lambda q, k, v: definition(q, k, v), 24, torch.device("cpu"), torch.float32) is None
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("backend", MODULES)
def test_a_missing_package_is_named(monkeypatch, backend):
    remove(monkeypatch, backend)
    rule = rf"attention: {BACKENDS[backend].package} must be importable for {backend} \(pip install .*\), got .*Error"
    for call in (lambda: load_backend(backend), lambda: chosen(backend, 16), lambda: check_backend(backend, 16)):
        with pytest.raises(ImportError, match=rule):
            call()


def test_a_package_that_breaks_on_import_is_missing(monkeypatch):
    install(monkeypatch, "flash_attention_4")
    # As where flash-attn 2 brings the folder of the CuTe one along, and not what that needs.
    del sys.modules["flash_attn.cute"].flash_attn_func
    with pytest.raises(ImportError, match=r"flash-attn-4 must be importable .* got AttributeError"):
        load_backend("flash_attention_4")


REFUSALS = {
    "name": ("flash", 16, "cpu", torch.bfloat16, "backend must be one of eager, sdpa, .*xformers, got 'flash'"),
    "flash heads": (
        "flash_attention_2",
        12,
        None,
        None,
        r"head size of flash_attention_2 must be a multiple of 8 up to 256 \(sdpa takes any\), got 12",
    ),
    "large heads": ("sdpa_cudnn", 264, None, None, "must be a multiple of 8 up to 256 .*, got 264"),
    "xformers heads": ("xformers", 20, None, None, "must be a multiple of 8 up to 65536 .*, got 20"),
    "cpu": (
        "flash_attention_3",
        16,
        "cpu",
        torch.bfloat16,
        r"tensors of flash_attention_3 must be on cuda \(move the model there, or choose sdpa\), got cpu",
    ),
    "cudnn on cpu": ("sdpa_cudnn", 16, "cpu", None, "tensors of sdpa_cudnn must be on cuda .*, got cpu"),
    "efficient on cpu": ("sdpa_efficient", 16, "cpu", None, "must be on cuda .*, got cpu"),
    "float32": (
        "flash_attention_4",
        16,
        "cuda",
        torch.float32,
        r"tensors of flash_attention_4 must be float16 or bfloat16 \(cast the model, or choose sdpa\), got float32",
    ),
    "cudnn": ("sdpa_cudnn", 16, "cuda", torch.float32, "must be float16 or bfloat16 .*, got float32"),
    "float64": ("xformers", 16, "cuda", torch.float64, "must be float16 or bfloat16 or float32 .*, got float64"),
    "flash on a GPU": ("sdpa_flash", 16, "cuda", torch.float32, "must be float16 or bfloat16 .*, got float32"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(monkeypatch, case):
    backend, head_size, device, dtype, message = REFUSALS[case]
    if backend in MODULES:
        install(monkeypatch, backend, on_cpu=False)
    with pytest.raises(ValueError, match=f"^attention: .*{message}$"):
        check_backend(backend, head_size, device and torch.device(device), dtype)


def test_tensors_are_checked_when_they_come(monkeypatch):
    install(monkeypatch, "flash_attention_2", on_cpu=False)
    q = torch.zeros(1, 2, 5, 16, dtype=torch.bfloat16)
    module = chosen("flash_attention_2", 16)
    with pytest.raises(ValueError, match=r"must be on cuda .*, got cpu"):
        module(q, q, q)
    with pytest.raises(ValueError, match=r"must be on cuda .*, got cpu"):
        torch.compile(module, backend="eager")(q, q, q)
    install(monkeypatch, "flash_attention_2")
    module.choose("flash_attention_2")
    assert module(q, q, q).shape == q.shape
    with pytest.raises(ValueError, match=r"must be float16 or bfloat16 .*, got float32"):
        module(q.float(), q.float(), q.float())


def test_a_choice_is_for_all_parts_or_none():
    module = nn.Sequential(nn.Linear(2, 2), HeadAttention(16), HeadAttention(12))
    with pytest.raises(ValueError, match=r"head size of sdpa_flash .*, got 12"):
        set_attention(module, "sdpa_flash")
    with pytest.raises(ValueError, match=r"head size of sdpa_flash .*, got 20"):
        set_attention(nn.Sequential(HeadAttention(16), HeadAttention(20)), "sdpa_flash")
    assert attention_of(module) == "sdpa"
    set_attention(module, "eager")
    assert [part.backend for part in module[1:]] == ["eager", "eager"]
    module[1].choose("sdpa_flash")
    assert attention_of(module) == "eager, sdpa_flash"
    assert [k for k in module.state_dict() if not k.startswith("0.")] == []
    with pytest.raises(ValueError, match="module must hold attention, got Linear"):
        set_attention(module[0], "sdpa")


def test_the_dtype_is_that_of_autocast(monkeypatch):
    install(monkeypatch, "flash_attention_2")
    module = nn.Sequential(nn.Linear(2, 2), HeadAttention(16))
    with pytest.raises(ValueError, match="got float32"):
        check_attention(module, "flash_attention_2")
    check_attention(module, "flash_attention_2", placed=False)
    with torch.autocast("cpu", torch.bfloat16):
        check_attention(module, "flash_attention_2")
    check_attention(module.bfloat16(), "flash_attention_2")
    check_attention(module.float().to("meta"), "flash_attention_2")


def test_versions_of_packages(monkeypatch):
    install(monkeypatch, "xformers")
    module = nn.Sequential(HeadAttention(16), HeadAttention(16))
    assert attention_versions(module) == ["sdpa"]
    module[0].choose("xformers")
    monkeypatch.setattr(metadata, "version", {"xformers": "0.0.35"}.__getitem__)
    backend_version.cache_clear()
    try:
        assert attention_versions(module) == ["sdpa", "xformers 0.0.35"]
    finally:
        backend_version.cache_clear()


@pytest.mark.parametrize("backend", ON_CPU)
def test_it_can_be_copied_and_pickled(backend):
    _, (q, k, v) = packed("tokens")
    module = chosen(backend, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.backend == backend
        assert torch.equal(other(q, k, v), module(q, k, v))


def test_pytorch_s_own_settings_are_left_alone(monkeypatch):
    # `sdpa_kernel` would change them for all threads.
    def settings() -> list[bool]:
        backends = torch.backends.cuda
        return [backends.flash_sdp_enabled(), backends.math_sdp_enabled(), backends.mem_efficient_sdp_enabled()]

    seen = []
    real = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Aten:
        def _scaled_dot_product_flash_attention_for_cpu(self, q, k, v):
            seen.append(settings())
            return real(q, k, v)

    before = settings()
    monkeypatch.setattr(torch.ops, "aten", Aten())
    q = torch.zeros(1, 2, 5, 16)
    load_backend("sdpa_flash")(q, q, q)
    assert seen == [before]
    assert settings() == before


def loadable(name: str) -> bool:
    try:
        load_backend(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("backend", [name for name in BACKENDS if loadable(name)])
def test_on_a_gpu(device, backend):
    if device == "cpu":
        pytest.skip("needs a GPU")
    where, limits = torch.device(device, torch.cuda.current_device()), BACKENDS[backend]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if limits.dtypes is not None and dtype not in limits.dtypes["cuda"]:
            with pytest.raises(ValueError, match=rf"\(cast the model, or choose sdpa\), got {str(dtype)[6:]}"):
                check_backend(backend, 16, where, dtype)
            continue
        for shape, (R, H, queries, _, d) in SHAPES.items():
            check_backend(backend, d, where, dtype)
            qkv, weight = packed(shape)[0].to(device, dtype), heads(R, H, queries, d).to(device, dtype)
            exact = run_both_ways(definition, qkv.double(), weight, shape)
            low, got = (run_both_ways(f, qkv, weight, shape) for f in (definition, chosen(backend, d)))
            for one, rough, right in zip(got, low, exact, strict=True):
                assert one.dtype == dtype
                assert (one.double() - right).abs().max().item() <= low_precision(rough, right), shape
            fullgraph = backend in ("eager", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient")
            torch.compiler.reset()
            compiled = torch.compile(chosen(backend, d), fullgraph=fullgraph, backend="aot_eager")
            for one, rough, right in zip(run_both_ways(compiled, qkv, weight, shape), low, exact, strict=True):
                assert (one.double() - right).abs().max().item() <= low_precision(rough, right), shape


@torch.no_grad()
def test_the_fastest_on_a_gpu(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    for config in SMALL.values():
        encoder = build_encoder(replace(config, heads=3)).eval().to(device, torch.bfloat16)
        set_attention(encoder, "fastest")
        (choice,) = attention_choices(encoder)
        here = {name for name in BACKENDS if loadable(name)} - {"eager", "sdpa_cudnn"}
        assert here <= choice.milliseconds.keys() | choice.left_out.keys()
        assert {"sdpa", "sdpa_flash", "sdpa_efficient"} <= choice.milliseconds.keys(), choice.left_out
        assert all(0 < ms < 100 for ms in choice.milliseconds.values()), choice
        assert choice.where == f"{torch.cuda.get_device_name()}, bfloat16"
        assert attention_of(encoder) == choice.name
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        try:
            with pytest.raises(RuntimeError, match="chosen before a CUDA graph is captured"):
                set_attention(encoder, "fastest")
        finally:
            graph.capture_end()


def run_both_ways(attend, qkv: Tensor, weight: Tensor, shape: str) -> tuple[Tensor, Tensor]:
    """The result for views of ``qkv``, and the gradient of it."""
    _, H, queries, _, d = SHAPES[shape]
    qkv = qkv.detach().requires_grad_()
    q, k, v = qkv.unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4)
    out = attend(q[:, :, :queries], k, v)
    (gradient,) = torch.autograd.grad((out * weight.to(out.dtype)).sum(), qkv)
    return out.detach(), gradient


@pytest.mark.parametrize("backend", ["sdpa_cudnn", "sdpa_efficient"])
def test_sums_are_kept_for_a_backward_pass_alone(monkeypatch, backend):
    # Without them the gradient would be that of nothing; with them inference takes memory for nothing.
    seen = []

    class Aten:
        def __getattr__(self, name):
            return lambda q, k, v, bias, sums: seen.append((bias, sums)) or (q,)

    monkeypatch.setattr(torch.ops, "aten", Aten())
    q, k = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16).requires_grad_()
    call = load_backend(backend)
    call(q, k, q)
    call(q, q, q)
    with torch.no_grad():
        call(q, k, q)
    assert seen == [(None, True), (None, False), (None, False)]
