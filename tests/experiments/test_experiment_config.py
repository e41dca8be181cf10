import tomllib
from pathlib import Path

import pytest

from clients.config import ClientConfig
from experiments.app_folder import AppFolder
from experiments.config import ExperimentConfig, FederationConfig, with_absolute_models
from mops_fl.config import section_keys
from mops_fl.errors import InputError
from strategies.aggregation import AggregationConfig
from strategies.privacy import NoiseConfig

APP = Path(__file__).parents[2] / "experiments/dolly"
OVERLAYS = sorted(path.stem for path in APP.glob("*.toml") if path.name != "pyproject.toml")

# What other tools rely on.
CONTRACT = {
    "method", "backbone", "compression", "quantization", "dataset", "data-path", "seed", "num-clients",
    "clients-per-round", "num-server-rounds", "local-steps", "batch-size", "lr", "inject-layer", "num-experts",
    "prompts-per-expert", "gating", "pooling", "prompt-init", "weighting", "evaluate-every", "eval-rows",
    "max-length", "dtype", "output-dir",
}  # fmt: skip


def test_app_configures_a_valid_experiment():
    config = ExperimentConfig.from_run_config(AppFolder.find(str(APP)).run_config(()))
    assert config.client.adapter.method == "mops"
    assert config.client.partition.num_clients == 100
    assert config.federation.clients_per_round == 10
    assert config.client.adapter.num_prompts == 70


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_changes_the_app_into_another_valid_experiment(overlay):
    plain = AppFolder.find(str(APP)).run_config(())
    changed = AppFolder.find(f"experiments.dolly.{overlay}").run_config(())
    ExperimentConfig.from_run_config(changed)
    own = tomllib.loads((APP / f"{overlay}.toml").read_text(encoding="utf-8"))
    assert changed == {**plain, **own}
    assert changed != plain


def test_paper_overlay_holds_the_papers_protocol():
    config = ExperimentConfig.from_run_config(AppFolder.find("experiments.dolly.paper").run_config(()))
    client, federation = config.client, config.federation
    assert (client.partition.num_clients, federation.clients_per_round, federation.num_server_rounds) == (
        100,
        10,
        20,
    )
    assert (client.train.local_steps, client.train.batch_size, client.train.lr) == (250, 1, 1e-3)
    assert (client.partition.partitioner, client.partition.skew, federation.weighting) == (
        "skewed-shards",
        15.0,
        "uniform",
    )
    assert (client.adapter.inject_layer, client.adapter.num_experts, client.adapter.prompts_per_expert) == (
        10,
        7,
        10,
    )
    assert (client.data.num_rows, client.data.test_fraction, client.trainer.eval_rows) == (5000, 0.1, 0)


def test_keys_that_other_tools_rely_on_are_there(run_config):
    assert set(run_config()) >= CONTRACT


def test_app_has_exactly_the_keys_that_are_read(run_config):
    assert set(run_config()) == ClientConfig.keys() | section_keys(FederationConfig, AggregationConfig, NoiseConfig)


def test_unknown_key_is_refused_by_name_with_the_known_ones(run_config):
    with pytest.raises(InputError, match=r"Unknown run-config key `learning-rate`; known are: .*local-steps, .*lr,"):
        ExperimentConfig.from_run_config({**run_config(), "learning-rate": 0.1})


def test_every_key_is_needed(run_config):
    values = run_config()
    for key in values:
        with pytest.raises(InputError, match=f"no `{key}`"):
            ExperimentConfig.from_run_config({k: v for k, v in values.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "adalora"),
        ("weighting", "by-loss"),
        ("partitioner", "zipf"),
        ("clients-per-round", 0),
        ("num-server-rounds", 0),
        ("cohort-size", 0),
        ("evaluate-every", 0),
        ("eval-rows", -1),
        ("cache-megabytes", -1),
        ("cache-file-megabytes", -1),
        ("num-clients", 0),
        ("seed", -1),
        ("skew", 0.5),
        ("skew", float("nan")),
        ("dirichlet-alpha", 0.0),
        ("shards-per-client", 0),
    ],
)
def test_bad_value_is_refused_by_name(key, value, run_config):
    with pytest.raises(InputError, match=key) as refusal:
        ExperimentConfig.from_run_config({**run_config(), key: value})
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"clients-per-round": 11}, "`clients-per-round` is 11, but `num-clients` is 10"),
        ({"clip-norm": 1.0, "aggregation": "median"}, "`aggregation` is 'median', but `clip-norm` needs the mean"),
        ({"clip-norm": 1.0, "weighting": "num-examples"}, "`clip-norm` is set, which counts all clients alike"),
        ({"clip-norm": 1.0, "server-weight": 1.0}, "set `server-weight` to 0"),
        ({"aggregation": "krum", "weighting": "gate-mass", "clients-per-round": 9}, "counts all clients alike"),
        ({"aggregation": "krum"}, "needs 7 clients in a round"),
        ({"round-timeout": 0.0}, "`round-timeout` is 0.0"),
    ],
)
def test_contradicting_values_are_refused(changes, complaint, run_config):
    with pytest.raises(InputError, match=complaint):
        ExperimentConfig.from_run_config(run_config(changes))


