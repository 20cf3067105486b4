"""What was measured, as JSON on standard output."""

from __future__ import annotations

import json
import logging
import math

from sivae_fast.files import plain

logger = logging.getLogger("sivae_fast")


def as_json(found: dict, indent: int | None = None) -> str:
    """`found`, values or records with a `value` by name, as JSON. NaN and infinity, which JSON does not have,
    become null, with a warning that says why a measure is such."""
    for name, record in found.items():
        value = record.get("value") if isinstance(record, dict) else record
        if isinstance(value, float) and not math.isfinite(value):
            why = "the model's outputs, or errors of them, are not finite: it may have diverged"
            if name == "psnr" and value > 0:
                why = "an image and its reconstruction are the same"
            logger.warning("%s is %s and given as null: %s", name, value, why)
    return json.dumps(plain(found), indent=indent, allow_nan=False)
