"""Configs: read, overridden, checked as a whole, written out, compared."""

from __future__ import annotations

import pytest

from megalodon.training.config import TrainConfig, differences
from megalodon.training.config_file import config_text, load_config

SMALL = """
model: {num_layers: 2, model_dim: 64, z_dim: 32, value_dim: 64, ffn_hidden_dim: 96, norm_num_groups: 8}
data:
  corpus: {source: stdlib}
  batch_size: 4
optimizer: {learning_rate: 3e-4}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def problem(path, *overrides):
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_numbers_with_exponents_are_numbers(write):
    config = load_config(write(SMALL), ["schedule.init_ratio=1e-5"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.schedule.init_ratio == 1e-5


def test_overrides_win_and_make_sections(write):
    config = load_config(write(SMALL), ["data.batch_size=8", "run.precision=bfloat16", "sampling.prompt='a: b'"])
    assert (config.data.batch_size, config.run.precision, config.sampling.prompt) == (8, "bfloat16", "a: b")


def test_an_empty_file_is_all_defaults(write):
    assert load_config(write("")) == TrainConfig()


def test_every_problem_is_in_one_message(write):
    text = SMALL + "scheduel: {}\nrun: {steps: 0, precision: float16, pat: 1}\nschedule: {kind: cosin}\n"
    message = problem(write(text), "optimizer.learning_rat=1", "data.batch_size=many", "data.corpus.sorce=x")
    assert "8 problems" in message
    for part in (
        "scheduel: unknown key; did you mean schedule?",
        "run.steps: input should be greater than or equal to 1 (given: 0)",
        "run.precision: float16 has too little range",
        "use bfloat16",
        "run.pat: unknown key; there are accumulation_steps, ",
        "schedule.kind: input should be 'cosine', 'linear', 'constant' or 'warmup-stable-decay' (given: 'cosin')",
        "optimizer.learning_rat: unknown key; did you mean learning_rate?",
        "data.batch_size: input should be a valid integer",
        "data.corpus.sorce: unknown key; did you mean source?",
    ):
        assert part in message


def test_a_union_is_one_problem(write):
    message = problem(write(SMALL), "data.corpus.source=3", "model.dropout=lots")
    assert "2 problems" in message
    assert "data.corpus.source: input should be a valid string" in message
    assert "model.dropout: input should be a valid number" in message


def test_contradictions_are_found_together(write):
    message = problem(
        write(SMALL),
        "run.steps=100",
        "schedule.warmup_steps=100",
        "run.accumulation_steps=3",
        "checkpoint.keep_best=true",
        "checkpoint.every=70",
        "evaluation.every=20",
        "optimizer.betas=[0.9, 1.5]",
        "model.norm_num_groups=7",
    )
    for key in (
        "schedule.warmup_steps: 100",
        "run.accumulation_steps: 3 must divide data.batch_size (4)",
        "checkpoint.keep_best",
        "optimizer.betas",
        "model.model_dim=64 is not divisible by norm_num_groups=7",
    ):
        assert key in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_layer=3"], "model.num_layer: unknown key; did you mean num_layers?"),
        (["model.num_layers=2.5"], "model.num_layers: input should be a valid integer"),
        (["model.attention_dropout_mode=drop"], "model.attention_dropout_mode: input should be 'softmax' or 'dropkey'"),
        (["model.preset=1.4b"], "no preset '1.4b'; did you mean 1.3b?"),
        (["model.init_from=/nowhere"], "model.init_from: no model folder /nowhere"),
        (["model.preset=200m", "model.init_from=x"], "model.preset: contradicts model.init_from"),
        (["data.held_out={fraction: 0.1, documents: 3}"], "data.held_out: give one of"),
        (["optimizer"], "write section.key=value"),
        (["optimizer.learning_rate.x=1"], "learning_rate is a value, not a section"),
        (["run.folder=[1"], "override 'run.folder=[1'"),
    ],
)
def test_one_problem_is_one_line(write, overrides, words):
    message = problem(write(SMALL), *overrides)
    assert words in message
    assert "\n" not in message


def test_bad_files_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    assert "line 2" in problem(write("run: {}\nrun: {}\n"))
    assert "given twice" in problem(write("run: {steps: 1, steps: 2}"))
    assert "mapping" in problem(write("- 1"))
    assert "not YAML" in problem(write("run: [1"))


def test_text_reads_back_equal(write):
    overrides = ["model.preset=200m", "run.folder='1e5'", "sampling.prompt='a\\n: é'", "optimizer.epsilon=1e-8"]
    config = load_config(write(SMALL), overrides)
    again = load_config(write(config_text(config)))
    assert again == config


def test_differences_name_what_matters(write):
    old = load_config(write(SMALL))
    new = load_config(
        write(SMALL),
        ["optimizer.learning_rate=1e-3", "run.steps=7", "run.folder=x", "checkpoint.every=3", "data.corpus.field=body"],
    )
    found, note = differences(old, new, 5)
    assert note is None and [difference.partition(":")[0] for difference in found] == [
        "data.corpus.field",
        "optimizer.learning_rate",
        "run.steps",
    ]
    assert "0.0003 before, 0.001 now" in found[1]


def test_differences_look_into_plain_values(write):
    model = "{architecture: megalodon-kin, num_layers: 1, model_dim: 32, num_heads: 2, mixers: gla, mixer_parameters: "
    old, new = (load_config(write(f"model: {model}{{gla: {{expand_k: {size}}}}}}}")) for size in (0.5, 1.0))
    assert differences(old, old, 0) == ([], None)
    assert [found.partition(":")[0] for found in differences(old, new, 0)[0]] == ["model.mixer_parameters"]


def test_a_constant_schedule_may_be_longer(write):
    old = load_config(write(SMALL), ["schedule.kind=constant"])
    new = load_config(write(SMALL), ["schedule.kind=constant", "run.steps=5000"])
    assert differences(old, new, 500) == ([], None)
    assert "the run has made 6000 steps already" in differences(old, new, 6000)[0][0]
