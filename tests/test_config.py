import dataclasses
import re
from pathlib import Path

import pytest

from umedtrain.config import ConfigError, OptimizerConfig, load_config, read_config, write_config
from umedtrain.recipes import sft
from umedtrain.recipes.dpo import DPOConfig
from umedtrain.recipes.evaluate import EvaluateConfig
from umedtrain.recipes.generate import GenerateConfig
from umedtrain.recipes.online_dpo import OnlineDPOConfig
from umedtrain.recipes.reward import RewardConfig
from umedtrain.recipes.score import ScoreConfig
from umedtrain.recipes.sft import SFTConfig
from umedtrain.recipes.ultramedical import PipelineConfig


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path):
    path = write(tmp_path, 'output = "here"\n[optimizer]\nlr = 1\nbetas = [0.8, 0.9]\n[data]\nfiles = ["a", "b"]\n')
    config = load_config(SFTConfig, [str(path), "--optimizer.lr", "1e-3", "--data.weights", "1", "0.5"])
    assert config.output == "here"
    assert config.optimizer == OptimizerConfig(lr=1e-3, betas=(0.8, 0.9))
    assert config.data.files == ("a", "b")
    assert config.data.weights == (1.0, 0.5)


def test_a_written_config_reads_back_equal(tmp_path):
    config = load_config(
        DPOConfig, ["--dpo.beta", "0.25", "--data.files", 'odd "name".json', "--log.progress", "False"]
    )
    write_config(config, tmp_path / "c.toml")
    assert read_config(DPOConfig, tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nlearning_rate = 1", r"unknown key optimizer.learning_rate; did you mean optimizer\."),
        ("[optimizr]\nlr = 1", "unknown key optimizr; did you mean optimizer"),
        ("[optimizer]\nlr = 'fast'", r"Expected `float`, got `str` - at `\$.optimizer.lr`"),
        ("[parallel]\ndtype = 'fp8'", r"at `\$.parallel.dtype`"),
        ("[optimizer]\nbetas = [0.9]", r"at `\$.optimizer.betas`"),
        ("optimizer = 3", r"at `\$.optimizer`"),
        ("[optimizer", "not valid TOML"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(SFTConfig, path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read"):
        read_config(SFTConfig, tmp_path / "absent.toml")


def test_an_unknown_option_names_the_nearest_one(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(SFTConfig, ["--optimizer.lrr", "1"])
    assert caught.value.code != 0
    assert "--optimizer.lr" in capsys.readouterr().err


def test_help_lists_every_key_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        load_config(DPOConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = DPOConfig()
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        for key in dataclasses.fields(value) if dataclasses.is_dataclass(value) else []:
            # The option, its type, then at least three words of meaning before the default.
            pattern = rf"--{section.name}\.{key.name} \S.*?(\w+\W+){{3,}}.*?\(default: "
            assert re.search(pattern, text), f"{section.name}.{key.name}"


SCHEMAS = {
    "sft": SFTConfig,
    "reward_base": SFTConfig,
    "reward": RewardConfig,
    "refresh": RewardConfig,
    "dpo": DPOConfig,
    "online": DPOConfig,
    "online_dpo": OnlineDPOConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "ultramedical": PipelineConfig,
}


def test_every_config_that_is_shipped_is_valid():
    paths = sorted(Path(sft.__file__).parent.glob("configs/*/*.toml"))
    assert len(paths) >= 16
    for path in paths:
        config = read_config(SCHEMAS[path.stem], path)
        if path.parent.name != "demo":
            assert config.output == f"runs/{path.parent.name}/{path.stem}"
