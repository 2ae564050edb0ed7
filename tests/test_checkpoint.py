"""Checkpoints are atomic and checksummed."""

import errno
import os
import pickle
import resource

import pytest
import torch

from lab.errors import UserError
from lab.training import checkpoint

WEIGHT = torch.arange(1000.0)


def state(step):
    return {"step": step, "agent": {"weight": WEIGHT,
                                    "generators": [torch.Generator().get_state()]}}


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(WEIGHT[500:600].numpy().tobytes())] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("room", range(1, 4_000, 500))
def test_a_full_disk_is_an_oserror_wherever_it_stops_torch(tmp_path, room):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(tmp_path, 7, state(7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoint.save(tmp_path, 8, state(8))
    assert checkpoint.load_latest(tmp_path)["step"] == 8


def test_what_was_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "new" / "folder", 7, state(7))
    loaded = checkpoint.load_latest(tmp_path / "new" / "folder")
    assert loaded["step"] == 7
    assert torch.equal(loaded["agent"]["weight"], WEIGHT)
    torch.Generator().set_state(loaded["agent"]["generators"][0])


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "missing") is None


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path):
    paths = [checkpoint.save(tmp_path, step, state(step)) for step in (9, 10, 100, 1_000_000)]
    assert sorted(tmp_path.iterdir()) == sorted(paths[-2:])
    assert checkpoint.load_latest(tmp_path)["step"] == 1_000_000


@pytest.mark.parametrize("damage", [flip_a_byte, cut_in_half, empty])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys, damage):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, state(step))
    damage(path)
    assert checkpoint.load_latest(tmp_path)["step"] == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and path.name in lines[0] and "skipping" in lines[0]


def test_torch_itself_does_not_notice_the_flipped_byte(tmp_path):
    """Why the name carries a hash; should this fail one day, the hash may go."""
    path = checkpoint.save(tmp_path, 0, state(0))
    flip_a_byte(path)
    weight = torch.load(path, weights_only=True)["agent"]["weight"]
    assert not torch.equal(weight, WEIGHT)


def test_with_every_checkpoint_broken_there_is_none(tmp_path, capsys):
    for step in (1, 2):
        cut_in_half(checkpoint.save(tmp_path, step, state(step)))
    assert checkpoint.load_latest(tmp_path) is None
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_new_checkpoint_outlives_broken_ones_of_later_steps(tmp_path):
    for step in (900, 1000):
        cut_in_half(checkpoint.save(tmp_path, step, state(step)))
    checkpoint.save(tmp_path, 100, state(100))
    assert checkpoint.load_latest(tmp_path)["step"] == 100


def test_what_a_kill_leaves_unfinished_is_no_checkpoint(tmp_path, monkeypatch, capsys):
    """Killed after the write and before the rename."""
    checkpoint.save(tmp_path, 1, state(1))

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, state(2))
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.load_latest(tmp_path)["step"] == 1
    assert checkpoint.save(tmp_path, 2, state(2)).exists()
    assert checkpoint.load_latest(tmp_path)["step"] == 2
    assert capsys.readouterr().err == ""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, state(2))
    assert checkpoint.load_latest(tmp_path)["step"] == 1


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, capsys):
    checkpoint.save(tmp_path, 1, state(1))
    path = checkpoint.save(tmp_path, 2, {"step": 2, "agent": Payload(str(tmp_path / "ran"))})
    assert checkpoint.load_latest(tmp_path)["step"] == 1
    assert path.name in capsys.readouterr().err and not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()  # the payload is a live one


# Large tensors


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK", 1024)


def replay(filled, size=5000):
    """Blocks of 256 numbers, the last one not full; what is not filled is 0."""
    rows = torch.zeros(2, size // 2, dtype=torch.float32)
    rows.view(-1)[:filled] = torch.arange(1.0, filled + 1)
    return {"step": filled, "agent": {"rows": rows, "counts": torch.arange(7),
                                      "wide": torch.arange(300, dtype=torch.float64)}}


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "blocks").iterdir()}


def test_a_file_system_without_locks_is_told_and_a_held_lock_is_not_free(
        tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "wb") as one, open(tmp_path / "lock", "wb") as other:
        assert checkpoint.locked(one) and not checkpoint.locked(other)
        for code, words in ((errno.ENOLCK, "has no locks"), (errno.ENOTSUP, "has no locks")):
            def fail(*_, code=code):
                raise OSError(code, os.strerror(code))

            monkeypatch.setattr(fcntl, "flock", fail)
            assert checkpoint.locked(other) and words in capsys.readouterr().err


