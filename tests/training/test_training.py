"""`train` from clips to a model that answers: it learns, resumes, and moves what its stage says and nothing else."""

import json
import signal
import subprocess
import sys

import pytest
import torch

import merv_fast
from merv_fast import ops
from merv_fast.training import STAGES, train, training_arguments
from merv_fast.training.run import last_checkpoint
from merv_fast.training.stages import RECOMPUTE, sharded_units
from tests import budgets
from tests.training.small import ANSWERS, QUICK, conversation, small_model, write_data

WHOLE = {"global_batch_size": 16, "per_device_train_batch_size": 16}
NEVER_LEARNED = "video_model.tail.fusion.k_proj.bias"
"""The same for each encoder, which a softmax over them does not see."""


def test_sixteen_samples_are_learned_by_heart(clips, data, tmp_path):
    arguments = QUICK | WHOLE | {"max_steps": 90, "learning_rate": 3e-3, "weight_decay": 0.0}
    report = train(small_model(), "finetune", data, tmp_path / "out", cache=tmp_path / "cache", arguments=arguments)
    assert report.steps == len(report.losses) == 90
    # The logarithm of the 16 answers is what is left to know without seeing the video.
    assert report.losses[0] > 5
    assert report.losses[-1] < 0.1
    vidlm = merv_fast.load_vid(tmp_path / "out")
    assert vidlm.config.trained
    builder = vidlm.get_prompt_builder()
    builder.add_turn("human", "What happens?")
    assert vidlm.generate(clips, builder.get_prompt(), max_new_tokens=16, do_sample=False) == ANSWERS
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [row["loss"] for row in history["log"] if "loss" in row] == report.losses
    assert (history["stage"], history["steps"], history["skipped"]) == ("finetune", 90, {})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_moves_what_it_trains_and_nothing_else(clips, tmp_path, monkeypatch, stage, recompute):
    entries = [conversation(answer, video=str(clip)) for clip, answer in zip(clips, ANSWERS[:4], strict=False)]
    data = write_data(tmp_path, [*entries, conversation("Yes.")])
    small = small_model()
    before = {name: tensor.clone() for name, tensor in small.model.named_parameters()}
    calls, modes, fuse = [], [], ops.pool_project_fuse

    def watched(*args):
        calls.append(args)
        modes.append((small.model.training, small.model.video_model.encoders.training))
        return fuse(*args)

    monkeypatch.setattr(ops, "pool_project_fuse", watched)
    arguments = QUICK | {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        RECOMPUTE: recompute,
    }
    arguments |= {"global_batch_size": 5, "per_device_train_batch_size": 5}
    train(small, stage, data, tmp_path / "out", arguments=arguments)
    assert len(calls) == 3
    assert set(modes) == {(True, stage == "full")}
    learning = {"align": ("tail",), "finetune": ("tail", "language_model"), "full": ("",)}[stage]
    for name, tensor in small.model.named_parameters():
        moved = not torch.equal(tensor, before[name])
        assert moved == any(part in name for part in learning) or name == NEVER_LEARNED, name
    saved = merv_fast.load_vid(tmp_path / "out").model.state_dict()
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(saved[name], tensor), name


def test_recomputed_activations_give_the_same_losses(data, tmp_path):
    losses = []
    for recompute in (False, True):
        arguments = QUICK | WHOLE | {"max_steps": 3, "learning_rate": 1e-3, RECOMPUTE: recompute}
        losses.append(train(small_model(), "align", data, tmp_path / str(recompute), arguments=arguments).losses)
    assert losses[0] == losses[1]


def test_recomputing_recomputes(data, tmp_path):
    """In `align` too, where the language model does not learn."""
    counts = []
    for recompute in (False, True):
        small = small_model()
        runs = []
        layer = small.model.language_model.model.layers[0]
        layer.input_layernorm.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        arguments = QUICK | WHOLE | {"max_steps": 2, RECOMPUTE: recompute}
        train(small, "align", data, tmp_path / str(recompute), arguments=arguments)
        counts.append(len(runs))
    assert counts == [2, 4]


