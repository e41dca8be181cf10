from mops_fl.state_cache import StateCache


def kept(cache, row_ids):
    """Which of the rows are there (looks each of them up once)."""
    return [row_id for row_id in row_ids if cache.get(row_id) is not None]


def test_hits_and_misses_are_counted():
    cache = StateCache(100)
    assert cache.get(1) is None
    cache.put(1, "one", 10)
    assert [cache.get(1), cache.get(1), cache.get(2)] == ["one", "one", None]
    assert (cache.hits, cache.misses) == (2, 2)


def test_rows_up_to_exactly_the_bound_are_kept():
    cache = StateCache(30)
    for row_id in range(3):
        cache.put(row_id, "state", 10)
    assert kept(cache, range(3)) == [0, 1, 2]


def test_least_recently_used_row_goes_first():
    cache = StateCache(30)
    for row_id in range(3):
        cache.put(row_id, "state", 10)
    cache.get(0)
    cache.put(3, "state", 10)
    assert kept(cache, range(4)) == [0, 2, 3]


def test_large_row_drives_out_as_many_as_it_takes():
    cache = StateCache(30)
    for row_id in range(3):
        cache.put(row_id, "state", 10)
    cache.put(3, "state", 15)
    assert kept(cache, range(4)) == [2, 3]
    assert len(cache) == 2


def test_row_above_the_bound_is_not_kept():
    cache = StateCache(30)
    cache.put(1, "state", 31)
    assert len(cache) == 0
    cache.put(2, "state", 30)  # and its size is forgotten with it
    assert kept(cache, [2]) == [2]


def test_row_put_again_counts_once():
    cache = StateCache(30)
    for value in ("old", "new"):
        cache.put(1, value, 20)
    cache.put(2, "state", 10)
    assert (cache.get(1), cache.get(2), len(cache)) == ("new", "state", 2)


def test_no_capacity_keeps_nothing():
    cache = StateCache(0)
    cache.put(1, "state", 1)
    assert kept(cache, [1]) == []
