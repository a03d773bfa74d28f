"""What the reward model learns from: every session, cut into windows with labels of their own items."""

import numpy as np

from streaming.sessions import Session, SessionItem
from trainer.data import ROW_WINDOWS, judge_session, reward_arrays

CODES = np.array([[row, row % 3] for row in range(20)], np.int32)
INDEX = {f"i{row}": row for row in range(20)}


def item(name: str, watch_ms: int, *interactions: str, effective: bool = True) -> SessionItem:
    return SessionItem(name, 0, watch_ms, 10_000, list(interactions), effective)


def session(items: list[SessionItem], history: list[str] | None = None, *, good: bool = False) -> Session:
    return Session("u:7", "u", None, 7, 9, items, history or [], 0, 0, 0, good, 0.0, 0.0, 0, 0, [(8, "i9")])


def test_labels_of_windows_and_items_by_hand() -> None:
    watched = [item("i1", 30_000, "like"), item("i2", 1_000, effective=False), item("i3", 500_000, "follow", "like")]
    judged = judge_session(session(watched), INDEX, 20, m=2, n=4, swt_cap_ms=100_000, fresh=True)
    assert judged is not None and judged.ts == 7
    assert judged.windows.tolist() == [[1, 2], [3, -1]]
    np.testing.assert_allclose(judged.labels, [[0.31, 0.5, 0, 1], [1, 1, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(judged.item_labels[0], [[0.6, 1, 0, 1], [0.02, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(judged.item_labels[1], [[1, 1, 1, 1], [0, 0, 0, 0]])


def test_an_unknown_item_counts_for_nothing_and_a_session_of_unknown_items_is_none() -> None:
    judged = judge_session(session([item("new", 90_000, "like"), item("i4", 50_000)]), INDEX, 20, m=2, n=4,
                           swt_cap_ms=100_000, fresh=True)
    assert judged is not None
    assert judged.windows.tolist() == [[4, -1]] and judged.labels[0].tolist() == [0.5, 1, 0, 0]
    assert judge_session(session([item("new", 1)]), INDEX, 20, m=2, n=4, swt_cap_ms=1, fresh=True) is None
    assert judge_session(session([item("i4", 1)]), INDEX, 4, m=2, n=4, swt_cap_ms=1, fresh=True) is None


def test_the_history_is_that_of_the_sessions_start_whatever_the_session_is_worth() -> None:
    """What a good session liked on its way must not tell the model that it was good."""
    items = [item(f"i{row}", 1_000) for row in range(6)]
    for good in (False, True):
        judged = judge_session(session(items, ["i5", "i6", "new", "i7"], good=good), INDEX, 20, m=2, n=2,
                               swt_cap_ms=1_000, fresh=True)
        assert judged is not None and judged.history.tolist() == [6, 7]


def test_rows_hold_every_window_once_in_order_with_the_history_of_its_session() -> None:
    sessions = [
        judge_session(session([item(f"i{(first + k) % 20}", 1_000 * k) for k in range(length)], [f"i{first}"] * first),
                      INDEX, 20, m=2, n=9, swt_cap_ms=20_000, fresh=True)
        for first, length in ((0, 1), (3, 19), (8, 8))
    ]
    judged = [one for one in sessions if one is not None]
    arrays = reward_arrays(judged, CODES)
    assert arrays.sessions.shape[1] == ROW_WINDOWS
    real = arrays.session_mask.any(-1)
    windows = np.concatenate([one.windows for one in judged])
    np.testing.assert_array_equal(arrays.session_mask[real], windows >= 0)
    np.testing.assert_array_equal(arrays.sessions[real][windows >= 0], CODES[windows[windows >= 0]])
    np.testing.assert_array_equal(arrays.labels[real], np.concatenate([one.labels for one in judged]))
    np.testing.assert_array_equal(arrays.item_labels[real], np.concatenate([one.item_labels for one in judged]))
    lengths = np.repeat([len(one.history) for one in judged], [-(-len(one.windows) // ROW_WINDOWS) for one in judged])
    np.testing.assert_array_equal(arrays.history_mask.sum(1), lengths)
    assert not arrays.sessions[~arrays.session_mask].any() and not arrays.history[~arrays.history_mask].any()
