"""lab.watch: returns, frames, and errors."""

import functools
import json
import math
import os
import re
import shutil
import sys
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from lab.agent import build_agent, restore_state
from lab.envs.shard import EVALUATION, seed_of
from lab.envs.spec import make_one, probe
from lab.envs.torch_vec import TorchEnvs
from lab.errors import UserError, guarded
from lab.policy import Part, PolicyStack
from lab.training import checkpoint, recorder
from lab.watch import __main__ as watch
from lab.watch import camera, film
from tests import probe_envs, small_run
from tests.conftest import AGENTS, is_discrete, refusal
from tests.small_run import STEPS

PAINTED = "tests.probe_envs:lab-tests/Painted-v0"
EPISODES = 2  # of each evaluation


@pytest.fixture(autouse=True)
def environment(monkeypatch, keep_threads):
    """What a film sets is forgotten after it."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))


@pytest.fixture
def no_dry_run(monkeypatch):
    """Drawing in a process of its own takes seconds."""
    monkeypatch.setattr(camera, "check", lambda *_: None)


train = functools.partial(small_run.train, env=(PAINTED,), seeds=4, eval_every=STEPS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Seeds 0 to 3 in two stacks. Not to be written into."""
    return train(tmp_path_factory.mktemp("trained"))


def group(run, env_id=PAINTED):
    return small_run.group(run, env_id)


def filmed(capsys, *argv):
    """-> the returns that are printed, (episodes, seeds), and the rest of the lines."""
    assert guarded(lambda: watch.run([str(arg) for arg in argv])) == 0
    out, err = capsys.readouterr()
    assert not err and "\x1b" not in out
    rows = [line.split()[2:-1] for line in out.splitlines() if line.startswith("episode ")]
    return np.array(rows, float), out


def refused(capsys, *argv):
    return refusal(capsys, watch.run, *argv)


def pictures(path):
    """-> arrays (height, width, 3) and their milliseconds."""
    with Image.open(path) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append((np.asarray(gif.convert("RGB"), int), gif.info["duration"]))
    return frames


def episodes(run, seeds, stack):
    """The same ones, by gymnasium and the agent alone: the returns (episodes, seeds), and the
    colours that the environments had, before the first step and after each."""
    members = range(stack[0], stack[1] + 1)
    folder = group(run) / f"stack_{stack[0]}_{stack[1]}"
    config = json.loads((run / "config.json").read_text())["config"]
    spec = probe(PAINTED)
    agent = build_agent("agents/sac.py", config, spec, members, 1, STEPS, "cpu", lambda f: f)
    restore_state(agent, checkpoint.load_latest(folder)["agent"])
    returns, colours = np.zeros((EPISODES, len(seeds))), {}
    for n in range(EPISODES):
        for i, seed in enumerate(seeds):
            env = gymnasium.make(PAINTED)
            obs, _ = env.reset(seed=seed_of(seed, (EVALUATION, STEPS), n))
            colours[n, seed], end = [env.unwrapped.colour()], False
            while not end:
                every = torch.as_tensor(obs).expand(len(members), 1, -1)
                action = agent.act(every, explore=False)[seed - stack[0], 0].numpy()
                obs, reward, terminated, truncated, _ = env.step(action)
                returns[n, i] += reward
                colours[n, seed].append(env.unwrapped.colour())
                end = terminated or truncated
    return returns, colours


# What is seen


def test_the_returns_are_a_plain_loops_and_the_runs_own_evaluations(run, capsys, no_dry_run):
    shown, out = filmed(capsys, run, "--seeds", 4, "--episodes", EPISODES)
    assert out.startswith(f"sac on {PAINTED}, after {STEPS} steps\n")
    one, two = (episodes(run, seeds, seeds)[0] for seeds in ((0, 1), (2, 3)))
    assert shown == pytest.approx(np.concatenate([one, two], 1), abs=0.051)
    for seed in range(4):
        rows = recorder.read_metrics(group(run) / f"seed_{seed}" / "metrics.jsonl")
        assert shown[:, seed].mean() == pytest.approx(rows[-1]["return/eval"], abs=0.051)
    means = re.search(r"^mean +(.*)", out, re.MULTILINE)[1].split()
    assert np.array(means, float)[:4] == pytest.approx(shown.mean(0), abs=0.11)
    assert float(means[4]) == pytest.approx(shown.mean(), abs=0.11)


