import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from mops_fl.errors import InputError
from mops_fl.payload import (
    ClientInfo,
    Cohort,
    TrainResult,
    decode_info,
    decode_request,
    encode_info,
    encode_request,
    encode_result,
    from_record,
    to_record,
)
from mops_fl.reply_check import ReplyLimits, check_result

pytestmark = pytest.mark.usefixtures("task_identity")

# Subnormal, largest, smallest, negative zero and one third: any detour over text or float64 rounding would show.
PROMPTS = np.array([[1e-45, 3.4028235e38, -1.1754944e-38], [-0.0, 1 / 3, 1.0]], np.float32)
ADAPTER = {
    "prompts": PROMPTS,
    "gate.w1": np.arange(6, dtype=np.float32).reshape(3, 2),
    "gate.b2": np.zeros(2, np.float32),
}
INPUT_PROMPTS = np.array([[0.1, 0.2, 0.3]], np.float32)
RESULT = TrainResult(
    adapter=ADAPTER, num_examples=5, num_steps=2, num_tokens=40, loss_sum=81.25, seconds=0.5, gate_mass=(1.25, 0.75)
)

INFO = {"partition-id": 1, "num-examples": 3, "trainer": "a", "backbone-sha256": "c0ffee", "data-sha256": "5eed"}
LIMITS = ReplyLimits(num_steps=2, rows_per_step=1, tokens_per_row=20)


def through_the_wire(content: RecordDict) -> RecordDict:
    """Take a message apart into bytes and build it again, as Flower does between a server and a node."""
    message = Message(content, dst_node_id=7, message_type=MessageType.TRAIN)
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    assert all(type(part) is bytes for part in contents.values())
    return inflate_object_from_contents(message.object_id, contents).content


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()


def test_request_arrives_bit_for_bit():
    frozen = to_record({"input-prompts": INPUT_PROMPTS})
    request = decode_request(through_the_wire(encode_request(to_record(ADAPTER), frozen, 3, Cohort((4, 9), 1, 2))))
    assert (request.server_round, request.cohort) == (3, Cohort((4, 9), 1, 2))
    assert_same_bits(request.adapter, ADAPTER)
    assert_same_bits({"p": request.frozen["input-prompts"]}, {"p": INPUT_PROMPTS})


def test_result_arrives_bit_for_bit():
    content = through_the_wire(encode_result(RESULT))
    assert_same_bits(from_record(content.array_records["arrays"]), ADAPTER)
    assert dict(content.metric_records["metrics"]) == {
        "num-examples": 5,
        "num-steps": 2,
        "num-tokens": 40,
        "loss-sum": 81.25,
        "seconds": 0.5,
        "gate-mass": [1.25, 0.75],
    }


def test_reply_carries_the_adapter_and_its_metrics_and_nothing_else():
    content = encode_result(RESULT)
    assert set(content) == {"arrays", "metrics"}
    assert list(content["arrays"]) == ["prompts", "gate.w1", "gate.b2"]
    assert set(content["metrics"]) == {"num-examples", "num-steps", "num-tokens", "loss-sum", "seconds", "gate-mass"}


def test_info_arrives_as_it_was():
    info = ClientInfo(partition_id=12, num_examples=0, trainer="gpu-1", backbone_sha256="ab", data_sha256="cd")
    content = through_the_wire(encode_info(info))
    assert decode_info(content) == info
    assert set(content) == {"config"}
    assert set(content["config"]) == {"partition-id", "num-examples", "trainer", "backbone-sha256", "data-sha256"}


def test_arrays_that_are_not_contiguous_arrive_as_they_look():
    assert_same_bits(from_record(to_record({"w": PROMPTS.T})), {"w": np.ascontiguousarray(PROMPTS.T)})


def test_good_reply_is_accepted():
    check_result(through_the_wire(encode_result(RESULT)), to_record(ADAPTER), LIMITS)


def test_reply_without_gate_is_accepted():
    plain = TrainResult({"prompts": PROMPTS}, 5, 2, 40, 81.25, 0.5, ())
    check_result(through_the_wire(encode_result(plain)), to_record({"prompts": PROMPTS}), LIMITS)


