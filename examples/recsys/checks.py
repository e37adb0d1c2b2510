"""Checks of constructor arguments."""


def check_positive(**sizes: int | None) -> None:
    """Raise ``ValueError`` with the name of the first size below 1. None passes."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}.")
