"""The one public error class."""


class MaskSparsityError(ValueError):
    """A user's mistake, or a refusal to prune: names the layer or the file, and what to do."""