RESUMED = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "global_batch_size": 4}
RESUMED |= {"per_device_train_batch_size": 2}


def test_resuming_after_a_kill_goes_on_as_if_nothing_had_happened(data, tmp_path):
    arguments = QUICK | RESUMED
    straight = train(small_model(), "finetune", data, tmp_path / "straight", arguments=arguments)
    command = [sys.executable, "-m", "tests.training.killed", str(data), str(tmp_path / "killed"), "5"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    # What a kill in the middle of writing leaves behind.
    (tmp_path / "killed" / "checkpoint-5").mkdir()
    # The model comes from the checkpoint, not from where it starts.
    resumed = train(small_model(seed=1), "finetune", data, tmp_path / "killed", resume=True, arguments=arguments)
    assert resumed.steps == 6
    first = straight.losses[0]
    assert max(abs(a - b) for a, b in zip(straight.losses, resumed.losses, strict=True)) <= budgets.TRAINING * first
    expected = merv_fast.load_vid(tmp_path / "straight").model.state_dict()
    for name, tensor in merv_fast.load_vid(tmp_path / "killed").model.state_dict().items():
        assert budgets.relative_error(tensor, expected[name]) <= budgets.TRAINING, name


def test_a_checkpoint_is_a_model_too(clips, data, tmp_path):
    arguments = QUICK | WHOLE | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train(small_model(), "finetune", data, tmp_path / "out", arguments=arguments)
    vidlm = merv_fast.load_vid(tmp_path / "out" / "checkpoint-1")
    assert vidlm.config.trained
    assert vidlm.encode(clips[0]).tokens.shape == (16, 64)


def test_resume_without_a_checkpoint_starts(data, tmp_path):
    arguments = QUICK | WHOLE | {"max_steps": 1}
    assert train(small_model(), "align", data, tmp_path / "out", resume=True, arguments=arguments).steps == 1


def test_what_is_skipped_is_counted(clips, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    entries = [conversation("A ball.", video=video) for video in (str(clips[0]), "broken.mp4", "absent.mp4")]
    data = write_data(tmp_path, entries)
    arguments = QUICK | {"num_train_epochs": 2, "global_batch_size": 3, "per_device_train_batch_size": 3}
    for cache in (None, tmp_path / "cache"):
        out = tmp_path / f"out-{cache is None}"
        report = train(small_model(), "finetune", data, out, cache=cache, on_error="skip", arguments=arguments)
        named = {reason.partition(":")[0].rpartition("/")[2]: times for reason, times in report.skipped.items()}
        # An absent one is also met in the place of the broken one before it.
        assert named == {"broken.mp4": 2, "absent.mp4": 4}
        assert json.loads((out / "history.json").read_text())["skipped"] == report.skipped


def test_weights_of_two_dimensions_decay_and_others_do_not(data, tmp_path, monkeypatch):
    from merv_fast.training import MervTrainer

    seen = {}
    create = MervTrainer.create_optimizer

    def watched(self, *args, **kwargs):
        optimizer = create(self, *args, **kwargs)
        seen.update({id(t): group["weight_decay"] for group in optimizer.param_groups for t in group["params"]})
        return optimizer

    monkeypatch.setattr(MervTrainer, "create_optimizer", watched)
    small = small_model()
    train(small, "finetune", data, tmp_path / "out", arguments=QUICK | WHOLE | {"max_steps": 1})
    for name, tensor in small.model.named_parameters():
        if "encoders" in name:
            assert id(tensor) not in seen
        else:
            assert seen[id(tensor)] == (0.1 if tensor.ndim > 1 else 0.0), name


def test_hyperparameters_are_the_references_unless_given():
    align, finetune = (training_arguments(STAGES[name], {}) for name in ("align", "finetune"))
    named = ("learning_rate", "weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps")
    assert [align[name] for name in named] == [1e-3, 0.0, 16, 16]
    assert [finetune[name] for name in named] == [2e-5, 0.1, 8, 16]
    for arguments in (align, finetune):
        assert (arguments["max_grad_norm"], arguments["warmup_steps"], arguments["num_train_epochs"]) == (1.0, 0.03, 1)
        assert (arguments["lr_scheduler_type"], arguments["seed"]) == ("cosine", 7)
    given = {"learning_rate": 5e-6, "global_batch_size": 32, "gradient_checkpointing": False, "fp16": True}
    chosen = training_arguments(STAGES["full"], given)
    assert (chosen["learning_rate"], chosen["gradient_accumulation_steps"]) == (5e-6, 4)
    assert chosen["gradient_checkpointing"] is False
    assert not chosen.keys() & {"activation_checkpointing", "bf16", "global_batch_size"}


def test_what_is_sharded_by_itself_is_what_the_model_has(tmp_path):
    model = small_model().model
    units = sharded_units(model, {"version": 2})
    assert units.keys() == {"version", "transformer_layer_cls_to_wrap"}
    there = {type(module).__name__ for module in model.modules()}
    assert "LlamaDecoderLayer" in units["transformer_layer_cls_to_wrap"]
    assert there.issuperset(units["transformer_layer_cls_to_wrap"])
    chosen = {"fsdp_transformer_layer_cls_to_wrap": ["LlamaMLP"]}
    assert sharded_units(model, chosen) == chosen
    (tmp_path / "fsdp.json").write_text('{"cpu_offload": true}')
    assert sharded_units(model, str(tmp_path / "fsdp.json")).keys() == {"cpu_offload", "transformer_layer_cls_to_wrap"}
    assert sharded_units(model, None).keys() == {"transformer_layer_cls_to_wrap"}


def test_the_global_batch_is_shared_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert training_arguments(STAGES["align"], {})["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"global_batch_size must be a multiple of .* \(48\), got 256"):
        training_arguments(STAGES["align"], {})


def test_batches_that_add_up_to_a_step_give_the_losses_of_one_batch(clips, tmp_path):
    """Also where they hold unequally many answers' tokens."""
    answers = ["A ball.", "The ball falls. " * 6, "No.", "The blue box rises slowly. " * 4]
    entries = [conversation(answer, video=str(clip)) for clip, answer in zip(clips, answers * 2, strict=False)]
    data, losses = write_data(tmp_path, entries), []
    for size in (8, 2):
        arguments = QUICK | {"max_steps": 4, "learning_rate": 1e-3, "global_batch_size": 8}
        arguments |= {"per_device_train_batch_size": size}
        losses.append(train(small_model(), "finetune", data, tmp_path / str(size), arguments=arguments).losses)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= budgets.TRAINING * losses[0][0]


def test_workers_give_the_same_losses(data, tmp_path):
    losses = []
    for workers in (0, 2):
        arguments = QUICK | WHOLE | {"max_steps": 2, "learning_rate": 1e-3, "dataloader_num_workers": workers}
        losses.append(train(small_model(), "finetune", data, tmp_path / str(workers), arguments=arguments).losses)
    assert losses[0] == losses[1]


def test_grouping_by_length_reads_no_video(data, tmp_path, monkeypatch):
    import merv_fast.training.dataset as module

    reads, load = [], module.load_frames
    monkeypatch.setattr(module, "load_frames", lambda *args, **kwargs: reads.append(args) or load(*args, **kwargs))
    arguments = QUICK | WHOLE | {"num_train_epochs": 1, "train_sampling_strategy": "group_by_length"}
    train(small_model(), "align", data, tmp_path / "out", arguments=arguments)
    assert len(reads) == 16


def test_processes_that_did_not_find_each_other_raise(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but this one is in a group of 1"):
        train(small_model(), "align", data, tmp_path / "out", arguments={"use_cpu": False})


def test_errors(data, tmp_path):
    small = small_model()
    with pytest.raises(ValueError, match="stage must be one of align, finetune, full, got 'fine'"):
        train(small, "fine", data, tmp_path / "out")
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'pass'"):
        train(small, "align", data, tmp_path / "out", on_error="pass")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="out must be an empty directory, or resume True"):
        train(small, "align", data, tmp_path / "full")
    with pytest.raises(ValueError, match="does not exist"):
        train(small, "align", write_data(tmp_path, [conversation("A", video="no.mp4")]), tmp_path / "out")
