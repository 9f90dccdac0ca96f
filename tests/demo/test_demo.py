"""`llava demo`: every command that it runs, with tiny models instead of the real ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from llava_simplified import recipes
from llava_simplified.arguments import parse_arguments
from llava_simplified.demo import demo_command, demo_steps
from llava_simplified.demo.assets import DemoAssets
from llava_simplified.demo.demo_steps import DOWNLOAD, Demo, Step, Watcher, caption_step
from llava_simplified.demo.progress import NOT_STARTED, captioning_progress, training_progress
from llava_simplified.demo.reward_demo import (
    NUM_SAMPLES,
    check_finished,
    forget_outdated_steps,
    plan_reward_steps,
)
from llava_simplified.demo.terminal import redirect_output
from llava_simplified.model import cpu_dtype
from llava_simplified.model.llava import Llava

DOCS = Path(__file__).parents[2] / "docs"


def headings(page: Path) -> list[str]:
    """Return the second-level headings of a Markdown file."""
    return [line for line in page.read_text().splitlines() if line.startswith("## ")]


def write_tiny_recipes(folder: Path) -> None:
    """Write the demo's recipes for the tiny vision tower, which has fewer layers."""
    folder.mkdir()
    for name in ("demo_projector.yaml", "demo.yaml", "demo_reward.yaml"):
        text = (recipes.RECIPES_FOLDER / name).read_text()
        text = text.replace("[-1, 11, 5, 1]", "[-1, 1]")
        text = text.replace("compile_layers: true", "compile_layers: false")
        # There are too few drawings for a full batch.
        text = text.replace("dataloader_drop_last: true", "dataloader_drop_last: false")
        text = re.sub(r"logging_steps: \d+", "logging_steps: 1", text)
        (folder / name).write_text(text)


