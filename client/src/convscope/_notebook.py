"""A prediction as HTML for a notebook: a table of scores and the maps as grey tiles. Needs no matplotlib."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from convscope.pixels import encode_png, tile_grid

if TYPE_CHECKING:
    from convscope._prediction import Prediction


def prediction_html(prediction: Prediction) -> str:
    """Return a prediction as a piece of HTML.

    Args:
        prediction: With a result or an error.

    Returns:
        HTML; every text that came from the service is escaped.
    """
    heading = f"<b>{escape(prediction.model)}</b> {escape(prediction.version)} on {escape(prediction.device)}"
    if prediction.error is not None:
        return f"<div>{heading}<br>{escape(prediction.error.code)}: {escape(str(prediction.error))}</div>"
    parts = [heading]
    if prediction.top:
        rows = "".join(
            f"<tr><td>{score.index}</td><td>{escape(score.label)}</td>"
            f"<td>{score.probability:.4f}</td><td>{score.logit:.3f}</td></tr>"
            for score in prediction.top
        )
        parts.append(
            "<table><tr><th>index</th><th>label</th><th>probability</th><th>logit</th></tr>" + rows + "</table>"
        )
    for name, cells in prediction.maps.items():
        parts.append(f"<p>{escape(name)} {cells.shape}</p>")
        if cells.ndim == 3 and cells.size:
            png = base64.b64encode(encode_png(tile_grid(cells))).decode()
            parts.append(f'<img alt="{escape(name)}" src="data:image/png;base64,{png}">')
    return "<div>" + "\n".join(parts) + "</div>"
