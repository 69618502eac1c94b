"""What all pages share: how they look, how numbers are written, plots for light and dark screens, images inside."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyvdl.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1d1c1a", "muted": "#6d6a64", "line": "#e4e1da",
        "image": "#a3a29e", "visual": "#3f78c9", "language": "#0f8a72",
        "alt_text": "#a3a29e", "pseudo_captions": "#d9731a", "human_captions": "#7656b8",
        "good": "#16784a", "bad": "#b3372b",
    },
    "dark": {
        "paper": "#1e1f23", "ink": "#ebe8e2", "muted": "#a3a09a", "line": "#3a3b41",
        "image": "#85868b", "visual": "#6d9fe8", "language": "#35b395",
        "alt_text": "#85868b", "pseudo_captions": "#f0964a", "human_captions": "#a58be0",
        "good": "#5fc792", "bad": "#f08a7c",
    },
}  # fmt: skip
_NEEDS = "a page needs matplotlib, Pillow and Jinja2: pip install 'matplotlib>=3.9' 'pillow>=10' 'jinja2>=3.1'"

Plots = dict[str, dict[str, bytes]]  # by name and theme: PNG files


def check_packages() -> None:
    """Raises ImportError naming what a page needs and is not installed: to be told before the work that it shows."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "PIL", "jinja2")):
        raise ImportError(_NEEDS)


def write_page(path: Path, template: str, *, plots: Plots, **values: Any) -> None:
    """Renders a template of this package into one HTML file, which appears whole or not at all.

    The page holds everything it shows: images are data URIs, there is no script and no address to load anything from.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration}
    images = {name: {theme: png_uri(png) for theme, png in files.items()} for name, files in plots.items()}
    page = environment.get_template(template).render(themes=THEMES, plots=images, **values)
    write_whole(path, [page])


def draw(figures: Callable[[Mapping[str, str]], Mapping[str, Figure]]) -> Plots:
    """The figures that `figures` makes in the colours of each theme."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    files: Plots = {}
    for theme, colours in THEMES.items():
        settings: dict[Any, Any] = {
            "figure.facecolor": colours["paper"], "axes.facecolor": colours["paper"],
            "text.color": colours["ink"], "axes.labelcolor": colours["muted"], "axes.edgecolor": colours["line"],
            "xtick.color": colours["muted"], "ytick.color": colours["muted"], "grid.color": colours["line"],
            "xtick.labelcolor": colours["ink"], "axes.spines.top": False, "axes.spines.right": False,
            "axes.spines.left": False, "axes.axisbelow": True, "font.size": 10, "font.family": "DejaVu Sans",
            "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 9.5,
        }  # fmt: skip
        with matplotlib.rc_context(settings):
            for name, figure in figures(colours).items():
                png = io.BytesIO()
                figure.savefig(png, dpi=200)
                files.setdefault(name, {})[theme] = png.getvalue()
    return files


def new_figure() -> tuple[Figure, Any]:
    """A figure of the size that pages show, and its axes."""
    figure, (axes,) = new_panels(1)
    return figure, axes


def new_panels(count: int, *, widths: Sequence[float] | None = None, share: bool = True) -> tuple[Figure, Any]:
    """The same with axes side by side, of relative `widths`; they have one vertical scale unless `share` is False."""
    from matplotlib.figure import Figure  # not pyplot: no global state and no backend to choose, savefig uses Agg

    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    return figure, figure.subplots(1, count, sharey=share, width_ratios=widths, squeeze=False)[0]


def frame_image(frame: np.ndarray) -> Any:
    """One frame, uint8[H, W, 3], as an image of Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(f"a frame is {frame.dtype}{list(frame.shape)}; expected uint8[H, W, 3]")
    return Image.fromarray(np.ascontiguousarray(frame))


def png_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def photograph_uri(image: Any) -> str:
    """An image of Pillow as JPEG, which noise makes several times smaller than PNG."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.1f}"


def percent(share: float) -> str:
    if not 0 <= share <= 1:
        raise ValueError(f"a share is {share!r}; expected a fraction from 0 to 1")
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
