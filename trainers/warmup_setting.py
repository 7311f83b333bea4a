"""How long a warm-up is, as a setting: a number of steps, or until it stops helping."""


def steps_or_auto(name: str, value: int | str) -> int | str:
    """Check a setting that is a number of steps, given as text on a command line, or "auto".

    Args:
        name (`str`): of the setting, for the message.
        value (`int` or `str`): as it was given.

    Returns:
        `int` or `str`: the number, or `"auto"`.

    Raises:
        ValueError: it is neither "auto" nor a whole number, 0 or more.
    """
    if value == "auto":
        return value
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or (isinstance(value, float) and value != number):
        raise ValueError(f"`{name}` is {value!r}; need 'auto' or a whole number of steps, 0 to skip.")
    return number
