from __future__ import annotations

import re
from pathlib import Path

import prism_gguf
from prism_gguf.system.amounts import agrees, amount

# Words of one thing that are counted in messages. A literal plural after a number is a fault where there is one thing.
_COUNTED = "windows|tensors|files|candidates|parts|tokens|chunks|entries|matrices|norms|blocks|columns|rows|weights"


def test_one_thing_is_singular() -> None:
    assert [amount(n, "window") for n in (0, 1, 2)] == ["0 windows", "1 window", "2 windows"]
    assert [amount(n, "matrix", "matrices") for n in (1, 3)] == ["1 matrix", "3 matrices"]
    assert [agrees(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]


def test_no_message_counts_by_itself() -> None:
    """Every number before a countable word goes through ``amount``; numbers that are sizes of one thing do not count."""
    folder = Path(prism_gguf.__file__).parent
    size = re.compile(
        r"n_ctx|width|min_|Budget|bits|\bn\} blocks|vocab_size\}|len\(texts\)|rows \* "
        r"|of \{len\(|FEW_EXPERT_TOKENS|_columns\(|have other types"
    )
    found = [
        f"{file.relative_to(folder)}: {line.strip()}"
        for pattern in ("*.py", "*.j2")
        for file in sorted(folder.rglob(pattern))
        if "formats/text" not in file.as_posix()
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(rf"\}} ({_COUNTED})\b", line) and "amount" not in line and not size.search(line)
    ]
    assert found == []
