"""What the library raises when its input breaks the contract."""


class InputError(ValueError):
    """A call that the contract refuses.

    ``reason`` is a stable UPPER_SNAKE name for programs, ``field`` the argument at fault, and ``metadata``
    the facts as strings: always ``field``, and what applies of ``got``, ``expected``, ``index``, ``head``,
    ``token``, ``row``, ``slot``, ``value``, ``sequence``.
    """

    def __init__(self, reason: str, field: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.metadata = {"field": field, **{name: str(value) for name, value in metadata.items()}}
