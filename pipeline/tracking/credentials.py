"""Passwords and keys, kept out of what is printed and logged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from urllib.parse import unquote

URI, USER, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
_SECRET = (PASSWORD, "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
_SHORTEST = 4  # characters of a secret that is looked for in texts: a shorter one is part of many words


def separate(environment: MutableMapping[str, str]) -> None:
    """Move user and password of a tracking server's address into the variables that MLflow has for them.

    MLflow prints the address with each run that ends, and in its errors. It never prints those variables.

    Args:
        environment: The process's; changed.
    """
    scheme, _, rest = environment.get(URI, "").partition("://")
    login, at, place = rest.rpartition("@")
    if at and scheme in ("http", "https"):
        user, _, password = login.partition(":")
        environment.update({URI: f"{scheme}://{place}", USER: unquote(user), PASSWORD: unquote(password)})


def hidden(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without what its addresses say of users and passwords, and without the environment's secrets.

    Args:
        text: Of a message or a traceback.
        environment: Whose secrets are looked for.
    """
    for secret in filter(None, (_password(environment.get(URI, "")), *map(environment.get, _SECRET))):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return re.sub(r"://[^/@\s]*@", "://", text)


def _password(address: str) -> str:
    """Return the password in an address as it stands there, also one with characters that should be encoded."""
    login = address.partition("://")[2].rpartition("@")[0]
    return login.partition(":")[2]
