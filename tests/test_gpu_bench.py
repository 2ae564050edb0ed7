"""bench/gpu.py: that it runs on a CPU, writes each result as it comes and keeps to its limits."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench/gpu.py")
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_each_result_is_written_as_it_comes_and_an_error_leaves_the_rest(gpu, tmp_path):
    results, seen = gpu.Results(tmp_path, "cpu", 1.0, ["rl8"]), []

    def read():
        return json.loads((tmp_path / "gpu.json").read_text())

    def good():
        seen.append(read()["results"] if (tmp_path / "gpu.json").exists() else {})
        return gpu.Side(lambda: None, 4, chunk=5, warm=1)

    def bad():
        raise RuntimeError("no such kernel\nand more")

    sides = {"SAC, plain loop": good, "broken": bad, "SAC, bf16, S=2": good}
    gpu.in_turn(results, sides, "updates/s", "cpu", 0.001, time.monotonic() + 60)
    written = read()
    assert written["device"] == "cpu" and written["missing"] == ["rl8"]
    assert seen[0] == {} and set(seen[1]) == {"SAC, plain loop", "broken"}
    entries = written["results"]
    assert entries["broken"]["error"] == "RuntimeError: no such kernel"
    for name in ("SAC, plain loop", "SAC, bf16, S=2"):
        assert len(entries[name]["repeats"]) == gpu.MOST_REPEATS and min(entries[name]["repeats"])
    assert "SAC, bf16, S=2 / SAC, plain loop" in (tmp_path / "gpu.md").read_text()


def test_what_is_late_is_not_begun_and_a_section_is_cut(gpu, tmp_path):
    results = gpu.Results(tmp_path, "cpu", 1.0, [])
    gpu.in_turn(results, {"late": lambda: 1 / 0}, "steps/s", "cpu", 1.0, time.monotonic() - 1)
    assert results.entries["late"]["error"] == "not started: no time left"
    with pytest.raises(gpu.OutOfTime), gpu.hard_limit(0.2):
        time.sleep(20)


def test_a_program_is_stopped_at_its_time(gpu, tmp_path):
    program = gpu.Program(["-uc", "import time; print('up'); time.sleep(60)"], tmp_path / "log")
    while "up" not in (tmp_path / "log").read_text():  # before, Ctrl-C would end it in silence
        assert program.process.poll() is None
        time.sleep(0.1)
    ended = program.end(time.monotonic() + 1)
    assert ended["end"] == "stopped at its time" and ended["seconds"] < 20
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_all_sections_write_results_on_a_cpu(tmp_path):
    sections = ["sac", "envs", "learning", "quadrotor", "leanrl"]
    subprocess.run([sys.executable, "bench/gpu.py", "--device", "cpu", "--minutes", "2.5", "--out",
                    str(tmp_path), "--only", *sections], cwd=ROOT, check=True, timeout=400)
    entries = json.loads((tmp_path / "gpu.json").read_text())["results"]
    for name in ("SAC, plain loop", "SAC, LeanRL's way", "SAC, bf16, S=2", "PPO, bf16, 2 x 8",
                 "torch/Pendulum-v1, 2 x 32"):
        assert entries[name]["repeats"] and "error" not in entries[name], entries[name]
    for name in ("SAC, HalfCheetah-v4", "XQC, HalfCheetah-v4", "PPO, torch/Quadrotor-v0"):
        assert entries[name]["curve"] and entries[name]["repeats"], entries[name]
    assert (tmp_path / "gpu.md").read_text().count("|") > 50
