"""Errors that tell users what cannot be done, and what to do."""


class MaskSparsityError(ValueError):
    """A user's mistake, or a refusal to prune: names the layer or the file, and what to do."""


class RunFailure(MaskSparsityError):
    """A run that cannot go on although the request was fine: a full disk, a loss that overflowed.

    The shell exits with 1 for these and with 2 for every other `MaskSparsityError`.
    """
