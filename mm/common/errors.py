"""The two kinds of trouble: a sample that is bad, and a person who made a mistake."""


class BadSample(Exception):
    """One sample cannot be used. It is skipped, counted by reason, and named; the run goes on.

    Args:
        reason: short and free of file names, so that equal causes count together.
        shard, key: where the sample lies, filled in by whoever knows.
    """

    def __init__(self, reason: str, *, shard: str = "", key: str = ""):
        self.reason, self.shard, self.key = reason, shard, key
        super().__init__(reason)

    def __str__(self) -> str:
        where = "/".join(p for p in (self.shard, self.key) if p)
        return f"{where}: {self.reason}" if where else self.reason

    def __reduce__(self):
        return (_rebuild, (self.reason, self.shard, self.key))


def _rebuild(reason: str, shard: str, key: str) -> BadSample:
    return BadSample(reason, shard=shard, key=key)


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do."""
