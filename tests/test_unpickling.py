"""What comes out of foreign checkpoints, and what does not run on the way."""

import os
import sys
import types
from collections import OrderedDict

import pytest
import torch

from conftest import save_pickled
from ldmkit.errors import DataError
from ldmkit.unpickling import read_pickled_tensors, read_tensors, unwrapped


class RunsACommand:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def foreign(monkeypatch):
    """A class of a package that the reading process does not have."""
    module = types.ModuleType("pytorch_lightning")
    Callback = type("Callback", (), {"__module__": "pytorch_lightning"})
    module.__dict__["Callback"] = Callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    return Callback


@pytest.mark.parametrize("zipped", [True, False])
def test_a_trainers_checkpoint_gives_its_state_dict(zipped, foreign, tmp_path):
    weight = torch.randn(3, 2)
    content = {
        "state_dict": OrderedDict(a=weight, tied=weight, turned=weight.T),
        "callbacks": {foreign: {"best": 1.0}, "one": foreign()},
        "optimizer_states": [{"x": torch.ones(1)}],
        "epoch": 3,
    }
    save_pickled(tmp_path / "x.ckpt", content, zipped=zipped)
    found = read_pickled_tensors(tmp_path / "x.ckpt")
    assert found.keys() == {"a", "tied", "turned"}
    assert torch.equal(found["tied"], weight)
    assert torch.equal(found["turned"], weight.T)


def test_a_wrapped_state_dict_is_unwrapped():
    state = {"a": torch.ones(1), "step": 4}
    assert unwrapped(state).keys() == {"a"}
    assert unwrapped({"state_dict": {"state_dict": state}, "b": torch.ones(1)}).keys() == {"a"}
    assert unwrapped({"state_dict": 4, "a": torch.ones(1)}).keys() == {"a"}


def test_nothing_that_a_file_names_is_run(tmp_path):
    mark = tmp_path / "mark"
    file = tmp_path / "x.pth"
    save_pickled(file, {"a": torch.ones(1), "b": RunsACommand(os.system, f"touch {mark}")})
    with pytest.raises(DataError, match=r"it asks for posix\.system, which could run code"):
        read_tensors(file)
    save_pickled(file, {"a": torch.ones(1), "b": RunsACommand(eval, f"open({str(mark)!r}, 'w')")})
    with pytest.raises(DataError, match="eval, which could run code"):
        read_tensors(file)
    assert not mark.exists()


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    file = tmp_path / "x.pth"
    with pytest.raises(DataError, match="there is no file"):
        read_tensors(file)
    for content in (b"", b"hello"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="damaged, or no checkpoint"):
            read_tensors(file)
    save_pickled(file, {"epoch": 1})
    with pytest.raises(DataError, match="it holds no tensors"):
        read_tensors(file)
    with pytest.raises(DataError, match="not read within 0 s"):
        read_pickled_tensors(file, timeout=0.01)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "x.safetensors")


def test_modules_in_the_working_directory_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    save_pickled(tmp_path / "x.pth", {"a": torch.ones(1)})
    monkeypatch.chdir(tmp_path)
    assert read_tensors(tmp_path / "x.pth").keys() == {"a"}
