"""Another attempt after whatever a remote storage raises, unless it cannot help."""

from __future__ import annotations

import errno
import logging
import random
import time
from typing import Any

from agff.errors import AgffError, StorageError

log = logging.getLogger(__name__)

ATTEMPTS = 8
FIRST_WAIT_S = 0.5
"""Before the second attempt; doubled for each further one, plus up to half at random: 64 to 95 s in all."""
TOLD_FROM = 4
"""The attempt from which on a failure is worth a warning."""


class DamagedError(Exception):
    """What came is not what the manifest names; another attempt may bring it."""


def with_retries(url: str, fetch: Any) -> Any:
    """What `fetch` returns, attempted again after any error of a storage library that may pass."""
    wait = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch()
        except (FileNotFoundError, AgffError):
            raise
        except PermissionError as error:
            raise StorageError(
                f"{url}: access denied: {error}; check the credentials of this machine"
            ) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EFBIG,
                errno.EROFS,
            ):
                raise
            text = str(error) or type(error).__name__
            if attempt == ATTEMPTS:
                raise StorageError(f"{url}: {ATTEMPTS} attempts failed, the last: {text}") from None
            if attempt >= TOLD_FROM:
                log.warning(
                    "%s: attempt %d of %d failed: %s; again in %.0f s", url, attempt, ATTEMPTS, text, wait
                )
        time.sleep(wait * (1 + random.random() / 2))
        wait *= 2
    raise AssertionError
