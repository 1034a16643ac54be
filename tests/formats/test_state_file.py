from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prism_gguf.formats.state_file import StateFile, decode, encode
from prism_gguf.system.errors import UndefinedMetricError

RNG = np.random.default_rng(11)
# Uneven channels and a few outliers, as final hidden states have them.
STATES = (RNG.normal(size=(3, 40, 100)) * np.exp(RNG.normal(size=100))).astype(np.float32)
STATES[..., 7] *= 200


@pytest.mark.parametrize("width", [1, 31, 32, 33, 100, 576, 1000])
def test_round_trip_is_closer_than_fp16(width: int) -> None:
    states = (RNG.normal(size=(50, width)) * np.exp(RNG.normal(size=width))).astype(np.float32)
    stored = decode(*encode(states))
    assert stored.shape == states.shape and stored.dtype == np.float32
    as_fp16 = states.astype(np.float16).astype(np.float32)
    assert np.linalg.norm(stored - states) < 0.5 * np.linalg.norm(as_fp16 - states)


def test_zeros_tiny_and_huge_values_survive() -> None:
    states = np.array([[0.0] * 40, [1e-30] * 40, [3e37] * 40], dtype=np.float32)
    np.testing.assert_allclose(decode(*encode(states)), states, rtol=2**-15)


def test_stored_states_are_a_fixed_point() -> None:
    once = decode(*encode(STATES[0]))
    np.testing.assert_array_equal(decode(*encode(once)), once)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_undefined_states_are_refused(bad: float) -> None:
    states = STATES[0].copy()
    states[3, 4] = bad
    with pytest.raises(UndefinedMetricError):
        encode(states)


def test_windows_are_read_back_by_slice_and_by_index(tmp_path: Path) -> None:
    writer = StateFile(tmp_path, STATES.shape, writable=True)
    for window, states in enumerate(STATES):
        writer.write_states(window, states)
    reader = StateFile(tmp_path, STATES.shape)
    flat = decode(*encode(STATES.reshape(-1, 100)))
    np.testing.assert_array_equal(reader[35:50], flat[35:50])
    np.testing.assert_array_equal(reader[np.array([1, 77, 119])], flat[[1, 77, 119]])
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert files <= 120 * (2 * 100 + 64) + 3 * 128  # headers of three files


def test_only_whole_windows_count(tmp_path: Path) -> None:
    writer = StateFile(tmp_path, STATES.shape, writable=True)
    assert [writer.has(w) for w in range(3)] == [False] * 3
    writer.write_states(1, STATES[1])
    again = StateFile(tmp_path, STATES.shape, writable=True)  # another run goes on with what is there
    assert [again.has(w) for w in range(3)] == [False, True, False]
    with (tmp_path / "mantissas.npy").open("r+b") as file:
        file.seek(128 + 2 * 100 * 41)
        file.write(b"\xff\x7f")
    assert not StateFile(tmp_path, STATES.shape).has(1)


def test_another_shape_or_a_cut_header_starts_afresh(tmp_path: Path) -> None:
    StateFile(tmp_path, STATES.shape, writable=True).write_states(0, STATES[0])
    assert not StateFile(tmp_path, (2, 40, 100), writable=True).has(0)
    (tmp_path / "mantissas.npy").write_bytes(b"\x93NUMPY")
    assert not StateFile(tmp_path, (2, 40, 100), writable=True).has(0)
