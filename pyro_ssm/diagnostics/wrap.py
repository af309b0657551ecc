"""The seam to ArviZ: plain xarray data sets on one side, whatever the installed ArviZ works with on the other.

This file imports neither torch nor Pyro, so that it can be tested in an environment without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray

__all__ = ["wrap"]


def wrap(groups: Mapping[str, xarray.Dataset]) -> Any:
    """Groups of variables as ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).

    Args:
        groups: name of group to data set, as :func:`~pyro_ssm.diagnostics.to_datasets` builds them.

    Raises:
        ImportError: ArviZ is not installed.

    >>> import numpy as np, xarray as xr
    >>> from pyro_ssm.diagnostics.wrap import wrap
    >>> idata = wrap({"posterior": xr.Dataset({"rate": (("chain", "draw"), np.ones((1, 5)))})})
    >>> idata["posterior"]["rate"].dims
    ('chain', 'draw')
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "to_inference_data needs ArviZ: pip install arviz. Without it, to_datasets gives the same groups as plain "
            "xarray data sets"
        ) from error
    from xarray import DataTree

    kind: Any = getattr(arviz, "InferenceData", DataTree)  # ArviZ 1.x keeps the name, for DataTree itself
    return DataTree.from_dict(dict(groups)) if issubclass(kind, DataTree) else kind(**groups)
