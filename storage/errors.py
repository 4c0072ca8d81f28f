"""The two kinds of failure that people see: their input is wrong, or the store is."""


class UserError(Exception):
    """Bad input: one line that says what was wrong, what was found and what to do. Never retried."""


class StoreError(UserError):
    """The store cannot be read or written, or holds something that contradicts itself."""


class MissingObject(StoreError):
    """An object that should be there is not."""


class DamagedObject(StoreError):
    """An object's bytes are not those that were written."""