def changed(name, array):
    return {**ADAPTER, name: array}


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        pytest.param({k: ADAPTER[k] for k in ("prompts", "gate.w1")}, "gate.b2", id="missing"),
        pytest.param(changed("spy", np.zeros(1, np.float32)), "spy", id="extra"),
        pytest.param(dict(reversed(ADAPTER.items())), "gate.b2", id="order"),
        pytest.param({"prompt": PROMPTS, **{k: ADAPTER[k] for k in ("gate.w1", "gate.b2")}}, "'prompt'", id="name"),
        pytest.param(changed("gate.w1", np.zeros((2, 3), np.float32)), "gate.w1 is float32 (2, 3)", id="shape"),
        pytest.param(changed("gate.b2", np.zeros(2, np.float64)), "gate.b2 is float64", id="dtype"),
        pytest.param(changed("gate.b2", np.array([0, np.nan], np.float32)), "gate.b2 holds values", id="nan"),
        pytest.param(changed("gate.b2", np.array([-np.inf, 0], np.float32)), "gate.b2 holds values", id="infinity"),
    ],
)
def test_reply_with_wrong_arrays_is_refused(arrays, complaint):
    content = encode_result(RESULT)
    content["arrays"] = to_record(arrays)
    with pytest.raises(InputError) as refusal:
        check_result(content, to_record(ADAPTER), LIMITS)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        *((name, value) for name in ("num-examples", "num-steps", "num-tokens") for value in (0, -1, 2.0)),
        *((name, value) for name, most in (("num-steps", 2), ("num-tokens", 40)) for value in (most + 1, 2**62)),
        ("gate-mass", [1.5, 0.6]),
        ("gate-mass", [1e300, 0.0]),
        *(("loss-sum", value) for value in (float("nan"), float("inf"))),
        ("seconds", float("nan")),
        ("gate-mass", [1.0, float("nan")]),
    ],
)
def test_reply_with_a_wrong_metric_is_refused(metric, value):
    content = encode_result(RESULT)
    content["metrics"][metric] = value
    with pytest.raises(InputError, match=f"Metric {metric}"):
        check_result(content, to_record(ADAPTER), LIMITS)


def saved(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


def header_of_a_terabyte():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)})
    return file.getvalue() + bytes(8)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        pytest.param(Array(np.zeros(2, np.float32)).data + bytes(2000), "bytes, not 136 as was sent", id="oversized"),
        pytest.param(saved(np.savez_compressed, np.zeros(2, np.float32)), "cannot be decoded", id="archive"),
        pytest.param(b"PK\x03\x04 nothing", "cannot be decoded", id="broken archive"),
        pytest.param(header_of_a_terabyte(), "cannot be decoded", id="says it is a terabyte"),
    ],
)
def test_bytes_that_are_not_the_array_are_refused(data, complaint):
    content = encode_result(RESULT)
    content["arrays"]["gate.b2"] = Array("float32", (2,), "numpy.ndarray", data)
    with pytest.raises(InputError, match=complaint):
        check_result(content, to_record(ADAPTER), LIMITS)


@pytest.mark.parametrize(
    "config",
    [
        *({key: value for key, value in INFO.items() if key != missing} for missing in INFO),
        {**INFO, "num-examples": -3},
        {**INFO, "partition-id": 1.0},
        {**INFO, "trainer": 7},
    ],
)
def test_answer_that_does_not_say_who_a_node_is_is_refused(config):
    with pytest.raises(InputError, match="not who it is"):
        decode_info(RecordDict({"config": ConfigRecord(config)}))


def test_answer_that_says_who_a_node_is_is_taken():
    assert decode_info(RecordDict({"config": ConfigRecord(INFO)})) == ClientInfo(
        1, 3, "a", "c0ffee", data_sha256="5eed"
    )


@pytest.mark.parametrize("name", ["num-examples", "num-steps", "num-tokens", "loss-sum", "seconds", "gate-mass"])
def test_reply_without_a_metric_is_refused(name):
    content = encode_result(RESULT)
    del content["metrics"][name]
    with pytest.raises(InputError, match="exactly"):
        check_result(content, to_record(ADAPTER), LIMITS)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("spy", ConfigRecord({"rows": "private"})),
        ("more-arrays", ArrayRecord({"w": Array(PROMPTS)})),
        ("more-metrics", MetricRecord({"n": 1})),
    ],
)
def test_reply_with_another_record_is_refused(name, record):
    content = encode_result(RESULT)
    content[name] = record
    with pytest.raises(InputError, match="exactly"):
        check_result(content, to_record(ADAPTER), LIMITS)


def test_reply_with_another_metric_is_refused():
    content = encode_result(RESULT)
    content["metrics"]["accuracy"] = 1.0
    with pytest.raises(InputError, match="exactly"):
        check_result(content, to_record(ADAPTER), LIMITS)


def test_reply_without_arrays_is_refused():
    content = encode_result(RESULT)
    del content["arrays"]
    with pytest.raises(InputError, match="exactly"):
        check_result(content, to_record(ADAPTER), LIMITS)