@pytest.mark.parametrize("key", [{"routing": "nearest"}, {"central-rows": "server"}, {"server-weight": 1.0}])
def test_what_needs_rows_of_the_servers_is_refused_without(key, run_config):
    ExperimentConfig.from_run_config(run_config(key))
    with pytest.raises(InputError, match=f"`{next(iter(key))}` is .* but `server-rows` is 0"):
        ExperimentConfig.from_run_config(run_config({**key, "server-rows": 0}))


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("method", ("mops", "fedprompt", "lora", "ia3")),
        ("weighting", ("uniform", "num-examples", "gate-mass")),
        ("partitioner", ("skewed-shards", "iid", "dirichlet", "shard", "natural-id", "own-rows")),
    ],
)
def test_every_choice_is_accepted_and_a_refusal_lists_them(key, choices, run_config):
    for choice in choices:
        ExperimentConfig.from_run_config(run_config({key: choice}))
    with pytest.raises(InputError, match=rf"choose one of: {', '.join(choices)}\.$"):
        ExperimentConfig.from_run_config(run_config({key: "other"}))


def test_more_clients_per_round_than_clients_are_refused(run_config):
    ExperimentConfig.from_run_config(run_config({"clients-per-round": 10, "num-clients": 10}))
    with pytest.raises(InputError, match="`clients-per-round` is 11, but `num-clients` is 10"):
        ExperimentConfig.from_run_config(run_config({"clients-per-round": 11, "num-clients": 10}))


def test_gate_mass_needs_a_gate(run_config):
    for method in ("fedprompt", "lora", "ia3"):
        with pytest.raises(InputError, match=f"{method} has no gate; choose uniform or num-examples"):
            ExperimentConfig.from_run_config(run_config({"method": method, "weighting": "gate-mass"}))
    config = ExperimentConfig.from_run_config(run_config({"weighting": "gate-mass"}))
    assert config.federation.weighting == "gate-mass"


def test_prompts_cannot_start_from_input_prompts_that_are_not_there(run_config):
    changes = {"prompt-init": "transformed", "input-prompts": False}
    with pytest.raises(InputError, match="`prompt-init` is 'transformed', but `input-prompts` is false"):
        ExperimentConfig.from_run_config(run_config(changes))


def test_what_only_a_gate_reads_is_refused_where_there_is_none(run_config):
    changes = {"routing": "nearest", "gate-temperature": 4.0}
    with pytest.raises(InputError, match=r"`gate-temperature` is 4\.0, but `routing` is 'nearest', which has no gate"):
        ExperimentConfig.from_run_config(run_config(changes))


def test_positions_are_not_pooled_where_another_model_reads_the_question(run_config):
    changes = {"pooling": "all", "gate-embedding": "some/encoder"}
    with pytest.raises(
        InputError, match="`pooling` is 'all', but the model of `gate-embedding` sees the question only"
    ):
        ExperimentConfig.from_run_config(run_config(changes))


def test_paths_of_local_models_are_recorded_absolute_but_names_of_models_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backbone").mkdir()
    names = {"backbone": "some/model", "gate-embedding": "backbone", "seed": 1}
    assert with_absolute_models(names) == names
    folders = {"backbone": "backbone", "gate-embedding": "./backbone"}
    assert set(with_absolute_models(folders).values()) == {str(tmp_path / "backbone")}
    assert with_absolute_models({"backbone": "", "gate-embedding": ""}) == {"backbone": "", "gate-embedding": ""}
