"""Arguments of models and of data, checked at the door."""


def check_positive(**sizes: int | None) -> None:
    """Raise ``ValueError`` that names the first size below 1; None is left alone."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}.")
