"""What goes wrong while running, as opposed to what was asked for wrongly."""

from masksparsity.channels.errors import MaskSparsityError


class RunFailure(MaskSparsityError):
    """A run that cannot go on although the request was fine: a full disk, a loss that overflowed.

    The shell exits with 1 for these and with 2 for every other `MaskSparsityError`.
    """