def test_large_tensors_are_loaded_as_they_were_saved(tmp_path, small_blocks):
    for filled in (0, 300, 5000):
        checkpoint.save(tmp_path, filled, replay(filled))
        loaded = checkpoint.load_latest(tmp_path)
        for name, tensor in replay(filled)["agent"].items():
            assert loaded["agent"][name].dtype == tensor.dtype
            assert torch.equal(loaded["agent"][name], tensor)


def test_only_blocks_that_changed_are_written_and_those_nobody_names_go(tmp_path, small_blocks):
    checkpoint.save(tmp_path, 1, replay(2560))
    before = written(tmp_path)
    assert len(before) == 10 + 1 + 1 + 3  # filled, of zeros, the last of zeros, wide
    checkpoint.save(tmp_path, 2, replay(2570))
    after = written(tmp_path)
    assert len(after) == len(before) + 1 and before.items() < after.items()
    for step in (3, 4):
        checkpoint.save(tmp_path, step, replay(256))
    assert len(written(tmp_path)) == 1 + 1 + 1 + 3
    assert torch.equal(checkpoint.load_latest(tmp_path)["agent"]["rows"],
                       replay(256)["agent"]["rows"])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_broken_block_is_named_and_the_checkpoint_before_is_used(
        tmp_path, small_blocks, capsys, damage):
    checkpoint.save(tmp_path, 1, replay(1000))
    before = written(tmp_path)
    path = checkpoint.save(tmp_path, 2, replay(2000))
    block = tmp_path / "blocks" / sorted(written(tmp_path).keys() - before.keys())[0]
    content = block.read_bytes()
    if damage == "remove":
        block.unlink()
    else:
        block.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip"
                          else content[:-1])
    assert checkpoint.load_latest(tmp_path)["step"] == 1000
    assert path.name in capsys.readouterr().err
    checkpoint.save(tmp_path, 2, replay(2000))
    assert checkpoint.load_latest(tmp_path)["step"] == 2000, "the block has been written again"


def test_a_kill_between_two_blocks_leaves_the_checkpoint_before(
        tmp_path, small_blocks, monkeypatch):
    checkpoint.save(tmp_path, 1, replay(1000))
    real, calls = os.replace, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, replay(4000))
    assert checkpoint.load_latest(tmp_path)["step"] == 1000
    checkpoint.save(tmp_path, 2, replay(4000))
    assert torch.equal(checkpoint.load_latest(tmp_path)["agent"]["rows"],
                       replay(4000)["agent"]["rows"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_checkpoint_names_no_file_outside_its_blocks(tmp_path, small_blocks, capsys):
    checkpoint.save(tmp_path / "mine", 1, replay(1000))
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1024))
    state = {"step": 2, "rows": {"blocks": ["../../secret"], "block": 1024, "like": torch.empty(0),
                                 "shape": [256]}}
    checkpoint.save(tmp_path / "mine", 2, state)
    assert checkpoint.load_latest(tmp_path / "mine")["step"] == 1000
    assert "skipping" in capsys.readouterr().err and secret.exists()


def test_a_shape_larger_than_its_blocks_takes_no_memory(tmp_path, small_blocks):
    state = replay(1000)
    checkpoint.save(tmp_path, 1, state)
    state["agent"]["rows"] = {"blocks": [], "block": 1024, "like": torch.empty(0),
                              "shape": [2**50]}
    checkpoint.save(tmp_path, 2, state)
    assert checkpoint.load_latest(tmp_path)["step"] == 1000


def test_a_folder_is_one_process_s_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 0.2)
    with (checkpoint.lock(tmp_path / "new"), pytest.raises(UserError, match="another process"),
          checkpoint.lock(tmp_path / "new")):
        raise AssertionError("it was locked twice")
    with checkpoint.lock(tmp_path / "new"):
        pass


def test_a_checkpoint_that_finds_no_memory_is_not_called_broken(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 GB")

    checkpoint.save(tmp_path, 10, state(10))
    monkeypatch.setattr(checkpoint.torch, "load", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.load_latest(tmp_path)
