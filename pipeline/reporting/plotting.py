"""Matplotlib with its own defaults, whatever the user has set: the same numbers give the same picture, byte for byte.

The only module that imports matplotlib; importing it leaves the user's settings and the environment as they are.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["COLORS", "Axes", "Figure", "Rectangle", "default_settings", "save_figure"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes


@contextmanager
def _without_settings() -> Iterator[None]:
    """No settings for matplotlib to find: it reads them when it is imported, and wrong ones end the import."""
    environment = {**os.environ, "MATPLOTLIBRC": os.devnull}
    environment.pop("MPLBACKEND", None)
    for name in {"MPLCONFIGDIR", "XDG_CACHE_HOME", "HOME"} & environment.keys():
        try:
            Path(environment[name]).resolve()
        except RuntimeError:  # a looping link, which matplotlib trips over; then let it make a folder of its own
            environment["MPLCONFIGDIR"] = os.devnull
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        if os.path.lexists("matplotlibrc"):  # comes before what MATPLOTLIBRC names
            stack.enter_context(chdir(Path(__file__).parent))
        yield


def _apply_users_settings() -> None:
    """Set what matplotlib would have set when imported, for others who use it in this process."""
    with suppress(Exception), mock.patch.dict(os.environ):  # what is wrong, or of no use, stays out
        path = Path(matplotlib.matplotlib_fname())
        if path.is_file():
            matplotlib.rcParams.update(matplotlib.rc_params_from_file(path, use_default_template=False))
    with suppress(ValueError):
        if os.environ.get("MPLBACKEND"):
            matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]


_IS_IMPORTED = "matplotlib" in sys.modules
with nullcontext() if _IS_IMPORTED else _without_settings():
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
if not _IS_IMPORTED:
    _apply_users_settings()
# The backend is for windows; to look at it makes matplotlib choose one.
_DEFAULTS: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}


@contextmanager
def default_settings() -> Iterator[None]:
    """Matplotlib's defaults within the block or, as a decorator, within the function; the user's again after it."""
    with matplotlib.rc_context(_DEFAULTS):
        yield


@default_settings()
def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, without version or date: the same metrics give the same bytes.

    Args:
        figure: Drawn with `default_settings`.
        path: Where it goes.
        dpi: Dots per inch.
    """
    figure.savefig(path, dpi=dpi, format="png", metadata={"Software": None})
