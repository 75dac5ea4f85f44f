"""Secrets in the environment (HF_TOKEN, *_KEY, *SECRET*, *PASSWORD*) stay out of everything that a run writes or says.

Nothing here writes the environment out. A flag may still carry such a value (a URL with a token), and a message or a
record would repeat it: what leaves the program as text passes through here.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(r"(^|_)(TOKEN|KEY|PASS|PASSWD|PASSPHRASE)$|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters: a shorter value is a word like any other
HIDDEN = "[secret]"


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return _NAMES.search(name) is not None


def redacted(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Text, or plain data, in which the value of every secret variable is replaced; other values as they are."""
    variables = os.environ if environment is None else environment
    found = {held for name, held in variables.items() if len(held) >= _SHORTEST and is_secret(name)}
    return _without(value, sorted(found, key=len, reverse=True)) if found else value


def _without(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, dict):
        return {_without(key, secrets): _without(part, secrets) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without(part, secrets) for part in value]
    return value
