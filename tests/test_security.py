"""What strangers' files and names cannot do: run code, start processes, write outside the output."""

import ast
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import save_pickled
from ldmkit import unpickling
from ldmkit.errors import DataError
from ldmkit.facts import ShardEntry, validated
from ldmkit.output.listing import Entry, entries_of, line_of
from ldmkit.recipes.decode import picture_name

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/ldmkit").rglob("*.py"))
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"),
    *("subprocess", "pty", "code", "codeop", "runpy", "commands", "ctypes", "cffi", "telnetlib"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "input", "breakpoint"),
    *("os.system", "os.popen", "os.startfile", "tempfile.mktemp", "tarfile.open", "builtins.eval"),
    *(
        "torch.load",
        "torch.save",
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
    ),
    *("torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file", "np.loadtxt"),
    *(
        "zipfile.ZipFile.extractall",
        "shutil.unpack_archive",
        "wds.WebDataset",
        "logging.config.listen",
    ),
}
ENDINGS = (".extractall", ".read_pickle", ".to_pickle")
STARTING = ("os.exec", "os.spawn", "os.posix_spawn", "os.fork")
UNPICKLING = ROOT / "src/ldmkit/unpickling.py"
HEAP = ROOT / "src/ldmkit/heap.py"


def findings(tree: ast.AST) -> list[str]:
    """What a module does that this package never does."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            found += call_findings(node)
    return [str(one) for one in found]


def call_findings(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    keywords = {one.arg: one.value for one in node.keywords}
    found = []
    if name in CALLS or name.endswith(ENDINGS) or name.startswith(STARTING):
        found.append(name)
    if "shell" in keywords:
        found.append(f"{name}(shell=)")
    allowed = keywords.get("allow_pickle")
    if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
        found.append(f"{name}(allow_pickle=)")
    if name in ("np.load", "numpy.load") and allowed is None:
        found.append(f"{name} without allow_pickle=False")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_the_package_runs_nothing_that_comes_from_data(file):
    expected = {
        UNPICKLING: ["subprocess", "torch.load"],
        HEAP: ["ctypes"],  # three calls with constants
    }
    assert sorted(findings(ast.parse(file.read_text()))) == expected.get(file, [])


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from yaml import load", "import subprocess as s", "eval(x)", "exec(x)"),
        *("os.system(x)", "run(x, shell=True)", "np.load(f)", "np.load(f, allow_pickle=True)"),
        *("torch.load(f, weights_only=False)", "archive.extractall(out)", "os.execv(a, b)"),
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert findings(ast.parse(line))


def test_the_style_check_has_its_security_rules_on():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"S",' in text.split("[tool.ruff.lint]")[1].split("ignore")[0]
    assert '"src/**" = ["F722", "F821"]' in text  # and none of them off for the package


# Each is the pickle of a checkpoint that would run something on being read.
MARK = "MARK"
HOSTILE = {
    "os.system": b"cposix\nsystem\n(S'touch MARK'\ntR.",
    "eval": b"cbuiltins\neval\n(S\"open('MARK','w')\"\ntR.",
    "exec": b"cbuiltins\nexec\n(S\"open('MARK','w')\"\ntR.",
    "a process": b"csubprocess\nPopen\n((S'touch'\nS'MARK'\nltR.",
    "an instance": b"(S'touch MARK'\niposix\nsystem\n.",
    "an object": b"(cposix\nsystem\nS'touch MARK'\no.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch MARK'\ntR.",
    "an import": b"cimportlib\nimport_module\n(S'antigravity'\ntR.",
    "a nested pickle": b"ctorch.storage\n_load_from_bytes\n(Cyabcos\nsystem\n(S'touch MARK'\ntR.tR.",
    "a dotted name": b"\x80\x04\x8c\x13torch.serialization\x8c\tos.system\x93(S'touch MARK'\ntR.",
    "runpy": b"crunpy\n_run_code\n(S\"open('MARK','w')\"\n}tR.",
    "a download": b"ctorch.hub\nload\n(S'a/b'\nS'c'\ntR.",
    "a module's state": b"ctorch.nn.modules.module\nModule\n)\x81}S'forward'\ncposix\nsystem\nsb.",
    "an extension": b"\x82\x01.",
}


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "x.ckpt"
    save_pickled(path, {"a": torch.ones(1)})
    return path


def hostile(container, path, payload, mark):
    """The good checkpoint with another pickle in it."""
    with zipfile.ZipFile(container) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            bad.writestr(
                name, payload.replace(b"MARK", mark) if name.endswith("data.pkl") else data
            )


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused(kind, container, tmp_path, capsys):
    source, mark = tmp_path / "x.ckpt", tmp_path / "mark"
    hostile(container, source, HOSTILE[kind], str(mark).encode())
    code = unpickling.main(source, tmp_path / "x.safetensors")
    assert code == unpickling.REFUSED
    sentence = capsys.readouterr().err
    assert "could run code" in sentence or "damaged, or no checkpoint" in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"x.ckpt"}


def test_a_gadget_of_a_package_that_is_passed_over_does_nothing(container, tmp_path):
    source, mark = tmp_path / "x.ckpt", tmp_path / "mark"
    gadget = b"cnumpy.testing._private.utils\nrunstring\n(S\"open('MARK','w')\"\n}tR."
    hostile(container, source, gadget, str(mark).encode())
    assert unpickling.main(source, tmp_path / "x.safetensors") == unpickling.REFUSED
    assert not mark.exists()


@pytest.mark.faults
@pytest.mark.parametrize("kind", HOSTILE)
def test_import_refuses_hostile_pickles_with_3(kind, container, tmp_path, run):
    source, mark = tmp_path / "x.ckpt", tmp_path / "mark"
    hostile(container, source, HOSTILE[kind], str(mark).encode())
    done = run("import", source, "--out", tmp_path / "out")
    assert done.returncode == 3
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


NAMES = st.one_of(
    st.text(max_size=100),
    st.lists(
        st.sampled_from(["..", "/", "\\", "a", "\0", "~", "C:", "\n", "é", "."]), max_size=12
    ).map("".join),
)


def stays_inside(name, seed):
    """Every place that a name from data decides."""
    root = Path("/out")
    path = root / f"{picture_name(seed, name)}.png"
    assert path.parent == root
    assert len(path.name.encode()) <= 255
    try:
        entry = {"name": name, "start": 0, "stop": 1, "count": 1, "bytes": 1, "sha256": ""}
        shard = root / validated(ShardEntry, entry, "it").name
        assert shard.parent == root
    except DataError:
        pass


@given(NAMES, st.integers(0, 2**62))
@settings(max_examples=60)
def test_names_from_data_stay_inside_the_output(name, seed):
    stays_inside(name, seed)


@pytest.mark.faults
@given(NAMES, st.integers(0, 2**62))
@settings(max_examples=10_000)
def test_ten_thousand_names_stay_inside_the_output(name, seed):
    stays_inside(name, seed)


@given(NAMES)
@settings(max_examples=60)
def test_a_list_names_no_file_of_another_directory(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("list") / "samples.jsonl"
    path.write_text(line_of(name, Entry({"seed": 1}, "")) + "\n")
    try:
        found = dict(entries_of(path))
    except DataError:
        return
    for file in found:
        assert (path.parent / file).parent == path.parent
