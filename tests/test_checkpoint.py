"""Checkpoints are whole or absent."""

import os
import pickle

import pytest
import torch

from lab import checkpoint

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
    assert len(lines) == 1 and path.name in lines[0] and "passed over" in lines[0]


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
