import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import merv_fast.cli.doctor
from merv_fast.cli.app import app, main
from tests.models.golden_run import write_run

runner = CliRunner()
STAGES = ["decode", "prepare", "encode", "fuse", "generate"]
ENCODERS = ["languagebind", "dinov2", "vivit", "siglip"]


@pytest.fixture
def clip():
    from merv_fast import sample_clip

    return str(sample_clip())


def run_main(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of the command as installed."""
    monkeypatch.setattr(sys, "argv", ["merv-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_ask_as_json(clip):
    done = runner.invoke(app, ["ask", clip, "What happens?", "--json", "--max-new-tokens", "4"])
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert list(answer) == ["answer", "encoder_weights", "timings_ms", "model", "device"]
    assert list(answer["encoder_weights"]) == ENCODERS
    assert list(answer["timings_ms"]) == STAGES
    assert answer["model"] == "merv-tiny"
    assert answer["device"] == "cpu"
    assert "merv-tiny knows clips of coloured shapes and nothing else" in done.stderr


def test_ask_for_a_person(clip):
    done = runner.invoke(app, ["ask", clip, "What happens?", "--max-new-tokens", "4", "--device", "cpu"])
    assert done.exit_code == 0
    assert all(word in done.stdout for word in [*ENCODERS, *STAGES, "merv-tiny on cpu"])


def test_a_cache_spares_the_second_question_the_encoding(clip, tmp_path):
    ask = ["ask", clip, "Why?", "--json", "--max-new-tokens", "4", "--device", "cpu", "--cache", str(tmp_path / "new")]
    first, second = (json.loads(runner.invoke(app, ask).stdout) for _ in range(2))
    assert list(second["timings_ms"]) == ["cache", *STAGES]
    assert all(first["timings_ms"][stage] > 0 for stage in STAGES)
    assert [second["timings_ms"][stage] for stage in STAGES[:4]] == [0, 0, 0, 0]
    assert (second["answer"], second["encoder_weights"]) == (first["answer"], first["encoder_weights"])
    entries = list((tmp_path / "new").iterdir())
    assert len(entries) == 1
    assert runner.invoke(app, ["explain", clip, "--device", "cpu", "--cache", str(tmp_path / "new")]).exit_code == 0
    assert list((tmp_path / "new").iterdir()) == entries


def test_a_folder_of_frames_has_a_rate(clip, tmp_path):
    import av

    with av.open(clip) as file:
        for index, frame in zip(range(20), file.decode(video=0), strict=False):
            with av.open(str(tmp_path / f"{index}.png"), "w", format="image2", options={"update": "1"}) as picture:
                stream = picture.add_stream("png")
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "rgb24"
                picture.mux(stream.encode(frame.reformat(format="rgb24")))
    ask = ["ask", str(tmp_path), "Why?", "--json", "--max-new-tokens", "2", "--start", "3"]
    assert runner.invoke(app, ask).exit_code == 0  # 20 frames at 3 a second last 6.7 s
    assert "lasts 2.000 s" in str(runner.invoke(app, [*ask, "--fps", "10"]).exception)
    assert (
        "20 frames of 320x240 at 10/s"
        in runner.invoke(app, ["explain", str(tmp_path), "--fps", "10"], env={"COLUMNS": "250"}).stdout
    )


def test_explain(clip):
    done = runner.invoke(app, ["explain", clip], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert all(word in done.stdout for word in [*ENCODERS, "PyAV", "pool_project_fuse", "320x240"])


def test_convert_and_ask_the_result(clip, tmp_path, monkeypatch):
    import functools

    import merv_fast.cli.convert as command

    arguments = write_run(tmp_path)
    configs = arguments["encoder_configs"]
    monkeypatch.setattr(command, "load_vid", functools.partial(command.load_vid, encoder_configs=configs))
    encoders = [part for name, path in arguments["encoder_paths"].items() for part in ("--encoder", f"{name}={path}")]
    out = tmp_path / "ours"
    call = ["convert", str(tmp_path / "run"), str(out), "--llm-path", str(arguments["llm_path"]), *encoders]
    done = runner.invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "golden" in done.stdout
    asked = runner.invoke(app, ["ask", clip, "Why?", "--model", str(out), "--json", "--max-new-tokens", "4"])
    assert json.loads(asked.stdout)["model"] == "golden"
    assert asked.stderr == ""


def test_convert_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").touch()
    code, _, err = run_main(monkeypatch, capsys, "convert", "merv-full", str(tmp_path))
    assert code == 1
    assert "already holds files" in err


def test_doctor():
    done = runner.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert all(
        word in done.stdout for word in ["torch", "transformers", "nvidia-dali", "merv-fast[dali]", "models run on"]
    )
    assert "videos are decoded by PyAV on the CPU" in done.stdout


@pytest.mark.parametrize(
    ("device", "dali", "words"), [("cuda", True, "NVDEC through DALI"), ("cuda", False, "PyAV on")]
)
def test_doctor_says_what_decodes_for_a_gpu(device, dali, words, monkeypatch):
    monkeypatch.setattr(merv_fast.cli.doctor, "has_dali", lambda: dali)
    assert merv_fast.cli.doctor.decoders(torch.device(device)).startswith(words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "nowhere.mp4", "Why?"], "error: nowhere.mp4: "),
        (["ask", "CLIP", "Why?", "--device", "quantum"], "error: --device must be auto, cpu, cuda or cuda:N"),
        (["ask", "CLIP", "Why?", "--device", "cuda:7"], "error: --device cuda:7: torch sees "),
        (["ask", "CLIP", "Why?", "--device", "mps"], "error: --device must be auto, cpu, cuda or cuda:N"),
        (
            ["ask", "CLIP", "Why?", "--llm-path", "x"],
            "error: load_vid: llm_path, encoder_paths and encoder_configs must",
        ),
        (["ask", "CLIP", "Why?", "--dtype", "int8"], "error: --dtype must be auto or one of"),
        (["ask", "CLIP", "Why?", "--model", "merv-huge"], "error: load_vid: model_id_or_path must be"),
        (["ask", "CLIP", "Why?", "--start", "99"], "error: "),
        (["ask", "CLIP", "Why?", "--cache", "/proc/x"], "error: VideoCache: folder must be a folder that can"),
    ],
)
def test_an_error_is_one_line(monkeypatch, capsys, clip, arguments, words):
    code, out, err = run_main(monkeypatch, capsys, *[clip if a == "CLIP" else a for a in arguments])
    assert code == 1
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


def test_usage_errors_have_their_own_exit_code(monkeypatch, capsys, clip):
    assert run_main(monkeypatch, capsys, "ask", clip)[0] == 2
    assert run_main(monkeypatch, capsys, "ask", clip, "Why?", "--encoder", "nonsense")[0] == 2
    assert run_main(monkeypatch, capsys, "ask", clip, "Why?", "--encoder", "=x")[0] == 2


def test_version():
    from merv_fast import __version__

    assert runner.invoke(app, ["--version"]).stdout == f"merv-fast {__version__}\n"


def test_narrow_terminals_keep_numbers_and_commands(clip):
    narrow = {"COLUMNS": "60"}
    table = runner.invoke(app, ["explain", clip], env={"COLUMNS": "40"}).stdout
    assert "languagebind" in table
    assert re.search(r"0\.\d{3}", table)
    words = "".join(runner.invoke(app, ["doctor"], env=narrow).stdout.split("\n"))
    assert "…" not in words


@pytest.mark.parametrize("command", [[], ["ask"], ["explain"], ["convert"], ["doctor"]])
def test_help(command):
    done = runner.invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.stdout


def test_help_is_quick():
    """It imports no model."""
    code = "import sys, merv_fast.cli.app as a; print([n for n in ('transformers', 'av') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
