import subprocess
import sys
import time
from typing import get_args

import pytest

from ldmkit.autoencoder.perceptual import PERCEPTUAL
from ldmkit.autoencoder_configs import AutoencoderLossConfig
from ldmkit.cli import COMMANDS
from ldmkit.configfile import first_difference, read_toml, to_toml
from ldmkit.configs import TrainAEConfig
from ldmkit.diffusion.parameterization import PARAMETERIZATIONS
from ldmkit.diffusion_configs import ParameterizationName, UNetConfig
from ldmkit.errors import UsageError
from ldmkit.named_settings import PRESETS
from ldmkit.options import leaves, resolve


def ae(preset=None, file=None, **typed):
    return resolve("train-ae", TrainAEConfig, preset, file, {"data": "x", **typed})


def test_precedence_is_default_preset_file_typed(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("batch_size = 7\nseed = 5\n[autoencoder]\nchannels = 24\n")
    assert ae().batch_size == TrainAEConfig.model_fields["batch_size"].default
    assert ae("tiny").batch_size == PRESETS["train-ae"]["tiny"].settings["batch_size"]
    config = ae("tiny", file, seed=9)
    assert (config.batch_size, config.seed, config.autoencoder.channels) == (7, 9, 24)
    assert config.autoencoder.multipliers == (1, 2, 4)  # the file replaces one nested key, not all
    assert ae("tiny", file, autoencoder={"channels": "16"}).autoencoder.channels == 16


def test_lists_are_typed_with_commas():
    assert ae(autoencoder={"multipliers": "1, 2,8"}).autoencoder.multipliers == (1, 2, 8)
    assert ae(autoencoder={"attention_factors": ""}).autoencoder.attention_factors == ()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            {"autoencoder": {"chanels": 3}},
            r"autoencoder.chanels: unknown setting; did you mean autoencoder.channels\?",
        ),
        ({"steps": -1}, r"--steps: .*greater than 0.*-1"),
        ({"loss": {"perceptual": "lpips"}}, r"--loss.perceptual: .*vgg16"),
        ({"autoencoder": {"multipliers": "1,x"}}, r"--autoencoder.multipliers"),
        ({"disc": {"start": "soon"}}, r"^--disc.start: 'soon' is no time: give steps .*40%"),
        ({"preprocessing": {"size": 30}}, r"^--preprocessing.size 30 is not a multiple of 8"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it(typed, words):
    with pytest.raises(UsageError, match=words):
        ae(**typed)


def test_a_missing_argument_and_an_unknown_preset_are_named():
    with pytest.raises(UsageError, match="DATA is missing"):
        resolve("train-ae", TrainAEConfig, None, None, {})
    with pytest.raises(UsageError, match="did you mean kl-f8"):
        ae("klf8")


def test_broken_and_missing_config_files_are_usage_errors(tmp_path):
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(UsageError, match="not TOML"):
        ae(None, tmp_path / "broken.toml")
    with pytest.raises(UsageError, match="cannot read"):
        ae(None, tmp_path / "absent.toml")


@pytest.mark.parametrize(("command", "preset"), [(c, p) for c in PRESETS for p in PRESETS[c]])
def test_every_preset_is_a_valid_config_and_survives_toml(command, preset, tmp_path):
    config_class = COMMANDS[command]
    argument = next(iter(leaves(config_class))).path[-1]
    argument = "data" if command == "train-ae" else "latents"
    config = resolve(command, config_class, preset, None, {argument: "x"})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert resolve(command, config_class, None, file, {}) == config
    assert first_difference(config, read_toml(file)) is None


def test_first_difference_names_a_nested_field():
    ours = ae(autoencoder={"channels": 16})
    theirs = ae(autoencoder={"channels": 24}, steps=5).model_dump(mode="json", exclude_none=True)
    assert first_difference(ours, theirs, ignore=("steps",)) == ("autoencoder.channels", 16, 24)


def test_choices_and_registries_agree():
    perceptual = AutoencoderLossConfig.model_fields["perceptual"].annotation
    assert {*PERCEPTUAL, "none"} == set(get_args(perceptual))
    assert set(PARAMETERIZATIONS) == set(get_args(ParameterizationName))


def test_every_option_has_a_help_text():
    for command, config_class in COMMANDS.items():
        for leaf in leaves(config_class):
            assert leaf.info.description, f"{command} {leaf.option}"
    assert all(leaf.info.description for leaf in leaves(UNetConfig))


def test_help_imports_no_torch_and_answers_at_once():
    program = (
        "import sys\nfrom ldmkit.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'webdataset', 'lpips'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr.decode()
        assert b"train-diffusion" in done.stdout
    assert min(times) < 1.0  # 0.3 s on a quiet machine; the bound leaves room for a busy one
