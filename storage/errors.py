"""The kinds of failure that people see: their input is wrong, or the store is, for good or for the moment."""

import errno


class UserError(Exception):
    """Bad input: one line that says what was wrong, what was found and what to do. Never retried."""


class StoreError(UserError):
    """The store cannot be read or written, or holds something that contradicts itself."""


class StoreAway(StoreError):
    """The store does not answer, or not now: the same work may succeed later, so a stage is tried again."""


class MissingObject(StoreError):
    """An object that should be there is not."""


class DamagedObject(StoreError):
    """An object's bytes are not those that were written."""


def explained(error: BaseException) -> UserError | None:
    """A full disk or quota as a line that a user can act on; None for every other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return StoreError(
            f"the disk is full{place}: {error.strerror}. Free some space; the store's folder, NST_CACHE_DIR (files in the "
            "making for a bucket) and TMPDIR may each be moved to another disk. Nothing is lost: run again"
        )
    return None
