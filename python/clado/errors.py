"""The one exception for input a user can mend; the command line prints it as a single line and exits with 2."""


class CladoError(ValueError):
    """Bad input, said in one line: ``op: argument must …, got …``."""


def require(condition: bool, op: str, argument: str, must: str, got: object) -> None:
    """Raise :class:`CladoError` ``"op: argument must …, got …"`` unless ``condition`` holds."""
    if not condition:
        raise CladoError(f"{op}: {argument} must {must}, got {got}")
