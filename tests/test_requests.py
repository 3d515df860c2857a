"""What samples are told: lines and tables, in order, mixed, from files and through pipes."""

import io
import json

import pytest

import ldmkit
from ldmkit.condition_configs import LayoutCondition, ScalarCondition
from ldmkit.configs import STREAM
from ldmkit.data.latents import unragged
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.modelfile import load
from ldmkit.requests import asked_of
from test_sample import CLASS, SHAPE, TEXT, built

SCALARS = ScalarCondition(names=("age", "dose"), mean=(40.0, 1.0), std=(10.0, 0.5))
LAYOUT = LayoutCondition(
    objects=2, vocabulary=40, depth=1, heads=1, head_width=8, names=("sun", "sea")
)
ROWS = [
    {
        "class": "dog",
        "text": "b a",
        "age": 30,
        "dose": 2.5,
        "layout": [{"label": "sea", "box": [0, 0, 0.5, 1]}],
    },
    {"prompt": "a", "age": 50},
    {"label": 0, "boxes": [{"label": 0, "box": [0.1, 0.1, 0.2, 0.2]}]},
]
CSV = """class,text,age,dose,layout
dog,b a,30,2.5,"[{""label"": ""sea"", ""box"": [0, 0, 0.5, 1]}]"
,a,50,,
0,,,,"[{""label"": 0, ""box"": [0.1, 0.1, 0.2, 0.2]}]"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Told classes, texts, numbers and boxes."""
    path = tmp_path_factory.mktemp("told") / "diffusion.safetensors"
    return built(path, CLASS, TEXT, SCALARS, LAYOUT)


def asked(model, source=None, **settings):
    config = SampleConfig(model=model, **settings)
    return asked_of(config, ldmkit.load_diffusion(model).config, SHAPE, source)


def test_a_table_says_the_same_as_json_lines_from_a_file_or_a_pipe(model, tmp_path):
    lines = "\n".join(map(json.dumps, ROWS)) + "\n"
    (tmp_path / "told.jsonl").write_text(lines)
    (tmp_path / "told.csv").write_text(CSV)
    ways = [
        asked(model, conditions=tmp_path / "told.jsonl"),
        asked(model, conditions=tmp_path / "told.csv"),
        asked(model, io.BytesIO(lines.encode()), conditions="-"),
    ]
    for one in ways:
        assert [told.get("class") for told in one.said] == ["dog", None, "cat"]
        values = one.values([0, 1, 2])
        assert values["class"].flatten().tolist() == [1, -1, 0]
        assert values["scalars"].nan_to_num(-1.0).tolist() == [[30, 2.5], [50, -1], [-1, -1]]
        for kind, expected in ways[0].values([0, 1, 2]).items():
            assert values[kind].nan_to_num(-9.0).equal(expected.nan_to_num(-9.0)), kind


def test_prompts_make_a_sample_a_line_in_order(model, tmp_path):
    prompts = io.BytesIO("b a\n\nüber b\n".encode())
    out = tmp_path / "samples.safetensors"
    given = {"model": model, "prompts": STREAM, "steps": 1, "out": out, "precision": "fp32"}
    ldmkit.sample(SampleConfig.model_validate(given), None, prompts)
    header, tensors = load(out, kind="samples")
    told = unragged(tensors["told.bytes"].numpy(), tensors["told.offsets"].numpy())
    assert [json.loads(line).get("text") for line in told] == ["b a", "", "über b"]
    assert tensors["seed"].tolist() == [0, 1, 2]
    assert header.facts["manner"] == {
        "sampler": "heun",
        "steps": 1,
        "guidance": 2.0,
        "precision": "fp32",
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"class": "cow"}', "line 1: 'cow' is no class"),
        ('{"age": "old"}', "line 1: "),
        ('{"age": 1e400}', "line 1: "),
        ('{"layout": [{"label": "sun", "box": [0.9, 0, 0.5, 1]}]}', "line 1: "),
        ('{"layout": "[1"}', "line 1: layout is no JSON"),
        ("no json", "line 1 is no JSON object"),
    ],
)
def test_a_bad_line_is_named(model, line, words):
    with pytest.raises(DataError, match=f"^standard input, {words}") as error:
        asked(model, io.BytesIO(line.encode()), conditions="-")
    assert "\n" not in str(error.value)


def test_what_the_model_cannot_be_told_is_refused_with_what_it_can(model):
    with pytest.raises(UsageError, match="trained without texture; did you mean text"):
        asked(model, io.BytesIO(b'{"texture": "rough"}'), conditions="-")
    with pytest.raises(DataError, match="standard input has no lines"):
        asked(model, io.BytesIO(b""), prompts="-")
