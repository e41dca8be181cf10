"""Perplexity where nobody has everyone's test rows: each client measures on rows it keeps back, and sums are added."""

import logging
from collections.abc import Sequence

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from mops_fl.errors import InputError, RunError
from mops_fl.evaluation import Evaluation
from mops_fl.foreign_text import error_text
from mops_fl.payload import (
    EvaluateRequest,
    EvaluateResult,
    encode_evaluate_request,
)
from mops_fl.reply_check import checked_sums

logger = logging.getLogger(__name__)


def evaluate_on_clients(
    grid: Grid,
    node_ids: Sequence[int],
    request: EvaluateRequest,
    *,
    num_experts: int,
    tokens_per_row: int,
    timeout_seconds: float,
) -> tuple[Evaluation, int]:
    """Ask all nodes and add their sums up; a node without a usable answer is left out, with a warning.

    Args:
        grid: the connection to the nodes.
        node_ids: nodes that have rows, in the order of their clients.
        request: what to measure.
        num_experts: experts of the adapter's gate, 0 without one.
        tokens_per_row: most that one row may have.
        timeout_seconds: how long to wait for all of them.

    Returns:
        The measurement, and how many clients it is of.

    Raises:
        RunError: there is no usable answer, or none with rows.
    """
    content = encode_evaluate_request(request)
    questions = [Message(content, message_type=MessageType.EVALUATE, dst_node_id=node_id) for node_id in node_ids]
    results: dict[int, EvaluateResult] = {}
    for reply in grid.send_and_receive(questions, timeout=timeout_seconds):
        node_id = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise InputError(error_text(reply))
            results[node_id] = checked_sums(reply.content, len(request.tasks), num_experts, tokens_per_row)
        except InputError as error:
            logger.warning("Node %d could not evaluate: %s", node_id, error)
    if not results:
        raise RunError(f"None of {len(questions)} clients could evaluate; the warnings above say why.")
    if not any(sum(result.num_tokens) for result in results.values()):
        raise RunError("No client keeps rows back to measure on; give each two of a task at least.")
    # In the order asked, the clients': a sum of floats depends on it, and node ids are other ones in every run.
    answered = [results[node_id] for node_id in node_ids if node_id in results]
    return Evaluation.of_sums(request.tasks, answered), len(results)
