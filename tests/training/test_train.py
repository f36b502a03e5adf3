"""A run can be repeated, put down and resumed, and leaves all that is promised."""

import io
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from handlers.images.preprocessing import Preprocessing
from handlers.networks import NETWORKS, Digits
from tests.thorough import variants
from training import run as runs
from training.recipes import RECIPES, Recipe
from training.train import main


def equal(first, second):
    """Whether two checkpoints' nested values are the same bit for bit, whatever time they took."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = first.keys() - {"seconds"}
        return keys == second.keys() - {"seconds"} and all(equal(first[key], second[key]) for key in keys)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture
def stop_in_epoch(monkeypatch):
    """Return a function that makes Ctrl-C arrive in the given epoch."""
    real = runs.train_epoch

    def stop(number):
        def interrupted(*arguments, epoch, **options):
            if epoch == number:
                raise KeyboardInterrupt
            return real(*arguments, epoch=epoch, **options)

        monkeypatch.setattr(runs, "train_epoch", interrupted)

    yield stop
    monkeypatch.undo()


def test_a_run_leaves_a_checkpoint_that_rebuilds_the_network_and_says_what_it_reached(train, tmp_path):
    assert train("--epochs", 2, "--seed", 3, "--data-name", "two greys") == 0
    checkpoint = load(tmp_path / "run")
    assert checkpoint["format"] == 1
    assert checkpoint["model"] == "digits"
    assert checkpoint["architecture"] == "handlers.networks.digits:Digits"
    assert checkpoint["arguments"] == {"classes": 2}
    assert checkpoint["layers"] == {"conv1": "conv1"}
    assert checkpoint["classes"] == ["bright", "dark"]
    preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
    assert preprocessing.size == (28, 28)
    assert 0.4 < preprocessing.mean[0] < 0.6
    assert checkpoint["description"] == Digits.description
    training = checkpoint["training"]
    assert (training["data"], training["train_pictures"], training["test_pictures"]) == ("two greys", 40, 10)
    assert (training["epochs"], training["seed"], len(training["history"])) == (2, 3, 2)
    assert training["train_accuracy"] == training["test_accuracy"] == 1
    assert "CPU cores" in training["machine"]
    assert training["versions"]["torch"] == torch.__version__
    assert training["seconds"] == pytest.approx(sum(epoch["seconds"] for epoch in training["history"]), abs=0.01)
    assert set(training["history"][0]) == {
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
    }
    NETWORKS[checkpoint["model"]](**checkpoint["arguments"]).load_state_dict(checkpoint["state_dict"])


def test_a_run_prints_and_writes_the_epoch_table_and_draws_the_curves(train, tmp_path, capsys):
    train("--epochs", 3, drawn=True)
    printed, bar = capsys.readouterr()
    assert bar == "", "a log file sees no progress bar"
    table = (tmp_path / "run" / "epochs.txt").read_text()
    header, *rows = table.splitlines()
    assert header.split("  ") == ["epoch", "train loss", "train accuracy", "test loss", "test accuracy", "seconds"]
    assert [int(row.split()[0]) for row in rows] == [1, 2, 3]
    assert all(re.fullmatch(r"( +\d+\.\d+){5}", row[5:]) for row in rows)
    assert table.strip() in printed
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 50


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_one_other_weights(train, tmp_path):
    for out, seed in (("first", 5), ("second", 5), ("third", 6)):
        train("--epochs", 1, "--seed", seed, out=out)
    first, second, third = (load(tmp_path / out) for out in ("first", "second", "third"))
    assert equal(first, second)
    assert not torch.equal(first["state_dict"]["conv1.weight"], third["state_dict"]["conv1.weight"])


@pytest.mark.parametrize("model", variants(["digits", "deep"], ["cifar", "flat"]))
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train, tmp_path, stop_in_epoch, model):
    train("--epochs", 2, out="whole", model=model)
    stop_in_epoch(2)
    assert train("--epochs", 2, out="parts", model=model) == 130
    stopped = load(tmp_path / "parts")["training"]
    assert stopped["epochs"] == 1
    assert stopped["train_accuracy"] is None, "not claimed before the planned epochs are done"
    stop_in_epoch(None)
    assert train("--resume", out="parts", model=model) == 0
    assert equal(load(tmp_path / "whole"), load(tmp_path / "parts"))


def test_deep_learns_computing_in_bfloat16_and_keeps_float32(train, tmp_path, monkeypatch):
    seen = set()
    real = runs.train_epoch

    def watched(model, *arguments, **options):
        model.block1.conv.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        return real(model, *arguments, **options)

    monkeypatch.setattr(runs, "train_epoch", watched)
    assert train("--epochs", 4, "--batch-size", 8, "--lr", 0.02, model="deep") == 0
    checkpoint = load(tmp_path / "run")
    assert seen == {torch.bfloat16, torch.float32}  # While learning, and while measuring.
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.float32, torch.int64}
    assert checkpoint["training"]["train_accuracy"] > 0.9
    assert checkpoint["training"]["test_accuracy"] > 0.9


def test_a_twin_without_augmentation_differs_in_nothing_else_and_can_be_resumed(train, tmp_path):
    train("--epochs", 1, "--no-augmentation", model="cifar", out="twin")
    assert train("--epochs", 2, "--resume", "--no-augmentation", model="cifar", out="twin") == 0
    recipe = load(tmp_path / "twin")["plan"]["recipe"]
    assert Recipe(**recipe) == replace(RECIPES["cifar"].unaugmented(), epochs=2)


def test_a_run_that_augments_is_not_resumed_without(train, capsys):
    train("--epochs", 1, model="cifar")
    assert train("--epochs", 2, "--resume", "--no-augmentation", model="cifar") == 2
    assert "the run to resume augments its pictures; leave --no-augmentation out" in capsys.readouterr().err


def test_turns_and_scales_that_are_asked_for_are_kept_when_the_run_is_resumed(train, tmp_path, stop_in_epoch):
    added = ("--turn-deg", 45, "--scale", 1.5)
    train("--epochs", 2, *added, model="cifar", out="whole")
    stop_in_epoch(2)
    assert train("--epochs", 2, *added, model="cifar", out="parts") == 130
    stop_in_epoch(None)
    assert train("--resume", model="cifar", out="parts") == 0
    assert equal(load(tmp_path / "whole"), load(tmp_path / "parts"))
    recipe = load(tmp_path / "parts")["plan"]["recipe"]
    assert Recipe(**recipe) == replace(RECIPES["cifar"], epochs=2, turn_deg=45, scale=1.5)


def test_a_run_from_before_there_were_turns_and_scales_goes_on(train, tmp_path):
    train("--epochs", 2, out="whole")
    train("--epochs", 1, out="parts")
    former = load(tmp_path / "parts")
    del former["plan"]["recipe"]["turn_deg"], former["plan"]["recipe"]["scale"]
    torch.save(former, tmp_path / "parts" / "checkpoint.pt")
    assert train("--epochs", 2, "--resume", out="parts") == 0
    assert equal(load(tmp_path / "whole"), load(tmp_path / "parts"))


def test_a_finished_run_has_nothing_left_to_resume_and_can_be_made_longer(train, tmp_path, capsys):
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train("--epochs", 1)
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert train("--resume") == 0
    assert "nothing left to do: 1 epochs are done, 1 were asked for" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    first = load(tmp_path / "run")["training"]["history"]
    assert train("--epochs", 3, "--resume") == 0
    history = load(tmp_path / "run")["training"]["history"]
    assert history[:1] == first
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]


def test_edges_is_written_without_data(tmp_path):
    assert main(["--model", "edges", "--out", str(tmp_path)]) == 0
    checkpoint = load(tmp_path)
    assert checkpoint["classes"] == []
    assert checkpoint["arguments"] == {}
    assert Preprocessing.from_dict(checkpoint["preprocessing"]) == Preprocessing(1, None, None)
    assert checkpoint["state_dict"]["conv1.weight"].flatten().tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 1]
    assert checkpoint["training"]["test_accuracy"] is None
    assert torch.equal(checkpoint["state_dict"]["conv1.bias"], torch.zeros(1))


def test_resuming_with_another_setting_model_or_pictures_is_refused(train, pictures, capsys):
    train("--epochs", 1)
    for arguments, message in (
        (["--seed", 9], "the run to resume has --seed 0; leave --seed out"),
        (["--batch-size", 7], "the run to resume has --batch-size 32; leave --batch-size out"),
        (["--turn-deg", 45], "the run to resume has --turn-deg 0; leave --turn-deg out"),
        (["--scale", 1.5], "the run to resume has --scale 1; leave --scale out"),
        (["--lr", 0.5], "the run to resume has --lr 0.003; leave --lr out"),
    ):
        assert train("--resume", "--epochs", 2, *arguments) == 2
        assert message in capsys.readouterr().err
    assert train("--resume", model="cifar") == 2
    assert re.search(r"checkpoint\.pt is of digits, not of cifar", capsys.readouterr().err)
    (pictures / "train" / "dark" / "000.png").unlink()
    assert train("--resume", "--epochs", 2) == 2
    assert "trained on other pictures ('bright and dark', 40 to learn from)" in capsys.readouterr().err


def test_resuming_where_there_is_no_checkpoint_is_refused(train, capsys):
    assert train("--resume") == 2
    assert re.search(r"there is no checkpoint .*run/checkpoint\.pt", capsys.readouterr().err)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(train, tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
    assert train("--resume") == 2
    assert re.search(r"run/checkpoint\.pt is damaged, or no checkpoint", capsys.readouterr().err)


def test_a_file_of_something_else_is_no_checkpoint(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "run" / "checkpoint.pt")
    assert train("--resume") == 2
    assert "is not a checkpoint of format 1" in capsys.readouterr().err


def test_a_loss_that_explodes_is_reported_and_leaves_no_checkpoint(train, tmp_path, capsys):
    assert train("--lr", 1e36, "--epochs", 5) == 2
    assert re.search(r"the loss became (nan|inf) in epoch \d+/5; try a smaller --lr", capsys.readouterr().err)


def test_an_absent_device_is_refused_in_plain_words(train, capsys):
    assert train("--device", "xpu:7") == 2
    assert "there is no device 'xpu:7' here; try --device cpu" in capsys.readouterr().err


def test_data_has_to_be_named(tmp_path, capsys):
    assert main(["--model", "cifar", "--out", str(tmp_path)]) == 2
    assert "--data is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--epochs", "0"], ["--batch-size", "-1"], ["--lr", "0"], ["--seed", "-1"], ["--model", "deep9"]]
)
def test_senseless_settings_are_refused_by_the_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "cifar", "--data", "digits", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_network_without_a_recipe_takes_no_training():
    assert set(NETWORKS) - set(RECIPES) == {"edges"}


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self):
        return True


def test_a_terminal_sees_a_progress_bar(train, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    train("--epochs", 2)
    assert "reading train" in terminal.getvalue()
    assert re.search(r"epoch 2/2: .*/2 .*loss=\d\.\d+", terminal.getvalue())
