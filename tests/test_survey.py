import json
import shutil

import pytest

import ldmkit
from conftest import ae_config
from ldmkit import terminal
from ldmkit.data.tally import joined, lines_of, tally_of
from ldmkit.errors import DataError


def test_a_tally_of_parts_is_that_of_the_whole():
    done = [
        (str(number), ["even"] * (number % 2 == 0) + ["third"] * (number % 3 == 0))
        for number in range(20)
    ]
    whole = tally_of(done)
    assert whole == {
        "even": (10, ("0", "2", "4", "6", "8")),
        "third": (7, ("0", "3", "6", "9", "12")),
    }
    assert joined([tally_of(done[:7]), tally_of(done[7:8]), tally_of(done[8:])]) == whole
    assert lines_of(whole)[0] == "even (10): 0, 2, 4, 6, 8 ..."


@pytest.fixture
def data(pictures, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    whole = (root / "circle/2.png").read_bytes()
    (root / "circle/2.png").write_bytes(whole[: len(whole) // 2])
    (root / "square/3.png").write_text("not a picture")
    return root


def test_bad_pictures_are_named_before_the_first_step(data, tmp_path, capsys):
    config = ae_config(data, tmp_path / "ae", steps=1)
    with pytest.raises(
        DataError, match=r"circle/2\.png .*\(2 of 12 pictures cannot be used"
    ) as caught:
        ldmkit.train_ae(config)
    assert "pictures.json" in str(caught.value)
    assert not (config.out / "config.toml").exists()  # so that other settings may be tried
    named = json.loads((config.out / "pictures.json").read_text())["left_out"]
    assert sorted(named) == ["circle/2.png", "square/3.png"]

    terminal.be_quiet(False)
    model = ldmkit.train_ae(ae_config(data, tmp_path / "ae", steps=1, max_bad=0.2))
    assert model.is_file()
    said = capsys.readouterr().err
    assert "left out square/3.png" in said
    assert "10 pictures to train on" in said
    assert "look at pictures" not in said  # the answer was kept


def test_pictures_that_changed_are_looked_at_again(data, tmp_path):
    with pytest.raises(DataError):
        ldmkit.train_ae(ae_config(data, tmp_path / "ae", steps=1))
    for name in ("circle/2.png", "square/3.png"):
        (data / name).write_bytes((data / "circle/0.png").read_bytes())
    assert ldmkit.train_ae(ae_config(data, tmp_path / "ae", steps=1)).is_file()


def test_without_a_look_the_run_stops_where_it_meets_one(data, tmp_path):
    config = ae_config(data, tmp_path / "ae", steps=9, look_first=False)
    with pytest.raises(DataError, match=r"(circle/2|square/3)\.png"):
        ldmkit.train_ae(config)
    assert not (config.out / "pictures.json").exists()
