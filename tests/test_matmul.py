"""The library for fp32 matrix products. On any processor: products and clock are stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab import matmul, train
from lab.accelerate import PRECISIONS
from lab.command_line import parse_args
from lab.contract import FirstCalls, check_contract
from lab.errors import UserError
from lab.matmul import BLAS, ONEDNN, Product, Products, RecordProducts, computed_by
from lab.options import Simple, Tune
from lab.plan import __main__ as plan
from lab.plan import candidates
from lab.training import loop
from lab.training.job import Job, choose_fp32_library, make_jobs
from lab.tuning import run as study
from tests.conftest import AGENTS, make_spec

ATEN = torch.ops.aten
SQUARES = (((4, 64, 64), (4096, 64, 1)),) * 2
SMALL = {"batch_size": 16, "qf_width": 16, "actor_width": 16, "learning_starts": 4}


def uses_onednn():
    return torch.get_float32_matmul_precision() == "medium"


def product(monkeypatch, blas=1.0, onednn=1.0, rounds=False):
    """A product that takes these seconds of a stand-in clock with each library."""
    clock = [0.0]
    monkeypatch.setattr(matmul.time, "process_time", lambda: clock[0])

    def op(a, b):
        clock[0] += onednn if uses_onednn() else blas
        if rounds and uses_onednn():
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return torch.from_numpy(a.numpy() @ b.numpy())  # which does not round on any processor

    return Product(op, SQUARES)


def test_the_products_of_an_update_are_recorded_with_their_gradients():
    weight = torch.randn(2, 5, 7, requires_grad=True)
    x = torch.randn(2, 3, 5)
    with RecordProducts() as recorded:
        torch.baddbmm(torch.zeros(2, 1, 7), x, weight).sum().backward()
        x.double() @ x.double().mT
        x.bfloat16() @ x.bfloat16().mT
        x[:, :0] @ weight
    forward, backward = recorded.products
    assert forward == Product(ATEN.baddbmm.default, (
        ((2, 1, 7), (7, 7, 1)), ((2, 3, 5), (15, 5, 1)), ((2, 5, 7), (35, 7, 1))))
    assert backward.op == ATEN.bmm.default and backward.tensors[0] == ((2, 5, 3), (15, 1, 5))
    assert [*recorded.products.values()] == [1, 1]


def test_a_dry_run_counts_the_products_of_every_step_that_is_owed():
    accelerate = FirstCalls()
    step = accelerate(lambda x: x @ x)
    for _ in range(5):
        step(torch.ones(3, 3))
        step(torch.ones(4, 4))
    assert [*accelerate.products.values()] == [5, 5]
    once, often = (check_contract("agents/sac.py", {"replay_ratio": ratio}, make_spec(), 1, "cpu")
                   for ratio in (1.0, 3.0))
    assert once and often == Products({key: 3 * count for key, count in once.items()})


@pytest.mark.parametrize("op, tensors, shapes", [
    (ATEN.mm, [((3, 5), (1, 3)), ((5, 7), (7, 1))], [(3, 5), (5, 7)]),
    (ATEN.addmm, [((7,), (1,)), ((3, 5), (5, 1)), ((5, 7), (7, 1))], [(7,), (3, 5), (5, 7)]),
    (ATEN.baddbmm, [((16, 1, 512), (512, 0, 1)), ((16, 300, 300), (90_000, 1, 300)),
                    ((16, 300, 512), (153_600, 512, 1))],
     [(1, 1, 512), (1, 300, 300), (1, 300, 512)])])
def test_an_example_is_laid_out_as_the_product_and_large_ones_have_fewer_matrices(
        op, tensors, shapes):
    example, parts = Product(op.default, tuple(tensors)).example()
    assert [x.shape for x in example] == shapes and parts == (tensors[0][0][0] if parts > 1 else 1)
    assert parts == (16 if op is ATEN.baddbmm else 1)
    assert [x.stride() for x in example] == [stride for _, stride in tensors]
    assert all(x.any() for x in example[-2:]) and not any(x.any() for x in example[:-2])
    assert op.default(*example).shape[-1] == tensors[-1][0][-1]


@pytest.mark.parametrize("costs, library", [
    ({"blas": 2.0}, ONEDNN), ({"blas": 2.0, "rounds": True}, BLAS), ({"onednn": 2.0}, BLAS),
    ({"blas": 1.05}, BLAS)])  # a tie, which noise would decide
def test_the_faster_library_is_chosen_if_it_is_exact(monkeypatch, costs, library):
    fake = product(monkeypatch, **costs)
    assert matmul.choose(Products([fake])) == library
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_time_of_all_products_decides_and_one_that_rounds_forbids(monkeypatch):
    monkeypatch.setattr(matmul, "is_exact", lambda key: key != "rounds")
    monkeypatch.setattr(matmul, "time_both", lambda key: {
        "small": {BLAS: 1.0, ONEDNN: 2.0}, "large": {BLAS: 20.0, ONEDNN: 10.0}}[key])
    assert matmul.choose(Products({"small": 5, "large": 1})) == ONEDNN
    assert matmul.choose(Products({"small": 50, "large": 1})) == BLAS
    assert matmul.choose(Products({"large": 1, "rounds": 1})) == BLAS
    assert matmul.choose(Products()) == BLAS


def test_a_given_library_is_kept_unless_it_rounds(monkeypatch):
    slow = product(monkeypatch, onednn=2.0)
    assert matmul.choose(Products([slow]), ONEDNN) == ONEDNN
    rounds = product(monkeypatch, blas=2.0, rounds=True)
    assert matmul.choose(Products([rounds]), BLAS) == BLAS
    monkeypatch.setattr(matmul, "SQUARE", rounds)
    for products in (Products([slow, rounds]), Products()):
        with pytest.raises(UserError, match=r"^--fp32-library onednn: .*Use --fp32-library blas"):
            matmul.choose(products, ONEDNN)


def test_it_is_timed_on_the_threads_of_the_job(monkeypatch):
    seen = []
    monkeypatch.setattr(matmul, "is_exact", lambda key: seen.append(torch.get_num_threads()))
    matmul.choose(Products({"any": 1}), threads=2)
    assert seen == [2] and torch.get_num_threads() == 1


def test_the_setting_holds_inside_alone():
    for library, inside in ((BLAS, "highest"), (ONEDNN, "medium")):
        with pytest.raises(RuntimeError), computed_by(library):
            assert torch.get_float32_matmul_precision() == inside
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "highest"


# Runs


@pytest.fixture
def chosen(monkeypatch):
    """What `choose` is asked for; it answers oneDNN unless a library is given."""
    asked = []

    def choose(products, given, threads):
        asked.append((len(products) > 0, given, threads))
        return given or ONEDNN

    monkeypatch.setattr(matmul, "choose", choose)
    return asked


def test_one_choice_holds_for_all_processes_and_is_recorded(tmp_path, monkeypatch, chosen):
    started = []
    monkeypatch.setattr(train, "run_jobs", lambda jobs, *rest: started.extend(jobs) or {})
    argv = ["--env", "Pendulum-v1", "MountainCarContinuous-v0", "--processes", "4", "--seeds", "2",
            "--log", "--runs", str(tmp_path), "--name", "a"]
    assert train.run(argv) == 0
    assert chosen == [(True, None, 1)] and [job.fp32_library for job in started] == [ONEDNN] * 4
    (folder,) = tmp_path.glob("a-*")
    config = folder / "config.json"
    assert json.loads(config.read_text())["options"]["fp32_library"] == ONEDNN
    assert parse_args(["--resume", str(folder)])[0].fp32_library == ONEDNN
    assert parse_args(["--config", str(config)])[0].fp32_library is None
    settings = json.loads(config.read_text())
    del settings["options"]["fp32_library"]  # a run from before there was a choice
    config.write_text(json.dumps(settings))
    assert parse_args(["--resume", str(folder)])[0].fp32_library == BLAS


def told_in_update(folder, expression, **settings):
    """The value of the expression within the update of SAC, for each of two seeds."""
    agent, rows = folder / "mine.py", []
    agent.write_text(Path("agents/sac.py").read_text().replace(
        '"policy/entropy": entropy,',
        f'"policy/entropy": entropy.new_full([len(entropy)], {expression}),'))
    loop.train(Job(str(agent), SMALL, "Pendulum-v1", (0, 1), steps=40, eval_every=40, log_every=40,
                   checkpoint_every=0, eval_episodes=1, **settings),
               lambda message: rows.extend(message.get("rows", {}).values()))
    return [row["policy/entropy"] for row in rows]


@pytest.mark.parametrize("library", [BLAS, ONEDNN])
def test_a_run_computes_with_its_library(tmp_path, library):
    told = told_in_update(tmp_path, 'torch.get_float32_matmul_precision() == "medium"',
                          fp32_library=library)
    assert told == [library == ONEDNN] * 2
    assert not uses_onednn()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_computes_in_its_precision(tmp_path, precision):
    told = told_in_update(tmp_path, 'torch.is_autocast_enabled("cpu")', precision=precision)
    assert told == [precision == "bf16"] * 2


def test_the_plan_measures_with_the_choice_and_prints_it(monkeypatch, capsys, chosen):
    made = []
    monkeypatch.setattr(candidates, "try_out", lambda options, *rest: made.append(
        make_jobs(options, {}, 1, None)[0]) or candidates.Row(options, seconds=len(made)))
    assert plan.run(["--no-compile", "--processes", "1"]) == 0
    assert [(job.precision, job.fp32_library) for job in made] == [("fp32", ONEDNN), ("bf16", BLAS)]
    assert "library for fp32 products on the CPU: onednn\n" in capsys.readouterr().out


def test_a_study_chooses_once_for_all_its_trials(chosen):
    options, config = parse_args([], Tune)
    options, _, job = study.check(options, config)
    assert options.fp32_library == job.fp32_library == ONEDNN and len(chosen) == 1


def test_on_a_cluster_it_is_blas_and_recorded(chosen):
    """So that a run that goes on here keeps it."""
    options, config = parse_args(["--engine", "ray"], Simple)
    made = make_jobs(options, config, 1, None)
    assert choose_fp32_library(options, made, Products()).fp32_library == BLAS and not chosen


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--cuda"]])
def test_only_fp32_on_a_cpu_has_a_choice(monkeypatch, chosen, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options, config = parse_args([*flags, "--fp32-library", "onednn"], Simple)
    made = make_jobs(options, config, 1, None)
    assert choose_fp32_library(options, made, Products()) == options and not chosen
    assert [job.fp32_library for job in made] == [BLAS]


@pytest.mark.slow
def test_either_library_gives_the_same_learning_and_a_nan_stays_in_its_seed():
    """In a process of its own, where oneDNN may not use AMX, so that it is exact."""
    code = """
import dataclasses, torch
from lab.check.checks import CHECKS, AgentUnderTest
from lab.check.driver import small
from lab.matmul import *
from tests.conftest import *

torch.set_num_threads(1)
for path in AGENTS:
    module, histories = load_agent(path), []
    for library in LIBRARIES:
        with computed_by(library):
            agent = make_agent(module, batch_size=32, qf_width=32, actor_width=32, width=32,
                               num_steps=32, num_minibatches=1, learning_starts=32)
            histories.append(drive(agent, make_steps((0, 1), 1, 40)))
    assert len(histories[0]) == len(histories[1]) > 0
    for blas, onednn in zip(*histories):
        for name in blas:
            torch.testing.assert_close(blas[name], onednn[name], rtol=1e-3, atol=1e-3, msg=name)
    config = dataclasses.asdict(module.Config())
    with computed_by(ONEDNN):
        CHECKS["a NaN stays in its seed and shows in its metrics"](
            AgentUnderTest(str(path), config | small(config)))
    print(path.stem)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})
    assert done.stdout.split() == [path.stem for path in AGENTS], done.stderr
