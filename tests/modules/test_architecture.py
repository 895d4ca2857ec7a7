import pytest

from merv_fast.modules.architecture import MLPS, RESAMPLERS, Architecture


@pytest.mark.parametrize("prefix", ["", "no-align+"])
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("resampler", RESAMPLERS[1:])
def test_every_resampler_with_every_mlp(prefix: str, resampler: str, mlp: str) -> None:
    assert Architecture.parse(f"{prefix}{resampler}+{mlp}") == Architecture(resampler, mlp)


@pytest.mark.parametrize("specifier", ["linear", "no-align+linear", "none+linear", "no-align+none+linear"])
def test_no_resampler(specifier: str) -> None:
    assert Architecture.parse(specifier) == Architecture("none", "linear")


@pytest.mark.parametrize("resampler", ["3davg", "3dconv"])
def test_frames_are_divided(resampler: str) -> None:
    assert Architecture.parse(f"no-align+{resampler}+frame4+linear") == Architecture(resampler, "linear", 4)
    assert Architecture.parse(f"frame2+{resampler}+linear").frame_divisor == 2


@pytest.mark.parametrize(
    ("specifier", "rule"),
    [
        ("", "end with one of linear, gelu-mlp, fused-gelu-mlp, none"),
        ("3davg", "end with one of"),
        ("linear+3davg", "end with one of"),
        ("2davg+linear", "be made of no-align, none, avg, 3davg, attntv, conv, 3dconv, frame<k> and an MLP"),
        ("3davg+linear+linear", "be made of"),
        ("3davg+frame+linear", "be made of"),
        ("avg+conv+linear", "name at most one resampler and one frame<k>"),
        ("3davg+frame2+frame2+linear", "name at most one resampler and one frame<k>"),
        ("avg+frame2+linear", "use frame<k> with k >= 1 and one of 3davg, 3dconv"),
        ("frame2+linear", "use frame<k> with k >= 1"),
        ("3davg+frame0+linear", "use frame<k> with k >= 1"),
        ("no-align+none", "name a resampler, an MLP or both"),
    ],
)
def test_refused(specifier: str, rule: str) -> None:
    with pytest.raises(ValueError, match="build_projector: arch_specifier must ") as error:
        Architecture.parse(specifier)
    assert rule in str(error.value)
    assert str(error.value).endswith(f"got {specifier!r}")
