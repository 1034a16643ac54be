from __future__ import annotations

from pathlib import Path

import pytest

from prism_gguf.errors import InvalidProfileError
from prism_gguf.mix import ftype_value
from prism_gguf.profiles import load_profile, profile_names


def test_packaged_profiles_name_types_that_exist() -> None:
    assert "demo" in profile_names()
    for name in profile_names():
        profile = load_profile(name)
        assert profile.entries
        for entry in profile.entries:
            assert ftype_value(entry.ftype) >= 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not YAML"),
        ("[]", "exactly 'description'"),
        ("{description: x, entries: 3}", "exactly 'description'"),
        ("{description: x, entries: [{name: a}]}", "needs 'name' and 'ftype'"),
        ("{description: x, entries: [{name: a, ftype: Q8_0, colour: red}]}", "needs 'name' and 'ftype'"),
    ],
)
def test_bad_profiles(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(content)
    with pytest.raises(InvalidProfileError, match=message):
        load_profile(str(path))


def test_unknown_profile_lists_the_known() -> None:
    with pytest.raises(InvalidProfileError, match=r"no profile 'nope'.*demo"):
        load_profile("nope")
