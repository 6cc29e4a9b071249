"""The one exception that fp4rt raises on purpose: something a caller can read, act on and catch."""


def shown(value: object) -> str:
    """A stranger's value for a message: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Fp4rtError(Exception):
    """A problem with what fp4rt was given, told in one line: what it is about, what was found, what to do.

    `kind` is one of "checkpoint" (a file is wrong or unsupported), "device" (driver, GPU, toolchain),
    "memory" (it does not fit), "request" (a prompt, option or argument is wrong), "overload" (ask again later) or
    "internal" (a mistake of fp4rt's own, or of a library that it uses).
    `param` names the argument that is wrong, where one is.
    """

    def __init__(self, kind: str, message: str, param: str | None = None):
        super().__init__(message)
        self.kind, self.param = kind, param
