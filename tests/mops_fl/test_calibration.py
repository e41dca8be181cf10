"""Which rows a pruned model was calibrated on, and which runs may take it."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from clients.trainer import Trainer
from mops_fl import compression
from mops_fl.backbone import Backbone
from mops_fl.compressed import (
    COMPRESSION_RECEIPT,
    NotPrunedError,
    SeveralPrunedError,
    calibrated_on,
    prefer_with_weights,
    read_compression_receipt,
    resolve_model,
    weights_sha256,
)
from mops_fl.compression import Calibration, split_server_rows
from mops_fl.config import DataConfig, read_section
from mops_fl.data import load_task_data
from mops_fl.encoding import RowEncoder
from mops_fl.errors import InputError


def test_calibration_and_measurement_rows_are_the_servers_and_no_others(run_config):
    data = load_task_data(read_section(DataConfig, run_config()))
    calibration, measured = split_server_rows(data, 7)
    server, others = set(data.server), {row.row_id for row in data.train + data.test}
    assert len(calibration) == 7
    assert len(measured) == 28
    assert {*calibration, *measured} <= server
    assert not {row.row_id for row in (*calibration, *measured)} & others
    assert not set(calibration) & set(measured)
    assert {row.task for row in calibration} == set(data.tasks)


def test_pruning_sees_exactly_the_calibration_rows(
    tiny_model_folder, run_config, cache, monkeypatch, press, backbone_config
):
    seen = []
    monkeypatch.setattr(compression, "prune", lambda *args: seen.append(args[3]) or ({}, []))
    folder = press(tiny_model_folder, "sparsegpt:75%")
    config = read_section(DataConfig, run_config({"max-length": 48}))
    data = load_task_data(config)
    tokenizer = Backbone.load(backbone_config(tiny_model_folder)).tokenizer
    rows = split_server_rows(data, 7)[0]
    expected = [RowEncoder(tokenizer, config, data.tasks).encode(row).token_ids.tolist() for row in rows]
    assert [ids.tolist() for ids in seen[0]] == expected
    calibration = read_compression_receipt(folder)["calibration"]
    assert calibration["rows-sha256"] == [row.sha256 for row in rows]
    assert (calibration["dataset"], calibration["data-sha256"]) == ("dolly", data.sha256)


def test_model_that_was_calibrated_on_test_rows_is_refused(tiny_model_folder, run_config, cache, monkeypatch, press):
    monkeypatch.setattr(compression, "prune", lambda *_: ({}, []))
    folder = press(tiny_model_folder, "wanda:75%", Calibration(num_rows=30, max_length=48))
    wanted = {"backbone": str(folder), "compression": "wanda:75%"}
    Trainer(run_config(wanted)).setting()
    with pytest.raises(InputError, match=r"pruned by wanda:75%@\w+ was calibrated on \d+ of the rows .* measured on"):
        Trainer(run_config({**wanted, "data-seed": 1})).setting()
    receipt = read_compression_receipt(folder)
    del receipt["calibration"]["rows-sha256"]
    (folder / COMPRESSION_RECEIPT).write_text(json.dumps(receipt))
    Trainer(run_config({**wanted, "data-seed": 1})).setting()


def test_model_that_was_calibrated_on_rows_of_the_runs_server_is_taken_and_no_other(
    tiny_model_folder, run_config, cache, monkeypatch, press, backbone_config
):
    monkeypatch.setattr(compression, "prune", lambda *_: ({}, []))
    config = backbone_config(tiny_model_folder, "wanda:75%")
    data = [load_task_data(read_section(DataConfig, run_config({"data-seed": seed}))) for seed in range(3)]
    made = [press(tiny_model_folder, "wanda:75%", **{"data-seed": seed}) for seed in range(2)]
    assert [resolve_model(calibrated_on(own, config)) for own in data[:2]] == made
    for foreign in (data[2], replace(data[0], server=data[0].server[:10])):
        with pytest.raises(NotPrunedError, match="pruned by wanda:75% on other rows than those of this run's server"):
            calibrated_on(foreign, config)
    named = replace(config, compression=f"wanda:75%@{read_compression_receipt(made[0])['key']}")
    assert calibrated_on(data[2], named) == named
    # A client with rows of its own does not have the server's, and takes what there is if that is one.
    client = replace(data[0], server=())
    with pytest.raises(SeveralPrunedError, match="pruned by wanda:75% more than once"):
        resolve_model(calibrated_on(client, config))
    shutil.rmtree(made[1])
    assert resolve_model(calibrated_on(client, config)) == made[0]


def test_of_several_models_of_a_recipe_an_adapter_finds_the_one_with_its_weights(
    tiny_model_folder, cache, monkeypatch, press, backbone_config
):
    config = backbone_config(tiny_model_folder, "wanda:75%")
    monkeypatch.setattr(compression, "prune", lambda *_: ({}, []))
    made = [press(tiny_model_folder, "wanda:75%", **{"data-seed": seed}) for seed in range(2)]
    weights = load_file(made[1] / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, made[1] / "model.safetensors")
    for folder in made:
        assert resolve_model(prefer_with_weights(weights_sha256(folder), config)) == folder
    with pytest.raises(SeveralPrunedError):
        resolve_model(prefer_with_weights("of another model", config))


@pytest.mark.parametrize("num_rows", [0, 35, 100])
def test_too_few_rows_to_calibrate_and_measure_are_refused(num_rows, run_config):
    data = load_task_data(read_section(DataConfig, run_config()))
    with pytest.raises(InputError, match=f"{num_rows} calibration rows are asked for and the server has 35"):
        split_server_rows(data, num_rows)
