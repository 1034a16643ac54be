#!/usr/bin/env python3
"""Write the JSON Schema of the comparison result from its classes, whose docstrings become descriptions.

python scripts/make_schema.py        # prism_gguf/reports/comparison.schema.json; needs pydantic
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from prism_gguf.results.comparison import SCHEMA, Comparison

OUT = Path(__file__).parent.parent / "prism_gguf" / "reports" / "comparison.schema.json"


def schema() -> dict[str, Any]:
    """The JSON Schema of ``Comparison.to_dict``."""
    made = TypeAdapter(Comparison).json_schema(mode="serialization")
    made["properties"] = {"schema": {"const": SCHEMA}, **made["properties"]}
    made["required"] = ["schema", *made["required"]]
    for part in (made, *made["$defs"].values()):
        if part.get("type") == "object" and "properties" in part:
            part["additionalProperties"] = False
            # A result has every key, null where there is no value; further metrics only where there are any.
            part["required"] = [name for name in part["properties"] if name != "metrics"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


if __name__ == "__main__":
    OUT.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