@pytest.mark.slow
def test_demo_ends_with_a_model_and_a_report(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_tiny_recipes(tmp_path / "configs")
    images = data_folder / "images"
    tiny = DemoAssets(
        language_model=models_folder / "llama",
        vision_tower=models_folder / "efficientnet",
        images=images,
        train_json=data_folder / "train.json",
        val_json=data_folder / "val.json",
        preview_json=data_folder / "val.json",
    )
    monkeypatch.setattr(recipes, "RECIPES_FOLDER", tmp_path / "configs")
    monkeypatch.setattr(demo_steps, "fetch", lambda _: tiny)
    monkeypatch.setenv("HOME", str(tmp_path))  # the folder of the feature cache
    monkeypatch.chdir(tmp_path)  # outside a checkout
    output = tmp_path / "it's here"  # needs quoting in a shell
    words = ["--output", str(output), "--max-steps", "2", "--limit", "3"]
    assert demo_command.main(words) == 0
    printed = capfd.readouterr().out
    assert printed.count("$ llava ") == 5
    assert "word F1" in printed
    assert "report.html" in printed
    assert len(json.loads((output / "predictions.json").read_text())) == 3
    assert (output / "report.html").stat().st_size > 10_000
    model = Llava.from_pretrained(output / "model", device="cpu")
    assert isinstance(model.caption(images / "0.jpg"), str)

    # The same model, trained further.
    assert demo_command.main(["--reward", *words]) == 0
    printed = capfd.readouterr().out
    assert printed.count("$ llava ") == 6
    assert printed.count("CIDEr-D") == 2  # of the samples, and of the greedy captions
    assert "95 % interval" in printed
    rewards = read_reward_log(output / "reward" / "model")
    assert len(rewards) == 2
    for folder in (output / "reward", output / "reward" / "samples"):
        assert "Reward during training" in (folder / "report.html").read_text()
    samples = json.loads((output / "reward" / "samples_after.json").read_text())
    assert [row["index"] for row in samples] == sorted([0, 1, 2] * NUM_SAMPLES)
    assert Llava.from_pretrained(output / "reward" / "model", device="cpu")

    check_documentation_scripts(tiny, output, tmp_path, monkeypatch)


def test_rewards_page_needs_the_results_of_the_reward_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import make_rewards

    monkeypatch.setattr(make_rewards, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_rewards", "--demo", str(tmp_path)])
    with pytest.raises(SystemExit):
        make_rewards.main()
    assert "make demo-reward" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def read_reward_log(folder: Path) -> list[float]:
    """Return the rewards of the log entries of a run."""
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["reward"] for row in rows if "reward" in row]


def check_documentation_scripts(
    tiny: DemoAssets, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the scripts that write the tutorial, the rewards page and the README's image, with the demo's model."""
    monkeypatch.syspath_prepend(DOCS)
    import make_picture
    import make_rewards
    import make_tutorial

    # The scripts read their templates from DOCS and write there, so replace it with a folder that has the templates.
    for script in (make_tutorial, make_rewards):
        monkeypatch.setattr(script, "DOCS", tmp_path)
        monkeypatch.setattr(script, "FIGURES", tmp_path / "img")
    for name in ("tutorial.md.j2", "rewards.md.j2"):
        shutil.copy(DOCS / name, tmp_path)
    image = tmp_path / "demo.png"
    tutorial_words = ["--checkpoint", str(output / "model"), "--image", "12.jpg"]
    image_words = ["--predictions", str(output / "predictions.json"), "--output", str(image)]
    reward_words = ["--demo", str(output), "--image", "3.jpg"]
    for script, words in (
        (make_tutorial, tutorial_words),
        (make_picture, image_words),
        (make_rewards, reward_words),
    ):
        monkeypatch.setattr(script, "fetch", lambda _: tiny)
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        script.main()
    linked = set()
    for name in ("tutorial.md", "rewards.md"):
        assert headings(tmp_path / name) == headings(DOCS / name)
        linked |= set(re.findall(r"\(img/([^)]+)\)", (tmp_path / name).read_text()))
    assert {path.name for path in (tmp_path / "img").iterdir()} >= linked
    assert image.is_file()


# ---- rewards ----


def finish_demo(output: Path) -> None:
    """Write the files of a finished demo that a reward demo requires."""
    (output / "model").mkdir(parents=True)
    (output / "model" / "llava.json").write_text("{}")
    (output / "predictions.json").write_text(json.dumps([{"index": 0}, {"index": 1}]))


def test_reward_demo_needs_a_finished_demo(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make demo"):
        demo_command.main(["--reward", "--output", str(tmp_path)])
    finish_demo(tmp_path)
    check_finished(tmp_path, limit=2)
    # Simulate a model that was trained again after the predictions were written.
    os.utime(tmp_path / "predictions.json", (1, 1))
    with pytest.raises(ValueError, match="make demo"):
        check_finished(tmp_path)


@pytest.mark.parametrize("limit", [None, 1, 3, 1000])
def test_reward_demo_needs_captions_of_the_same_images(tmp_path: Path, limit: int | None) -> None:
    finish_demo(tmp_path)
    option = [] if limit is None else ["--limit", str(limit)]
    repeat = " ".join(["llava demo --output", str(tmp_path), *option])
    with pytest.raises(ValueError, match=f"--limit 2, .*{re.escape(repeat)}$"):
        demo_command.main(["--reward", "--output", str(tmp_path), *option])


def test_reward_demo_starts_from_the_beginning_after_another_demo(tmp_path: Path) -> None:
    finish_demo(tmp_path)
    finished = tmp_path / "reward" / "finished_steps.json"
    finished.parent.mkdir()
    finished.write_text("{}")
    forget_outdated_steps(tmp_path)
    assert finished.exists()
    os.utime(finished, (1, 1))
    forget_outdated_steps(tmp_path)
    assert not finished.exists()


def test_reward_demo_continues_the_model_and_compares_with_its_captions(tmp_path: Path) -> None:
    demo_folder = tmp_path / "demo"
    steps = plan_reward_steps(DemoAssets(*[tmp_path / "assets"] * 6), demo_folder, max_steps=3)
    train, before, after, compare_samples, predict, compare_greedy = (step.argv for step in steps)
    model_args, _, args = parse_arguments(train[1:])
    assert model_args.init_from == str(demo_folder / "model")
    assert (args.objective, args.max_steps) == ("rloo", 3)
    # These options must be the same as those of the demo's model; `llava train` checks the others.
    demo = yaml.safe_load(recipes.resolve_recipe("demo").read_text())
    reward = yaml.safe_load(recipes.resolve_recipe("demo_reward").read_text())
    for name in ("mm_vision_select_layer", "mm_token_pool", "template", "lora_r", "lora_alpha"):
        assert demo[name] == reward[name]
    reward_folder = demo_folder / "reward"
    models = [words[words.index("--model-path") + 1] for words in (before, after, predict)]
    rewarded = str(reward_folder / "model")
    assert models == [str(demo_folder / "model"), rewarded, rewarded]
    # The samples of both models differ only in the model and the file.
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2
    outputs = [words[words.index("--output") + 1] for words in (before, after, predict)]
    assert compare_samples[1:3] == outputs[:2]
    assert compare_greedy[1:3] == [str(demo_folder / "predictions.json"), outputs[2]]


@pytest.mark.parametrize("is_fast", [True, False])
def test_plan_steps_trains_in_the_dtype_that_is_fast_on_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    seconds = 0.5 if is_fast else 1.8
    monkeypatch.setattr(cpu_dtype, "seconds_relative_to_float32", lambda dtype: seconds)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    steps = demo_command.plan_steps(DemoAssets(*[tmp_path] * 6), tmp_path)
    training = [step.argv for step in steps if step.argv[0] == "train"]
    assert len(training) == 2
    for words in training:
        arguments = parse_arguments(words[1:])[2]
        assert arguments.frozen_dtype == ("bfloat16" if is_fast else "float32")


@pytest.mark.parametrize("option", ["--limit", "--max-steps"])
def test_demo_refuses_numbers_below_1(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        demo_command.main(["--output", str(tmp_path / "demo"), option, "0"])
    assert not (tmp_path / "demo").exists()


def test_demo_ends_when_a_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(words: list[str]) -> int:
        commands.append(words[0])
        return 0 if len(commands) == 1 else 1

    monkeypatch.setattr(demo_steps, "fetch", lambda _: DemoAssets(*[tmp_path] * 6))
    monkeypatch.setattr(demo_steps.cli, "main", run)
    assert demo_command.main(["--output", str(tmp_path)]) == 1
    assert commands == ["inspect", "train"]


def test_demo_recipes_are_found_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = demo_command.plan_steps(DemoAssets(*[tmp_path] * 6), tmp_path)
    names = [
        step.argv[step.argv.index("--config") + 1] for step in steps if "--config" in step.argv
    ]
    assert names == ["demo_projector", "demo"]
    for name in names:
        assert recipes.resolve_recipe(name).is_file()


@pytest.mark.parametrize("max_steps", [None, 1, 10_000])
def test_max_steps_only_shortens_the_stages(tmp_path: Path, max_steps: int | None) -> None:
    steps = demo_command.plan_steps(DemoAssets(*[tmp_path] * 6), tmp_path, max_steps=max_steps)
    for step in steps:
        if step.argv[0] == "train":
            recipe = step.argv[step.argv.index("--config") + 1]
            options = yaml.safe_load(recipes.resolve_recipe(recipe).read_text())
            expected = min(options["max_steps"], max_steps or options["max_steps"])
            assert step.argv[step.argv.index("--max_steps") + 1] == str(expected)


# ---- progress, continuing ----


def fake_steps(folder: Path) -> list[Step]:
    """Return a training step and an evaluation, which the tests run without `llava`."""
    train = Step(
        "Train",
        ["train", "--output_dir", str(folder / "model")],
        seconds=100,
        read_progress=lambda: training_progress(folder / "model", 20),
        run_folder=folder / "model",
    )
    return [train, Step("Evaluate", ["evaluate", str(folder)], seconds=10)]


def write_training_output(folder: Path) -> None:
    """Write what a run of 20 steps has written at step 5, with an incomplete line at the end."""
    (folder / "eval_captions").mkdir(parents=True)
    row = {"image": "0.jpg", "pred_output": "a cat\x1b[31m", "gt_caption": "a <b>dog</b>"}
    (folder / "eval_captions" / "step-5.jsonl").write_text(json.dumps(row) + "\n")
    log = [{"step": 1, "loss": 5.0}, {"step": 5, "loss": 3.0}]
    text = "".join(json.dumps(row) + "\n" for row in log) + '{"step": 6, "lo'
    (folder / "trainer_log.jsonl").write_text(text)


def test_progress_is_read_from_what_a_running_command_has_written(tmp_path: Path) -> None:
    assert training_progress(tmp_path / "model", 20) == NOT_STARTED
    write_training_output(tmp_path / "model")
    progress = training_progress(tmp_path / "model", 20)
    assert progress.fraction == 0.25
    assert "step 5 of 20" in progress.text
    assert captioning_progress(tmp_path / "p.json", 4) == NOT_STARTED
    (tmp_path / "p.json.part.jsonl").write_text("{}\n{}\n{}\n")
    assert captioning_progress(tmp_path / "p.json", 4).fraction == 0.75


def test_demo_shows_captions_and_writes_a_report_while_a_step_runs(
    tmp_path: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = tmp_path / "report.html"

    def run(words: list[str]) -> int:
        print("noise of a library")
        if words[0] == "train":
            write_training_output(tmp_path / "model")
            deadline = time.monotonic() + 30
            # The step "runs" until the report shows its captions.
            while not (report.is_file() and "step 5" in report.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        return 0

    monkeypatch.setattr(demo_steps.cli, "main", run)
    monkeypatch.setattr(demo_steps.Watcher, "REDRAW_SECONDS", 0.01)
    assets = DemoAssets(*[data_folder / "images"] * 6)
    with redirect_output(tmp_path / "log.txt") as terminal:
        demo = Demo(tmp_path, terminal)
        demo.durations.append(0.0)  # of the download
        assert demo.run(assets, fake_steps(tmp_path)) == 0
    printed = capfd.readouterr()
    assert "a cat" in printed.out
    assert "noise" not in printed.out + printed.err
    assert "\x1b" not in printed.out
    assert "noise of a library" in (tmp_path / "log.txt").read_text()
    page = report.read_text()
    assert 'http-equiv="refresh"' in page
    assert "a &lt;b&gt;dog&lt;/b&gt;" in page
    assert "data:image/webp" in page


def test_report_of_the_last_step_is_not_replaced_by_that_of_a_running_demo(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, on a busy machine, the page of the running demo could be written after the final one."""
    monkeypatch.setattr(demo_steps.Watcher, "REDRAW_SECONDS", 0.01)
    assets = DemoAssets(*[data_folder / "images"] * 6)
    with redirect_output(tmp_path / "log.txt") as terminal:
        demo = Demo(tmp_path, terminal)
        demo.durations.append(0.0)
        redrawn = threading.Event()
        monkeypatch.setattr(terminal, "show_progress", lambda _: redrawn.set())
        demo.durations.append(0.0)
        watcher = Watcher(demo, [DOWNLOAD, *fake_steps(tmp_path)], 2, assets.images)
        with watcher:
            assert redrawn.wait(30)
            redrawn.clear()
            assert redrawn.wait(30)
    assert not (tmp_path / "report.html").exists()


class FakeRuns:
    """Runs the fake steps, and records their commands. The commands write no files except a checkpoint."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self.images = images
        self.calls: list[list[str]] = []
        self.fail_at = ""  # name of the command that fails

    def run(self, words: list[str]) -> int:
        """Run one command."""
        self.calls.append(words)
        if words[0] == "train":
            (self.folder / "model" / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        return int(words[0] == self.fail_at)

    def demo(self, steps: list[Step]) -> list[list[str]]:
        """Run the demo, and return the commands that it runs."""
        self.calls = []
        with redirect_output(self.folder / "log.txt") as terminal:
            demo = Demo(self.folder, terminal)
            demo.durations.append(0.0)
            demo.run(DemoAssets(*[self.images] * 6), steps)
        return self.calls


@pytest.fixture
def runs(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    runs = FakeRuns(tmp_path, data_folder / "images")
    monkeypatch.setattr(demo_steps.cli, "main", runs.run)
    return runs


def test_second_demo_skips_what_is_finished_and_resumes_what_is_not(
    tmp_path: Path, runs: FakeRuns
) -> None:
    steps = fake_steps(tmp_path)
    train, evaluate = (step.argv for step in steps)
    runs.fail_at = "train"
    assert runs.demo(steps) == [train]  # interrupted
    runs.fail_at = "evaluate"
    assert runs.demo(steps) == [[*train, "--resume_from_checkpoint", "true"], evaluate]
    assert list((tmp_path / "model").iterdir()) == []  # checkpoints of a finished run are deleted
    runs.fail_at = ""
    assert runs.demo(steps) == [evaluate]
    assert runs.demo(steps) == []
    # With another option, the model is trained from the start, and no partial result of the first model is used.
    (tmp_path / "predictions.json.part.jsonl").write_text("{}\n")
    changed = [steps[0]._replace(argv=[*train, "--seed", "1"]), steps[1]]
    assert runs.demo(changed) == [[*train, "--seed", "1"], evaluate]
    assert not (tmp_path / "predictions.json.part.jsonl").exists()


def test_changed_recipe_or_version_starts_the_training_again(
    tmp_path: Path, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("lora_r: 16\n")
    train, evaluate = fake_steps(tmp_path)
    steps = [train._replace(argv=[*train.argv, "--config", str(recipe)]), evaluate]
    commands = [step.argv for step in steps]
    runs.fail_at = "train"
    assert runs.demo(steps) == commands[:1]  # interrupted
    runs.fail_at = ""
    recipe.write_text("lora_r: 32\n")
    assert runs.demo(steps) == commands  # not resumed
    assert runs.demo(steps) == []
    recipe.write_text("lora_r: 8\n")
    assert runs.demo(steps) == commands
    monkeypatch.setattr(demo_steps, "__version__", "another")
    assert runs.demo(steps) == commands


def test_step_runs_again_when_its_output_is_missing(tmp_path: Path, runs: FakeRuns) -> None:
    train, evaluate = fake_steps(tmp_path)
    steps = [train, evaluate._replace(outputs=(tmp_path / "scores.json",))]
    (tmp_path / "scores.json").write_text("{}")
    assert runs.demo(steps) == [train.argv, evaluate.argv]
    assert runs.demo(steps) == []
    (tmp_path / "scores.json").unlink()
    assert runs.demo(steps) == [evaluate.argv]


def test_interrupted_captions_are_continued_only_with_the_same_limit(
    tmp_path: Path, runs: FakeRuns
) -> None:
    predictions = tmp_path / "predictions.json"
    journal = tmp_path / "predictions.json.part.jsonl"
    settings = tmp_path / "predictions.json.part.jsonl.settings.json"
    first = caption_step(["predict", "--limit", "3"], predictions, 3)
    other = caption_step(["predict", "--limit", "5"], predictions, 5)
    runs.fail_at = "predict"
    runs.demo([first])
    journal.write_text("{}\n")
    settings.write_text("{}")
    runs.demo([first])
    assert journal.exists()
    runs.demo([other])
    assert not journal.exists()
    assert not settings.exists()


def test_every_step_with_a_result_names_its_files(tmp_path: Path) -> None:
    assets = DemoAssets(*[tmp_path] * 6)
    steps = demo_command.plan_steps(assets, tmp_path) + plan_reward_steps(assets, tmp_path)
    for step in steps:
        words = step.argv
        named = [words[i + 1] for i, word in enumerate(words) if word in ("--output", "--report")]
        files = [Path(name) for name in named]
        if "--output_dir" in words:
            files.append(Path(words[words.index("--output_dir") + 1]) / "llava.json")
        assert list(step.outputs) == files


def test_time_left_follows_the_measured_speed(tmp_path: Path) -> None:
    steps = [DOWNLOAD, *fake_steps(tmp_path), *[Step("Other", ["x"], seconds=300)] * 3]
    with redirect_output(tmp_path / "log.txt") as terminal:
        demo = Demo(tmp_path, terminal)
        demo.durations.append(1.0)
        watcher = Watcher(demo, steps, 1, None)
    # A quarter of a step of 100 expected seconds took 50 seconds: 150 s of this step remain, and the later steps take
    # twice the expected 910 s.
    assert watcher._time_left(50.0, 0.25) == f"about {round((150 + 2 * 910) / 60)} minutes left"
    # The next quarter took only 10 seconds. The slow start is not expected to continue, so 20 s remain of 80 s.
    assert watcher._time_left(60.0, 0.5) == f"about {round((20 + 0.8 * 910) / 60)} minutes left"