def test_a_film_has_every_second_step_of_every_seed_in_its_tile(run, capsys, no_dry_run):
    """50 steps a second: every second one is seen, and the last, which the tile holds, paler."""
    filmed(capsys, run, "--seeds", 2, "--episodes", EPISODES, "--width", 60)
    _, colours = episodes(run, (0, 1), (0, 1))
    wanted = []
    for n in range(EPISODES):
        lengths = [len(colours[n, seed]) - 1 for seed in (0, 1)]
        last = max(lengths)
        for step in sorted({*range(0, last, 2), last}):
            tiles = []
            for seed, length in zip((0, 1), lengths, strict=True):
                colour = np.array(colours[n, seed][min(step, length)], int)
                tiles.append(colour if step < length else (colour + 255) // 2)
            wanted.append((tiles, 740 if step == last else 40))
    frames = pictures(group(run) / "watch.gif")
    assert len(frames) == len(wanted)
    for (frame, length), (tiles, seconds) in zip(frames, wanted, strict=True):
        assert length == seconds
        for i, tile in enumerate(tiles):
            left = film.GAP + i * (60 + film.GAP)
            scene = frame[-film.GAP - 30 : -film.GAP - 2, left : left + 60]
            assert np.abs(scene - tile).max() < 12, "not this seed's colours"


def test_a_tile_says_its_seed_and_its_return():
    shown = []

    wall = types.SimpleNamespace(
        show=lambda picture, seconds: shown.append(np.asarray(picture, int)))
    for seeds, value in (([0], 1.0), ([0], 1.0), ([3], 1.0), ([0], 2.0)):
        on_step = film.Film(wall, seeds, 25, 100, None).episode(
            lambda place, running: np.zeros((10, 10, 3), np.uint8))
        on_step(torch.tensor([[value]]), torch.tensor([[True]]))
    assert np.array_equal(shown[0], shown[1])
    middle = shown[0].shape[1] // 2
    for other, here in ((shown[2], np.s_[:, :middle]), (shown[3], np.s_[:, middle:])):
        differs = shown[0] != other
        assert differs[here].any() and differs.sum() == differs[here].sum()


@pytest.mark.parametrize("number, rows, columns", [
    (1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 2, 3), (8, 2, 4), (9, 3, 3), (10, 3, 4)])
def test_tiles_stand_in_reading_order(number, rows, columns):
    whole = film.mosaic([Image.new("RGB", (10, 20), (i, 0, 0)) for i in range(number)])
    width, height = 10 + film.GAP, 20 + film.GAP
    assert whole.size == (columns * width + film.GAP, rows * height + film.GAP)
    for i in range(number):
        corner = film.GAP + i % columns * width, film.GAP + i // columns * height
        assert whole.getpixel(corner) == (i, 0, 0)


@pytest.mark.parametrize("fps", [5, 20, 30, 50, 67, 125])
def test_a_gif_runs_in_real_time(tmp_path, fps):
    """A browser shows a GIF of more than 50 pictures a second slowly."""
    gif = film.Gif(tmp_path / "a.gif")
    shown = film.Film(gif, [0], fps, 50, None)
    draw = iter(range(10_000))
    on_step = shown.episode(lambda *_: np.full((10, 10, 3), next(draw) % 250, np.uint8))
    steps = 4 * fps
    for step in range(steps + 1):
        on_step(torch.zeros(1, 1), torch.tensor([[step < steps]]))
    gif.close()
    times = [length for _, length in pictures(tmp_path / "a.gif")]
    assert min(times) >= 30 and sum(times) / 1000 == pytest.approx(shown.seconds, abs=0.01)
    assert shown.seconds - film.PAUSE == pytest.approx(4, abs=2 * shown.length)


@pytest.mark.parametrize("length, seen, cut", [
    (20, 11, False), (50, 26, False), (51, 26, True), (999, 26, True)])
def test_a_long_episode_is_cut_in_the_film(length, seen, cut):
    shown = []
    wall = types.SimpleNamespace(show=lambda picture, seconds: shown.append(seconds))
    one = film.Film(wall, [0], 50, 50, 1.0)
    on_step = one.episode(lambda *_: np.zeros((10, 10, 3), np.uint8))
    for step in range(length + 1):
        on_step(torch.zeros(1, 1), torch.tensor([[step < length]]))
    assert len(shown) == seen and one.cut == cut
    assert shown == pytest.approx([0.04] * (seen - 1) + [0.04 + film.PAUSE])


@pytest.mark.parametrize("where, seeds, out", [
    ("", (0, 1, 2), "{group}"), ("{env}", (0, 1, 2), "{group}"),
    ("{env}/sac", (0, 1, 2), "{group}"), ("{env}/sac/seed_3", (3,), "{group}/seed_3")])
def test_a_folder_means_what_lies_in_it(run, capsys, no_dry_run, where, seeds, out):
    path = run / where.format(env=group(run).parent.name)
    _, words = filmed(capsys, path, "--episodes", 1)
    assert words.splitlines()[1].split() == [
        "return", *(word for seed in seeds for word in ("seed", str(seed))), "mean"]
    assert (Path(out.format(group=group(run))) / "watch.gif").stat().st_size > 100


def test_each_environment_has_its_film(tmp_path, capsys, no_dry_run):
    run = train(tmp_path, env=(PAINTED, "Pendulum-v1"), processes=1)
    _, out = filmed(capsys, run, "--episodes", 1, "--max-seconds", 0.5)
    assert "(--max-seconds 0.5 of each episode)" in out
    assert out.count("sac on ") == 2
    assert len(list(run.glob("*/sac/watch.gif"))) == 2
    assert "--out writes one film" in refused(capsys, run, "--out", tmp_path / "a.gif")


def test_an_unfinished_run_says_how_far_it_is(run, capsys, no_dry_run):
    settings = json.loads((run / "config.json").read_text())
    settings["options"]["steps"] = 2 * STEPS
    settings["config"]["buffer_size"] = STEPS  # or the replay has another shape
    (run / "config.json").write_text(json.dumps(settings))
    shutil.rmtree(group(run) / "stack_0_1")
    _, out = filmed(capsys, run, "--episodes", 1)
    assert f"after {STEPS} steps of {2 * STEPS}\n" in out
    assert out.splitlines()[1].split() == ["return", "seed", "2", "seed", "3", "mean"]


def test_a_seed_that_failed_is_named():
    cast = PolicyStack([Part(None, range(2, 5), [2, 4], dict.fromkeys((2, 3, 4), 7), [3, 4], {}),
                        Part(None, range(1), [0], {0: 9}, [], {})])
    assert cast.describe(9) == "after 7 and 9 steps of 9; seed 4 failed in training"


def test_held_actions_are_held_in_a_film_which_shows_each_once_in_real_time(
        tmp_path, capsys, no_dry_run):
    run = train(tmp_path, processes=1, seeds=1, action_repeat=2, failure_below=0.0)
    returns, _ = filmed(capsys, run, "--episodes", EPISODES)
    rows = recorder.read_metrics(group(run) / "seed_0" / "metrics.jsonl")
    assert rows[-1]["step"] == STEPS
    assert returns[:EPISODES].mean() == pytest.approx(rows[-1]["return/eval"], abs=0.051)
    view = watch.make_view(PAINTED, [0], action_repeat=2)
    assert view.fps == probe_envs.Painted.metadata["render_fps"] / 2
    view.close()


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_every_agent_is_filmed(tmp_path, capsys, no_dry_run, path):
    painted = PAINTED.replace("Painted", "Choices" if is_discrete(path) else "Painted")
    run = train(tmp_path, agent=path, env=(painted,), seeds=2, processes=1)
    returns, _ = filmed(capsys, run)
    folder = recorder.group_folder(run, painted, path.stem)
    rows = recorder.read_metrics(folder / "seed_1/metrics.jsonl")
    if path.stem != "cem":  # its search draws numbers for all of a seed's environments at once
        assert returns[:EPISODES, 1].mean() == pytest.approx(rows[-1]["return/eval"], abs=0.06)


@pytest.mark.parametrize("name", ["Pendulum-v1", "MountainCarContinuous-v0",
                                  "ContinuousCartPole-v1", "CartPole-v1"])
def test_a_torch_environment_is_drawn_by_its_twin(name):
    """From the same state, the last of an episode too."""
    view = watch.make_view(f"torch/{name}", [0, 1])
    plain = TorchEnvs(view.config)
    view.env.max_episode_steps = plain.env.max_episode_steps = 40
    twin = make_one(view.env.twin, render_mode="rgb_array")
    twin.reset()
    assert torch.equal(view.reset(1), plain.reset(1))
    ended = 0
    for _ in range(45):
        actions = torch.ones(2, 1, 1)
        step, seen = view.step(actions), plain.step(actions)
        assert torch.equal(step.obs, seen.obs)
        last = bool(step.terminations[1] + step.truncations[1])
        if last or not ended:
            state = seen.next_obs[1, 0].numpy()
            if name == "Pendulum-v1":
                state = np.array([math.atan2(state[1], state[0]), state[2]])
            twin.unwrapped.state = state
            drawn = view.draw(1, not last).astype(int)
            assert np.abs(drawn - twin.render()).mean() < 0.5
        ended += last
    assert ended
    view.close()


def test_a_run_in_torch_is_filmed(tmp_path, capsys):
    run = train(tmp_path, env=("torch/ContinuousCartPole-v1",), processes=1)
    returns, _ = filmed(capsys, run, "--seeds", 2)
    assert returns.shape == (3, 2) and (returns >= 1).all()
    assert "torch/Quadrotor-v0 cannot be rendered" in refused(
        capsys, train(tmp_path, env=("torch/Quadrotor-v0",), processes=1))


def test_an_mp4_has_the_same_pictures(run, capsys, no_dry_run, monkeypatch, tmp_path):
    frames = []

    def write_frames(path, size, fps, **settings):
        frames.append((size, fps))
        Path(path).write_bytes(b"film")
        while True:
            frames.append((yield))

    package = types.SimpleNamespace(write_frames=write_frames)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", package)
    filmed(capsys, run, "--out", tmp_path / "a.mp4", "--episodes", 1)
    filmed(capsys, run, "--out", tmp_path / "a.gif", "--episodes", 1)
    (size, fps), *frames = frames
    gif = pictures(tmp_path / "a.gif")
    height, width, _ = gif[0][0].shape
    assert size == (width, height) and not (width % 2 or height % 2) and fps == pytest.approx(25)
    assert len(frames) / fps == pytest.approx(sum(length for _, length in gif) / 1000, abs=0.05)
    first = np.frombuffer(frames[0], np.uint8).reshape(height, width, 3)
    assert np.abs(first - gif[0][0]).mean() < 5


def test_a_window_shows_whole_episodes_and_may_be_closed(run, capsys, no_dry_run, monkeypatch):
    import pygame

    before = sorted(run.rglob("*"))
    whole, _ = filmed(capsys, run, "--window", "--episodes", 2)
    assert whole.shape == (2, 3) and not pygame.display.get_init()
    monkeypatch.setattr(pygame.event, "get", lambda kind: [kind])
    closed, _ = filmed(capsys, run, "--window", "--episodes", 2)
    assert closed.size == 0 and sorted(run.rglob("*")) == before


def test_mujoco_moves_in_a_film_as_elsewhere(tmp_path, capsys, monkeypatch):
    """The camera follows, the floor is endless, and the returns are the evaluation's."""
    monkeypatch.delenv("MUJOCO_GL")
    try:
        camera.check("Hopper-v5")
    except UserError as error:
        pytest.skip(str(error))
    run = train(tmp_path, env=("Hopper-v5",), seeds=1, processes=1, eval_episodes=1)
    folder = group(run, "Hopper-v5")
    returns, _ = filmed(capsys, run, "--episodes", 1, "--max-seconds", 0.1)
    rows = recorder.read_metrics(folder / "seed_0" / "metrics.jsonl")
    assert returns.item() == pytest.approx(rows[-1]["return/eval"], abs=0.051)
    frames = pictures(folder / "watch.gif")
    assert 2 <= len(frames) <= 4 and frames[-1][0][40:].std() > 10
    assert np.abs(frames[0][0] - frames[-1][0]).mean() > 0.1, "nothing moves"


# What is refused


@pytest.mark.parametrize("argv, words", [
    ("{run}/none", "no folder {run}/none"),
    ("{tmp}", "{tmp} is not in a run folder: found no config.json"),
    ("{group}/all", "no folder"),
    ("{group}/seed_9", "no folder"),
    ("{group}/seed_8", "seed_8 has no checkpoint yet"),
    ("{run} --seeds 5", "--seeds 5: {group} has checkpoints of 4"),
    ("{group}/seed_1 --seeds 2", "--seeds 2: {group}/seed_1 has checkpoints of 1"),
    ("{run} --seeds 0", "--seeds must be at least 1, not 0"),
    ("{run} --episodes 0", "--episodes must be at least 1, not 0"),
    ("{run} --width 9", "--width must be at least 50, not 9"),
    ("{run} --max-seconds 0", "--max-seconds must be at least 0.1, not 0"),
    ("{run} --episode x", "--episode"),
    ("", "PATH"),
    ("{run} --out {tmp}/a.avi", "a.avi: the name must end in .gif or .mp4"),
    ("{run} --out {tmp}/none/a.gif", "cannot write {tmp}/none/a.gif: choose another place"),
    ("{run} --out {tmp}/a.mp4", "an mp4 needs a package: pip install imageio-ffmpeg"),
    ("{run} --agent {tmp}/none.py", "no agent file '{tmp}/none.py'"),
    ("{run} --agent agents/ppo.py", "config.json does not fit agents/ppo.py"),
])
def test_bad_input_is_one_line(run, capsys, no_dry_run, monkeypatch, argv, words):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    (group(run) / "seed_8").mkdir()
    before = sorted(run.rglob("*"))
    names = {"run": run, "tmp": run.parent, "group": group(run)}
    assert words.format(**names) in refused(capsys, *argv.format(**names).split())
    assert sorted(run.rglob("*")) == before


def test_a_run_without_a_checkpoint_is_one_line(run, capsys):
    for stack in group(run).glob("stack_*"):
        for path in stack.glob("*.pt"):
            path.unlink()
    assert f"{run} has no checkpoint yet" in refused(capsys, run)


def test_a_window_without_a_display_is_one_line(run, capsys, monkeypatch):
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "--window: there is no display here" in refused(capsys, run, "--window")


def test_a_changed_agent_runs_only_if_it_is_named(trained, run, capsys, no_dry_run, tmp_path):
    copy = run / "sac.py"
    copy.write_text(copy.read_text() + "\n# as it was then\n")
    line = refused(capsys, run)
    assert f"agents/sac.py has changed since {run} started" in line and f"--agent {copy}" in line
    returns, _ = filmed(capsys, run, "--agent", copy)
    assert np.array_equal(returns, filmed(capsys, trained, "--out", tmp_path / "a.gif")[0])


def test_a_checkpoint_of_other_networks_is_one_line(run, capsys, no_dry_run):
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["qf_width"] = 8
    (run / "config.json").write_text(json.dumps(settings))
    assert re.search(r"stack_0_1 does not fit agents/sac.py: ValueError: qf does not fit the "
                     r"checkpoint: size mismatch for mlp\S+ .*, 16, .* in current model .*, 8, ",
                     refused(capsys, run))


def test_code_beside_a_config_does_not_run_unless_it_is_named(run, capsys):
    copy = run / "sac.py"
    copy.write_text(f"open({str(run / 'ran')!r}, 'w')")
    settings = json.loads((run / "config.json").read_text())
    settings["options"]["agent"] = str(copy)
    (run / "config.json").write_text(json.dumps(settings))
    assert "names code in its own folder" in refused(capsys, run)
    assert not (run / "ran").exists()


def test_what_draws_nothing_is_one_line(monkeypatch):
    """Drawing is tried in a process of its own, which may end as it likes."""
    for name, words in (("Diary", "cannot be ren"),
                        ("Ragged", r"must render an array .* not \[1, 2\] \(a list\)")):
        with pytest.raises(UserError, match=f"lab-tests/{name}-v0 {words}"):
            camera.check(f"tests.probe_envs:lab-tests/{name}-v0")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(UserError, match=r"cannot be rendered \(glfw: exit code -9\);.*EGL.*OSMesa"):
        camera.check("tests.probe_envs:lab-tests/Crashing-v0")


def test_a_gl_that_works_is_found(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    camera.check(PAINTED)
    assert os.environ["MUJOCO_GL"] == camera.GL[0]
    monkeypatch.setenv("MUJOCO_GL", "")
    camera.check(PAINTED.replace("Painted", "NeedsSecondGL"))
    assert os.environ["MUJOCO_GL"] in camera.GL[1:]
    assert isinstance(camera.make(PAINTED).unwrapped, probe_envs.Painted)
