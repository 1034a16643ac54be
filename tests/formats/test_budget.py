from __future__ import annotations

import pytest

from prism_gguf.formats.budget import Budget
from prism_gguf.system.errors import InvalidBudgetError


def size_of(ftype: str) -> int:
    return {"Q4_K_M": 777}[ftype]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("5.2GiB", int(5.2 * 2**30)),
        ("900 mib", 900 * 2**20),
        ("1.5GB", 1_500_000_000),
        (" .5MB ", 500_000),
        ("4.8bpw", 600 + 40),
        ("same-as:q4_k_m", 777),
    ],
)
def test_a_budget_in_bytes(text: str, n_bytes: int) -> None:
    budget = Budget.parse(text)
    assert budget.text == text.strip()
    # Bits per weight leave metadata out, as llama.cpp's do: 1000 parameters at 4.8 bits, and 40 bytes besides.
    assert budget.file_bytes(1000, 40, size_of) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "5", "5G", "-1GiB", "0MiB", "GiB", "1e3MB", "4.8 bits", "Q4_K_M", "5GiB and more"]
)
def test_what_cannot_be_read_says_how_to_write_it(text: str) -> None:
    with pytest.raises(InvalidBudgetError, match=r"^budget '.*': write a size such as 5\.2GiB"):
        Budget.parse(text)


def test_an_unknown_ftype() -> None:
    with pytest.raises(InvalidBudgetError, match="budget 'same-as:Q9': 'Q9' is not an ftype"):
        Budget.parse("same-as:Q9")
