"""Where the trainer is found."""

import json
import threading

from clients import resident


def test_callers_at_once_share_one_trainer(run_config):
    settings, found, barrier = json.dumps([run_config(), ""]), [], threading.Barrier(8)

    def ask():
        barrier.wait()
        found.append(resident._local_trainer(settings))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(found) == 8
    assert len({id(trainer) for trainer in found}) == 1
